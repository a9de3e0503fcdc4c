"""Compiles that crash, hang, are killed or fill the disk: told once, recorded, not repeated."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from whisper_max.runtime import artifacts, compilation

from compile_tools import KEY, ensure, forget_this_process, names, wait_for, warnings


def test_what_breaks_after_the_artifact_is_written_does_not_count(compiling):
    assert ensure(compiling.key, compiling.cache, "abort_at_the_end").ready


@pytest.mark.parametrize(
    "compiler, words",
    [
        ("crash", "crashed (signal 11"),
        ("be_killed", "memory runs out"),
        ("exit_quietly", "status 3"),
        ("run_out_of_memory", "status 1"),
        ("fill_the_disk", "status 1"),
        ("write_nothing", "without writing"),
        ("no_such_function", "status 1"),
    ],
)
def test_failure_is_told_once_and_not_repeated(compiling, caplog, compiler, words):
    cache, key, count = compiling.cache, compiling.key, compiling.count
    state = ensure(key, cache, compiler)
    log = cache / f"{key.stem}.log"
    assert state.name == "failed" and words in state.reason
    assert names(cache) == {log.name, f"{key.stem}.failed.json"}
    tried = count()
    assert tried == (compiler != "no_such_function")

    for policy in ("blocking", "background", "cached"):
        assert ensure(key, cache, compiler, policy=policy) == state
    [warning] = warnings(caplog)
    assert words in warning and str(log) in warning

    forget_this_process()
    assert ensure(key, cache, compiler) == state
    assert count() == tried

    assert ensure(key, cache, "write", force=True).ready
    assert names(cache) == {f"{key.stem}.mef", f"{key.stem}.json"}


@pytest.mark.parametrize(
    "compiler, words",
    [
        ("crash", "about to crash"),
        ("run_out_of_memory", "MemoryError"),
        ("fill_the_disk", "No space left on device"),
        ("no_such_function", "AttributeError"),
    ],
)
def test_log_tells_what_happened(compiling, compiler, words):
    cache = compiling.cache
    assert ensure(KEY, cache, compiler).name == "failed"
    assert words in (cache / f"{KEY.stem}.log").read_text()


def test_log_is_bounded_and_keeps_its_end(compiling):
    cache = compiling.cache
    assert ensure(KEY, cache, "talk_and_fail").name == "failed"
    log = cache / f"{KEY.stem}.log"
    assert log.stat().st_size <= 64 << 10
    assert "the last words" in log.read_text()

    assert ensure(KEY, cache, "exit_quietly", force=True).name == "failed"
    assert "many words" not in log.read_text()


def test_failure_is_tried_again_after_a_day(compiling):
    cache, key, count = compiling.cache, compiling.key, compiling.count
    assert ensure(key, cache, "exit_quietly").name == "failed"
    path = artifacts.failure_path(key, cache)
    day = artifacts.RETRY_AFTER_SECONDS
    for age, name in [(day - 60, "failed"), (day + 60, "ready")]:
        record = {**json.loads(path.read_text()), "time": time.time() - age}
        path.write_text(json.dumps(record))
        forget_this_process()
        assert ensure(key, cache).name == name
    assert count() == 2


@pytest.mark.parametrize("policy", ["blocking", "background"])
def test_hanging_compile_is_stopped_with_its_helpers(compiling, tmp_path, policy):
    cache = compiling.cache
    pids = tmp_path / "pids"
    key = replace(KEY, options=(("pids", str(pids)),))
    ensure(key, cache, "hang", policy=policy, limit_seconds=2)
    wait_for(lambda: compilation.state(key, cache).name == "failed")
    assert "longer than 2 s" in compilation.state(key, cache).reason
    for pid in map(int, pids.read_text().split()):
        wait_for(lambda pid=pid: not alive(pid))


def alive(pid):
    """Whether the process runs; one that ended and has not been waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="ties the two processes by prctl")
def test_killed_supervisor_takes_the_compiler_along_and_frees_the_lock(compiling, tmp_path, caplog):
    cache = compiling.cache
    pids = tmp_path / "pids"
    key = replace(KEY, options=(("pids", str(pids)),))
    assert ensure(key, cache, "hang", policy="background").name == "compiling"
    wait_for(lambda: pids.exists() and pids.read_text())
    compilation._children[key.digest, cache].kill()
    compiler, helper = map(int, pids.read_text().split())
    os.kill(helper, signal.SIGKILL)  # in life it would end by itself
    wait_for(lambda: not alive(compiler))
    state = compilation.state(key, cache)
    assert state.name == "failed" and "status -9" in state.reason
    assert len(warnings(caplog)) == 1

    forget_this_process()  # nothing was recorded: the next process tries again
    assert ensure(key, cache).ready
    assert names(cache) == {f"{key.stem}.mef", f"{key.stem}.json"}


def test_what_fails_its_check_is_replaced(compiling, caplog):
    keys = (replace(KEY, cpu_level="amx"), KEY)

    def ensure_first(**options):
        return compilation.ensure_first(
            keys,
            compiling.cache,
            "blocking",
            progress=False,
            compiler="fake_compilers:refuse_tiles",
            **options,
        )

    key, state = ensure_first()
    assert key == KEY and state.ready and "its tiles are wrong" in state.reason
    assert not compilation.state(keys[0], compiling.cache).ready
    [warning] = warnings(caplog)
    assert "its tiles are wrong" in warning and "without tiles stand in" in warning
    assert ensure_first() == (key, state)
    assert compilation.ensure_first(keys[1:], compiling.cache, "cached")[1].reason == ""


def test_changed_sources_are_not_compiled_under_the_old_name(compiling, monkeypatch):
    cache, key, count = compiling.cache, compiling.key, compiling.count
    stale = {**compilation.fingerprint(), "sources": "as they were when the program started"}
    monkeypatch.setattr(compilation, "fingerprint", lambda: stale)
    assert ensure(key, cache).name == "failed"
    assert "sources or the engine changed" in (cache / f"{key.stem}.log").read_text()
    assert count() == 0
