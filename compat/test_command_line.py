"""`python -m whisper_max -m whisper audio …` writes the files that `whisper audio …` writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ffmpeg
from recordings import FOLDER, assert_same_result
from whisper_max import demo

FORMATS = ("json", "srt", "tsv", "txt", "vtt")


def whisper(folder: Path, tmp_path: Path, *options: str, launcher: tuple[str, ...] = ()) -> str:
    """Transcribe a recording with every format into `folder`; return what is shown."""
    command = [sys.executable, *launcher, "-m", "whisper", str(FOLDER / "en03.flac")]
    command += ["--model", str(demo.CHECKPOINT), "--device", "cpu", "--fp16", "False"]
    command += ["--output_dir", str(folder), "--output_format", "all", *options]
    done = subprocess.run(
        command, env=ffmpeg.environment(tmp_path), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--word_timestamps", "True", "--highlight_words", "True", "--max_line_width", "30"),
    ],
    ids=["plain", "words"],
)
def test_all_five_formats(tmp_path, options):
    status = tmp_path / "status.json"
    launcher = ("-m", "whisper_max", "--mode", "strict", "--compile", "blocking")
    launcher += ("--status", str(status))
    shown = whisper(tmp_path / "plain", tmp_path, *options)
    assert whisper(tmp_path / "ours", tmp_path, *options, launcher=launcher) == shown
    for ending in FORMATS:
        files = [tmp_path / who / f"en03.{ending}" for who in ("ours", "plain")]
        ours, theirs = (file.read_text(encoding="utf-8") for file in files)
        if ending == "json":  # it has probabilities, to the last digit
            assert_same_result(json.loads(ours), json.loads(theirs))
        else:
            assert ours == theirs
    targets = json.loads(status.read_text())["targets"]
    assert targets["encoder"]["max_calls"] > 0
    assert not any(counted["torch_calls"] for counted in targets.values())
