"""What is published about speed is what the results say, and the command line of the benchmarks."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

import whisper_max
from benchmarks import ceilings, command, gpu, places, scenarios
from benchmarks.report import block, page, with_block, write
from benchmarks.report.readme import BEGIN, END
from benchmarks.results import load_all, save
from whisper_max.dimensions_of import dimensions_of
from whisper_max.runtime import loading

from benchmark_fakes import made_up_results

AGAIN = "run `python -m benchmarks report` and commit what it writes"


@pytest.fixture(scope="module")
def published():
    return load_all(places.PUBLISHED.results)


def test_page_is_what_the_results_make(published):
    text = places.PUBLISHED.document.read_text(encoding="utf-8")
    assert text == page(published), AGAIN


def test_figures_in_the_readme_are_what_the_results_make(published):
    text = places.PUBLISHED.readme.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert text == with_block(text, block(published)), AGAIN


def test_every_plot_on_the_page_is_there(published):
    document = places.PUBLISHED.document
    for target in re.findall(r"!\[[^]]*\]\(([^)]*)\)", page(published)):
        for suffix in (".svg", ".png"):
            assert (document.parent / target).with_suffix(suffix).is_file(), AGAIN


def test_published_windows_have_the_forced_number_of_tokens(published):
    for results in published.values():
        for one in results.measurements:
            if one.samples and one.scenario.startswith("window"):
                assert one.tokens == scenarios.FORCED_TOKENS


def test_a_changed_result_changes_page_and_readme(tmp_path):
    destination = places.trial(tmp_path)
    results = made_up_results()
    save(results, destination.results / "machine.json")
    write(destination)
    first = destination.document.read_text(), destination.readme.read_text()
    results.measurements[1].samples = [0.01, 0.01, 0.01]
    save(results, destination.results / "machine.json")
    write(destination)
    second = destination.document.read_text(), destination.readme.read_text()
    assert first[0] != second[0] and first[1] != second[1]
    write(destination)
    assert second == (destination.document.read_text(), destination.readme.read_text())


def test_without_a_gpu_none_is_measured(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["gpu"]) == command.REFUSED == 2
    assert "PyTorch finds no NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "stray"),
    [
        (["report", "--scenarios", "encoder"], "report takes no --scenarios"),
        (["gpu-compile", "--repeats", "3"], "gpu-compile takes no --repeats"),
        (["gpu", "--threads", "1", "--quick"], "gpu takes no --quick, --threads"),
        (["--dtypes", "float32"], "measure takes no --dtypes"),
    ],
)
def test_options_of_another_command_are_refused(capsys, arguments, stray):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert stray in capsys.readouterr().err


def test_additions_are_measured_in_turns_with_the_baseline(capsys):
    with pytest.raises(SystemExit):
        command.main(["--add", "--peers", "whisper_max-high", "--models", "turbo"])
    assert "in turns with whisper" in capsys.readouterr().err


def test_both_sides_of_a_gpu_are_compared_in_turns(monkeypatch, tmp_path):
    """On the CPU and with a model of two small layers; what is called patched falls back."""
    small = {**dimensions_of("tiny"), "n_audio_layer": 1, "n_text_layer": 1}
    monkeypatch.setattr(gpu, "dimensions_of", lambda name: small)
    monkeypatch.setattr(ceilings, "BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "SECONDS", 0.01)
    monkeypatch.setenv("WHISPER_MAX_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(loading, "_engines", {})  # other tests may have loaded what this one lacks
    patched = whisper_max.patched
    monkeypatch.setattr(
        gpu.whisper_max, "patched", lambda **options: patched(**{**options, "compile": "cached"})
    )
    lines = []
    path = tmp_path / "results" / "device.json"
    results = gpu.run(["tiny"], "cpu", path, lines.append, rounds=2, tokens=4)
    names = [found.operation for found in results.comparisons]
    assert names == [
        "encoder", "step, all logits", "step, in the loop", "window", "window, 5 beams"
    ]
    for found in results.comparisons:
        assert len(found.plain) == len(found.patched) == 2
        assert any("are not compiled" in reason for reason in found.reasons)
        assert found.identical is (True if found.operation.startswith("window") else None)
    assert json.loads(path.read_text())["comparisons"] == [
        dataclasses.asdict(found) for found in results.comparisons
    ]
    assert len(lines) == 2 + 5 and "same tokens  PyTorch: " in lines[-1]


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        ("--scenarios", "encoder,sleep", "first_run"),
        ("--models", "huge", "large-v2"),
        ("--peers", "whisper.cpp", "faster-whisper-int8"),
        ("--architectures", "sm_60", "sm_90a"),
        ("--dtypes", "float16,int4", "bfloat16"),
    ],
)
def test_an_unknown_name_is_refused_with_those_that_there_are(option, value, known, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main([option, value])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert repr(value.split(",")[-1]) in message
    assert known in message


def test_names_may_be_given_in_any_order(monkeypatch):
    seen = []
    monkeypatch.setattr(command, "_measure", lambda options: seen.append(options) or 0)
    assert command.main(["--scenarios", "start, encoder", "--models", "base,tiny"]) == 0
    assert seen[0].scenarios == ("encoder", "start")
    assert seen[0].models == ("tiny", "base")
