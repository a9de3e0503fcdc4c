"""Counters, status and the log."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading

import pytest
import torch

from whisper_max import report
from whisper_max.conditions import device_reasons
from whisper_max.settings import TARGETS, Settings

from isolation import raise_in


@pytest.fixture(autouse=True)
def own_counters(monkeypatch):
    monkeypatch.setattr(report, "_counters", report._Counters())


def test_calls_and_seconds_are_counted_by_target_and_path():
    report.record("encoder", "max", 0.25)
    report.record("encoder", "max", 0.5)
    report.record("encoder", "torch", 2.0, ["float64 input", "gradients are wanted"])
    report.record("decoder", "torch", 1.0, ["float64 input"])
    report.set_patched("encoder", True)
    assert report.status().to_dict()["targets"]["encoder"] == {
        "patched": True,
        "max_calls": 2,
        "torch_calls": 1,
        "max_seconds": 0.75,
        "torch_seconds": 2.0,
        "reasons": {"float64 input": 1, "gradients are wanted": 1},
    }
    assert report.status().targets["decoder"].reasons == {"float64 input": 1}


def test_status_is_plain_data_with_all_targets():
    report.set_artifact("ready")
    report.set_device("cpu, amx")
    status = report.status().to_dict()
    assert list(status) == [
        "targets", "versions", "device", "mode", "precision", "compile", "cache_dir", "artifact"
    ]
    assert tuple(status["targets"]) == TARGETS
    assert {"python", "whisper_max", "openai-whisper", "torch", "max"} <= set(status["versions"])
    assert (status["device"], status["artifact"]) == ("cpu, amx", "ready")
    assert json.loads(json.dumps(status)) == status


def test_a_model_on_a_gpu_is_warned_of_once_and_other_reasons_never(caplog):
    (reason,) = device_reasons(torch.device("cuda:0"), None)
    for target in ("encoder", "decoder", "encoder"):
        report.record(target, "torch", 1.0, [reason])
        report.record(target, "torch", 1.0, ["float64 input"])
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [f"PyTorch does all the work: {reason}"]


def raised_in(module: str, text: str) -> ValueError:
    """An error as a module of this name raises it."""
    with pytest.raises(ValueError) as raised:
        raise_in(module, ValueError(text))
    return raised.value


def test_a_failure_of_max_is_a_reason_and_a_warning_once(caplog):
    reason = report.as_unsupported("encoder", raised_in("max.engine.api", "a shape"))
    assert reason.reasons == ("MAX failed in encoder: a shape",)
    report.as_unsupported("encoder", raised_in("max.engine.api", "a shape"))
    report.as_unsupported("encoder", raised_in("whisper_max.runtime.engine", "another"))
    assert [record.getMessage() for record in caplog.records] == [
        "MAX failed in encoder: a shape; PyTorch takes over",
        "MAX failed in encoder: another; PyTorch takes over",
    ]
    assert {record.levelname for record in caplog.records} == {"WARNING"}


@pytest.mark.parametrize("module", ["__main__", "torch.utils.data._utils.signal_handling"])
def test_what_a_signal_handler_raises_is_no_failure_of_max(module, caplog):
    error = raised_in(module, "time is over")
    with pytest.raises(ValueError, match="time is over"):
        report.as_unsupported("encoder", error)
    assert not caplog.records


def test_a_status_does_not_change_with_later_calls():
    report.record("encoder", "torch", 1.0, ["a reason"])
    before = report.status()
    report.record("encoder", "torch", 1.0, ["a reason"])
    assert before.targets["encoder"].torch_calls == 1
    assert before.targets["encoder"].reasons == {"a reason": 1}


def test_a_refused_target_shows_its_reasons_before_any_call():
    report.set_patched("alignment", False, ["MAX is not installed"])
    status = report.status()
    assert status.targets["alignment"].reasons == {"MAX is not installed": 0}
    assert "alignment: not patched: MAX is not installed" in str(status)
    report.set_patched("alignment", True)
    assert report.status().targets["alignment"].reasons == {}


def test_status_prints_as_a_table():
    report.record("decoder", "max", 1.5)
    report.record("decoder", "torch", 0.5, ["a hook on blocks.0"])
    lines = str(report.status()).splitlines()
    assert lines[0].split() == "target patched MAX calls PyTorch calls MAX s PyTorch s".split()
    assert lines[2].split() == ["decoder", "no", "1", "1", "1.500", "0.500"]
    assert "decoder: 1 × a hook on blocks.0" in lines
    assert len({len(line) for line in lines[: 1 + len(TARGETS)]}) == 1


def test_reset_keeps_what_is_patched():
    report.set_patched("encoder", True)
    report.record("encoder", "torch", 1.0, ["a reason"])
    report.reset()
    assert report.status().targets["encoder"] == report.TargetStatus(patched=True)


@pytest.mark.parametrize(("target", "path"), [("encoder", "cuda"), ("vad", "max")])
def test_unknown_counters_are_refused(target, path):
    with pytest.raises(ValueError, match="no such counter"):
        report.record(target, path, 0.1)


def test_each_path_and_reason_is_logged_once_and_each_call_at_debug(caplog):
    caplog.set_level(logging.DEBUG, logger="whisper_max")
    for _ in range(3):
        report.record("encoder", "max", 0.1)
        report.record("encoder", "torch", 0.1, ["one", "two"])
    report.record("encoder", "torch", 0.1, ["three"])
    told = [entry.message for entry in caplog.records if entry.levelno == logging.INFO]
    assert told == [
        "encoder runs on MAX",
        "encoder runs on PyTorch: one",
        "encoder runs on PyTorch: two",
        "encoder runs on PyTorch: three",
    ]
    assert sum(entry.levelno == logging.DEBUG for entry in caplog.records) == 7
    assert {entry.name for entry in caplog.records} == {"whisper_max"}


def test_reasons_do_not_grow_without_bound():
    for number in range(10 * report.MAX_REASONS):
        report.record("encoder", "torch", 0.0, [f"shape {number}"])
    reasons = report.status().targets["encoder"].reasons
    assert len(reasons) == report.MAX_REASONS + 1
    assert reasons[report.FURTHER_REASONS] == 9 * report.MAX_REASONS
    assert len(report._counters.announced) == len(reasons)


def test_threads_count_together():
    def work():
        for _ in range(2000):
            report.record("decoder", "torch", 1.0, ["busy"])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = report.status().targets["decoder"]
    assert (counted.torch_calls, counted.torch_seconds) == (8000, 8000.0)
    assert counted.reasons == {"busy": 8000}


def test_a_child_forked_while_the_lock_is_held_can_count():
    with report._counters.lock:
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # rather than wait for ever
            try:
                report.record("encoder", "max", 0.1)
            finally:
                os._exit(report.status().targets["encoder"].max_calls)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1


def test_patch_report_prints_every_reason():
    settings = Settings()
    printed = str(report.PatchReport(("encoder",), {"decoder": ("one", "two")}, settings))
    assert printed == "patched: encoder\ndecoder stays on PyTorch: one; two"
    assert str(report.PatchReport((), {}, settings)) == "patched: nothing"
