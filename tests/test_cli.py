"""`whisper-max AUDIO…`: upstream's own command on MAX, and how it tells what goes wrong."""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import sys
import urllib.request
import wave
from pathlib import Path
from urllib.error import URLError

import pytest

import whisper_max
from whisper_max import demo, report
from whisper_max.cli import OVERVIEW, main
from whisper_max.cli.errors import CommandError
from whisper_max.runtime import loading
from whisper_max.settings import ENVIRONMENT

CHECKPOINT = str(demo.CHECKPOINT)

# As much of ffmpeg as upstream needs for a WAV file that already has the right form.
FFMPEG = f"""#!{sys.executable}
import sys, wave
path = sys.argv[sys.argv.index("-i") + 1]
try:
    with wave.open(path) as recording:
        sys.stdout.buffer.write(recording.readframes(recording.getnframes()))
except (wave.Error, EOFError):
    sys.exit(f"ffmpeg version 6.1\\n  built with gcc\\n{{path}}: Invalid data found\\n")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a recording, and a PATH with nothing but a stand-in for ffmpeg."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "ffmpeg").write_text(FFMPEG)
    (programs / "ffmpeg").chmod(0o700)
    monkeypatch.setenv("PATH", str(programs))
    for name, variable in ENVIRONMENT.items():
        if name != "cache_dir":
            monkeypatch.delenv(variable, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    os.symlink(demo.RECORDING, "speech.wav")
    return tmp_path


@pytest.fixture
def unexpected(monkeypatch) -> None:
    """Loading a model fails the test: what is wrong must be told before."""

    def load_model(*args: object, **options: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("whisper.load_model", load_model)


def transcribe(*arguments: str) -> int:
    strict = ["--mode", "strict", "--compile", "blocking"]
    return main([*arguments, *strict, "--model", CHECKPOINT, "--fp16", "False"])


def contents(folder: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in Path(folder).iterdir()}


# Transcription


def test_files_are_those_of_upstreams_own_command(folder, monkeypatch, capsys):
    options = ["--model", CHECKPOINT, "--fp16", "False", "--word_timestamps", "True"]
    monkeypatch.setattr(sys, "argv", ["whisper", "speech.wav", *options, "-o", "upstream"])
    importlib.import_module("whisper.transcribe").cli()
    spoken = capsys.readouterr().out

    arguments = ["speech.wav", "--word_timestamps", "True", "-o", "max"]
    assert transcribe(*arguments, "--profile", "--status", "status.json") == 0
    found, expected = contents("max"), contents("upstream")
    assert len(found) == 5
    # Probabilities may differ where float32 ends.
    found["speech.json"] = json.loads(found["speech.json"])
    expected["speech.json"] = json.loads(
        expected["speech.json"], parse_float=lambda digits: pytest.approx(float(digits), rel=1e-4)
    )
    assert found == expected
    shown = capsys.readouterr()
    assert shown.out == spoken
    assert "\nalignment      yes " in shown.err
    assert json.loads(Path("status.json").read_text())["targets"]["alignment"]["max_calls"] == 1
    assert not whisper_max.is_patched()


@pytest.mark.allow_fallback
def test_a_run_without_max_says_so_and_why(folder, tmp_path, monkeypatch, capsys):
    report.reset()
    monkeypatch.setenv("WHISPER_MAX_CACHE_DIR", str(tmp_path / "nothing compiled"))
    monkeypatch.setattr(loading, "_engines", {})
    options = ["--compile", "cached", "--model", CHECKPOINT, "--fp16", "False"]
    assert main(["speech.wav", *options]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "PyTorch did" in line]
    assert line.startswith("whisper-max: PyTorch did all the work: the graphs of ")
    assert "are not compiled" in line


def test_one_broken_file_among_others_is_one_line_and_the_exit_code(folder, capsys):
    Path("broken.wav").write_bytes(b"noise")
    with wave.open("mute.wav", "wb") as recording:
        recording.setparams((1, 2, 16000, 0, "NONE", ""))
    files = ["broken.wav", "mute.wav", "speech.wav"]
    assert transcribe(*files, "--verbose", "False", "-o", "out", "-f", "txt") == 2
    assert list(contents("out")) == ["speech.txt"]
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert [line for line in shown.out.splitlines() if "Skipping" in line] == [
        "Skipping broken.wav due to AudioError: ffmpeg cannot read it: "
        "broken.wav: Invalid data found",
        "Skipping mute.wav due to AudioError: it holds no sound",
    ]


def test_a_fault_keeps_its_traceback(folder, monkeypatch, capsys):
    def transcribe_badly(*args: object, **options: object) -> None:
        raise ZeroDivisionError("a fault")

    upstream = importlib.import_module("whisper.transcribe")
    monkeypatch.setattr(upstream, "transcribe", transcribe_badly)
    assert transcribe("speech.wav") == 2
    assert capsys.readouterr().err.rstrip().endswith("ZeroDivisionError: a fault")


def test_upstreams_module_is_left_as_it_was(folder):
    upstream = importlib.import_module("whisper.transcribe")
    names = ("argparse", "transcribe", "traceback")
    before = [getattr(upstream, name) for name in names]
    assert main(["none.wav"]) == 2
    assert [getattr(upstream, name) for name in names] == before
    assert not whisper_max.is_patched()


def test_logging_goes_to_stderr_for_the_command_only(folder, capsys):
    logger = logging.getLogger("whisper_max")
    before = (list(logger.handlers), logger.level)
    command = ["--verbose", "False", "--beam_size", "1", "-f", "txt", "speech.wav"]
    assert transcribe(*command) == 0
    assert "whisper-max:" not in capsys.readouterr().err
    report.reset()  # or the first run would have told it
    assert transcribe("-v", *command) == 0
    assert "whisper-max: encoder runs on MAX\n" in capsys.readouterr().err
    assert (list(logger.handlers), logger.level) == before


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.wav"], "no such file: nothing.wav"),
        (
            ["compil"],
            "no such file: compil (and no command; those are compile, cache, doctor, demo, bench)",
        ),
        (["speech.wav", "empty.wav"], "empty.wav is empty"),
        (["nothing.wav", "empty.wav"], "no such file: nothing.wav; empty.wav is empty"),
        (["folder"], "folder is a folder, not an audio file"),
        (["speech.wav", "--model", "huge"], "'huge' is neither an official model nor a file"),
        (["speech.wav", "--model=speech.wav"], "'speech.wav' is not a whole checkpoint"),
        (["speech.wav", "--device", "cuda"], "--device cuda: PyTorch"),
        (["speech.wav", "--mode", "fast"], "argument --mode: invalid choice: 'fast'"),
        (["speech.wav", "--beams", "5"], "unrecognized arguments: --beams 5"),
        (["--model", CHECKPOINT], "the following arguments are required: audio"),
        (["compile", "huge"], "'huge' is neither an official model nor a file"),
        (["cache", "burn"], "invalid choice: 'burn'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_is_one_line_before_anything_is_loaded(
    folder, unexpected, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    Path("empty.wav").touch()
    Path("folder").mkdir()
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("whisper-max: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1

    assert main([*arguments, "-vv"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_of_somebody_else_is_told(folder, unexpected, capsys):
    Path("private.wav").write_bytes(b"RIFF")
    Path("private.wav").chmod(0)
    assert main(["private.wav"]) == 2
    assert capsys.readouterr().err == (
        "whisper-max: private.wav cannot be read: permission denied\n"
    )


def test_without_ffmpeg_the_command_that_installs_it_is_told(folder, unexpected, capsys):
    (folder / "programs" / "ffmpeg").unlink()
    (folder / "programs" / "brew").touch(mode=0o700)
    assert main(["speech.wav"]) == 2
    assert capsys.readouterr().err == (
        "whisper-max: ffmpeg is not installed; whisper reads audio with it: brew install ffmpeg\n"
    )


def test_addresses_are_left_to_ffmpeg(folder, capsys):
    assert transcribe("https://localhost/speech.mp3") == 2
    assert "due to AudioError: ffmpeg cannot read it: " in capsys.readouterr().out


def test_without_a_network_the_way_out_is_told(folder, monkeypatch, capsys):
    def urlopen(url: str) -> io.BytesIO:
        raise URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert main(["speech.wav", "--model", "tiny", "--model_dir", "models"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("whisper-max: cannot download the model (Name or service not known)")
    assert shown.count("\n") == 1


def test_a_bad_setting_in_the_environment_is_told(folder, unexpected, monkeypatch, capsys):
    monkeypatch.setenv("WHISPER_MAX_PRECISION", "perfect")
    assert main(["speech.wav"]) == 2
    assert "from the environment variable WHISPER_MAX_PRECISION" in capsys.readouterr().err


def test_interrupting_is_no_fault(folder, monkeypatch, capsys):
    def load_model(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("whisper.load_model", load_model)
    assert transcribe("speech.wav") == 130
    assert capsys.readouterr().err == ""


# Help


@pytest.mark.parametrize(
    ("short", "name", "value"),
    [
        ("--comp", "compression_ratio_threshold", 2.0),
        ("--pre", "prepend_punctuations", "2.0"),
        ("--compression", "compression_ratio_threshold", 2.0),
    ],
)
def test_shortened_options_are_whispers(monkeypatch, short, name, value):
    """Ours begin as some of these do."""
    taken = {}

    def begin(stack, ours, theirs):
        taken.update(vars(theirs))
        raise CommandError("that was all")

    monkeypatch.setattr("whisper_max.cli.transcribe._begin", begin)
    main(["speech.wav", short, "2.0"])
    assert taken[name] == value


def test_without_arguments_the_commands_are_listed(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err == OVERVIEW + "\n"


def test_help_has_the_commands_upstreams_options_and_ours(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(OVERVIEW)
    for option in ("word_timestamps", "precision", "mode", "compile", "profile", "status"):
        assert f"  --{option}" in shown


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"whisper-max {whisper_max.__version__}\n"
