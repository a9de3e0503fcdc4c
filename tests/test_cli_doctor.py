"""`whisper-max doctor`: what it finds, what it advises, and whether its self-check is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import whisper_max
from whisper_max import versions
from whisper_max.audio_encoder import MaxAudioEncoder
from whisper_max.cli import findings, main, selfcheck
from whisper_max.cli.remedies import install_command
from whisper_max.cli.selfcheck import self_check
from whisper_max.conditions import UnsupportedByMax
from whisper_max.runtime import loading

ROOT = Path(whisper_max.__file__).parents[1]
INSTALLED = versions.installed()


def doctor(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """The exit code of `whisper-max doctor --json`, and its findings by topic."""
    code = main(["doctor", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content["healthy"] is (code == 0)
    by_topic: dict[str, list[dict[str, str]]] = {}
    for finding in content["findings"]:
        by_topic.setdefault(finding["topic"], []).append(finding)
    return code, by_topic


def test_doctor_finds_nothing_wrong_where_nothing_is(empty_cache, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    code, found = doctor(capsys)
    assert code == 0
    assert found["ffmpeg"][0]["text"] == "/usr/bin/ffmpeg"
    assert found["graphs"] == [
        {
            "topic": "graphs",
            "state": "note",
            "text": found["graphs"][0]["text"],
            "remedy": "whisper-max compile",
        }
    ]
    assert "are not compiled" in found["graphs"][0]["text"]
    assert not empty_cache.exists()

    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "note     graphs    the graphs of whisper-" in shown
    assert "\n                   -> whisper-max compile\n" in shown + "\n"


def test_doctor_looks_for_the_graphs_of_a_precision(empty_cache, capsys):
    main(["doctor", "--precision", "int8"])
    assert "the graphs of whisper-int8-float16" in capsys.readouterr().out


def test_doctor_names_the_command_for_what_is_missing(empty_cache, monkeypatch, capsys):
    old = {**INSTALLED, "max": "not installed", "torch": "2.1.0"}
    monkeypatch.setattr(versions, "installed", lambda: old)
    monkeypatch.setattr("shutil.which", lambda program: None)
    code, found = doctor(capsys)
    assert code == 1
    assert [finding["remedy"] for finding in found["versions"]] == [
        "",
        "pip install 'max==26.7.*'",
        "pip install --upgrade 'torch>=2.4'",
    ]
    assert found["ffmpeg"][0]["remedy"] == "conda install -c conda-forge ffmpeg"
    assert "graphs" not in found


def test_doctor_tells_a_bad_setting_and_an_unknown_whisper(empty_cache, monkeypatch, capsys):
    monkeypatch.setenv("WHISPER_MAX_MODE", "fast")
    monkeypatch.setattr(versions, "structure_reasons", lambda target: [f"{target} is another"])
    code, found = doctor(capsys)
    assert code == 1
    assert "WHISPER_MAX_MODE" in found["settings"][0]["text"]
    assert found["whisper"][0]["text"] == "encoder stays on PyTorch: encoder is another"
    newest = versions.TESTED_WHISPER[-1]
    assert found["whisper"][0]["remedy"] == f"pip install openai-whisper=={newest}"


def test_doctor_tells_a_refused_cache_folder(empty_cache, capsys):
    empty_cache.mkdir()
    empty_cache.chmod(0o777)
    code, found = doctor(capsys)
    assert code == 1
    (finding,) = found["cache"]
    assert finding["state"] == "problem"
    assert "only you can write to" in finding["remedy"]


@pytest.mark.parametrize(
    ("programs", "user", "command"),
    [
        (["apt-get", "brew"], 1000, "sudo apt-get install ffmpeg"),
        (["apt-get"], 0, "apt-get install ffmpeg"),
        (["pacman"], 0, "pacman -S ffmpeg"),
        (["brew"], 1000, "brew install ffmpeg"),
        ([], 1000, "conda install -c conda-forge ffmpeg"),
    ],
)
def test_remedies_are_those_of_the_system(monkeypatch, programs, user, command):
    monkeypatch.setattr("shutil.which", lambda program: program if program in programs else None)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert install_command("ffmpeg") == command


def test_doctor_runs_where_max_is_not_installed(empty_cache):
    program = """
import importlib.metadata, sys
sys.modules["max"] = None
version = importlib.metadata.version
def without_max(package):
    if package.startswith("max"):
        raise importlib.metadata.PackageNotFoundError(package)
    return version(package)
importlib.metadata.version = without_max
from whisper_max.cli import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert "-> pip install 'max==26.7.*'" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def artifact() -> None:
    """What the self-check runs on."""
    whisper_max.compile()


def test_self_check_passes(artifact):
    checks = self_check("high")
    assert [check.name for check in checks] == [
        "encoder",
        "decoder",
        "greedy decoding",
        "beam search",
    ]
    assert all(check.state == "ok" for check in checks), checks
    assert not whisper_max.is_patched()


@pytest.mark.parametrize("level, has", [("avx512", "no"), ("amx", "yes")])
def test_doctor_tells_whether_there_are_matrix_tiles(monkeypatch, level, has):
    monkeypatch.setattr("whisper_max.runtime.hardware.cpu_level", lambda: level)
    texts = [f.text for f in findings.of_the_machine() if f.topic == "cpu"]
    assert any(text.startswith(f"amx: {has}; ") for text in texts), texts


@pytest.mark.parametrize("exact, other_text", [(("high",), "problem"), ((), "note")])
def test_self_check_finds_a_fault(artifact, monkeypatch, exact, other_text):
    right = MaxAudioEncoder._on_max
    monkeypatch.setattr(MaxAudioEncoder, "_on_max", lambda self, *call: -right(self, *call))
    monkeypatch.setattr(selfcheck, "EXACT_PRECISIONS", exact)
    states = {check.name: check.state for check in self_check("high")}
    assert states == {
        "encoder": "problem",
        "decoder": "ok",
        "greedy decoding": other_text,
        "beam search": other_text,
    }


def test_self_check_compiles_nothing(empty_cache, monkeypatch):
    monkeypatch.setattr(loading, "_engines", {})  # as in a new process
    with pytest.raises(UnsupportedByMax, match="are not compiled"):
        self_check("high")
    assert not empty_cache.exists()
