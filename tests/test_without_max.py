"""Where MAX is not installed, importing and patching are harmless: PyTorch serves every call.

Run where MAX is installed, too: the programs here run in processes that do not find it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REASON = "MAX is not installed: pip install 'max=="

HIDE_MAX = """
import importlib.metadata, sys
sys.modules["max"] = None  # what an import of it finds where it is not installed
installed_version = importlib.metadata.version
def version(package):
    if package == "max":
        raise importlib.metadata.PackageNotFoundError(package)
    return installed_version(package)
importlib.metadata.version = version
"""

TRANSCRIBE = """
import whisper
from whisper_max import demo
def transcribe():
    model = whisper.load_model(str(demo.CHECKPOINT), device="cpu")
    return model.transcribe(demo.read_wav(demo.RECORDING), fp16=False, word_timestamps=True)
"""


def run_without_max(program: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that finds no MAX, with whisper_max's default settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WHISPER_MAX_")}
    search_path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, search_path))
    return subprocess.run(
        [sys.executable, "-c", HIDE_MAX + program],
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )


@pytest.fixture(scope="module")
def outcome() -> dict:
    """What a script sees that transcribes, patches, transcribes and unpatches."""
    program = """
import json, whisper_max
upstream = whisper.model.AudioEncoder
plain = transcribe()
report = whisper_max.patch()
left_alone = whisper.model.AudioEncoder is upstream
patched = transcribe()
status = whisper_max.status()
whisper_max.unpatch()
print(json.dumps({
    "plain": plain,
    "patched": patched,
    "left_alone": left_alone,
    "patched_targets": report.patched,
    "refused": dict(report.refused),
    "report": str(report),
    "status": status.to_dict(),
    "table": str(status),
}))
"""
    finished = run_without_max(TRANSCRIBE + program)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_transcription_is_upstreams_own(outcome):
    assert outcome["patched"] == outcome["plain"]
    assert outcome["plain"]["text"].strip()
    assert outcome["left_alone"]


def test_report_refuses_every_target_with_the_reason_and_the_remedy(outcome):
    assert outcome["patched_targets"] == []
    assert set(outcome["refused"]) == set(outcome["status"]["targets"])
    for reasons in outcome["refused"].values():
        assert any(reason.startswith(REASON) for reason in reasons)
    assert REASON in outcome["report"]


def test_status_shows_that_nothing_is_patched_and_why(outcome):
    assert outcome["status"]["versions"]["max"] == "not installed"
    for counted in outcome["status"]["targets"].values():
        assert not counted["patched"]
        assert counted["max_calls"] == 0
        assert any(reason.startswith(REASON) for reason in counted["reasons"])
    assert REASON in outcome["table"]


def test_strict_mode_says_so_instead():
    finished = run_without_max("import whisper_max; whisper_max.patch(mode='strict')")
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("whisper_max.conditions.UnsupportedByMax")
    assert REASON in finished.stderr


def test_a_script_runs_unchanged_under_the_launcher():
    program = """
import runpy
code = "import whisper; print(whisper.model.AudioEncoder.__module__, sys.argv[1:])"
sys.argv = ["whisper_max", "-c", "import sys; " + code, "--loud"]
runpy.run_module("whisper_max", run_name="__main__", alter_sys=True)
"""
    finished = run_without_max(program)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "whisper.model ['--loud']\n"
