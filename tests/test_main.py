"""python -m whisper_max: the program sees what python itself would show it."""

from __future__ import annotations

import importlib
import json
import os
import py_compile
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import whisper_max

main = importlib.import_module("whisper_max.__main__")
ROOT = Path(whisper_max.__file__).parents[1]

PROBE = """
import json, sys
module = sys.modules["__main__"]
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path,
    "name": __name__,
    "file": globals().get("__file__"),
    "package": __package__ or None,
    "spec": __spec__ and __spec__.name,
    "loader": str(__loader__).split(" object at ")[0],
    "is main": vars(module) is globals(),
    "names": sorted(globals().keys() - {"__annotations__"}),
}))
"""


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if "WHISPER_MAX" not in name}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def seen_by(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A working folder with the probe as script, in a folder, behind a link, and as module."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "probe.py").write_text(PROBE)
    py_compile.compile(str(tmp_path / "scripts" / "probe.py"), str(tmp_path / "compiled.pyc"))
    (tmp_path / "link.py").symlink_to(tmp_path / "scripts" / "probe.py")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "__main__.py").write_text(PROBE)
    (tmp_path / "package" / "tool.py").write_text(PROBE)
    return tmp_path


@pytest.mark.parametrize(
    "program",
    [
        ["scripts/probe.py"],
        ["scripts/probe.py", "audio.wav", "--mode", "strict", "-m", "x", "--", "--profile"],
        ["link.py", "a"],
        ["compiled.pyc", "a"],
        ["-m", "package"],
        ["-m", "package.tool", "audio.wav", "--model", "tiny", "-c", "--help"],
        ["-c", PROBE],
        ["-c", PROBE, "a", "-m", "--precision", "high"],
    ],
    ids=lambda program: " ".join(argument for argument in program if argument != PROBE),
)
def test_a_program_sees_what_python_shows_it(folder, program):
    expected = seen_by(python(*program, cwd=folder))
    options = ["--mode", "off", "--precision", "highest", "--compile", "cached"]
    assert seen_by(python("-m", "whisper_max", *options, *program, cwd=folder)) == expected


@pytest.mark.skipif(sys.version_info < (3, 11), reason="-P came with Python 3.11")
@pytest.mark.parametrize("program", [["scripts/probe.py"], ["-c", PROBE]], ids=["script", "code"])
def test_safe_path_is_respected(folder, program):
    expected = seen_by(python("-P", *program, cwd=folder))
    command = ["-P", "-m", "whisper_max", "--mode", "off", *program]
    assert seen_by(python(*command, cwd=folder)) == expected


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_a_folder_or_archive_runs_its_main(folder, kind):
    program = "package"
    if kind == "archive":
        program = "program.pyz"
        with zipfile.ZipFile(folder / program, "w") as archive:
            archive.writestr("__main__.py", PROBE)
    expected = seen_by(python(program, "a", cwd=folder))
    seen = seen_by(python("-m", "whisper_max", "--mode", "off", program, "a", cwd=folder))
    assert seen["argv"] == expected["argv"]
    # runpy.run_path() takes the path as it is given.
    assert [os.path.join(folder, seen["path"][0]), *seen["path"][1:]] == expected["path"]


def test_exit_codes_and_errors_are_those_of_the_program(folder):
    run = ["-m", "whisper_max", "--mode", "off"]
    assert python(*run, "-c", "import sys; sys.exit(7)", cwd=folder).returncode == 7
    failed = python(*run, "-c", "raise KeyError('lost')", cwd=folder)
    assert failed.returncode == 1
    assert failed.stderr.rstrip().endswith("KeyError: 'lost'")


def test_profile_prints_the_status_to_stderr_even_after_an_error(folder):
    code = "print('the output'); raise SystemExit(3)"
    done = python("-m", "whisper_max", "--mode", "off", "--profile", "-c", code, cwd=folder)
    assert done.returncode == 3
    assert done.stdout == "the output\n"
    assert done.stderr.startswith("target ")
    assert "\nencoder " in done.stderr


def test_status_is_written_as_json_even_after_an_error(folder):
    run = ["-m", "whisper_max", "--mode", "off", "--status", "status.json"]
    assert python(*run, "-c", "raise SystemExit(3)", cwd=folder).returncode == 3
    written = json.loads((folder / "status.json").read_text())
    assert written["targets"]["encoder"]["max_calls"] == 0


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "the following arguments are required: program"),
        (["no_such_file.py"], {}, "no such file: 'no_such_file.py'"),
        (["--mode", "fast", "x.py"], {}, "invalid choice: 'fast'"),
        (["-c", "1"], {"WHISPER_MAX_MODE": "fast"}, "environment variable WHISPER_MAX_MODE"),
    ],
)
def test_usage_errors_exit_with_2_before_anything_runs(tmp_path, arguments, environment, message):
    done = python("-m", "whisper_max", *arguments, cwd=tmp_path, **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# When whisper is patched


@pytest.fixture
def fake_whisper(monkeypatch, tmp_path):
    """A package called whisper, and everything that main() changes put back at the end."""
    (tmp_path / "whisper").mkdir()
    (tmp_path / "whisper" / "__init__.py").write_text("ready = True\n")
    (tmp_path / "whisper" / "__main__.py").write_text("import whisper; whisper.ran = True\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "whisper"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["python"])
    monkeypatch.setattr(sys, "path", ["the program's place", str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    for variable in ("WHISPER_MAX_MODE", "WHISPER_MAX_PRECISION", "WHISPER_MAX_COMPILE"):
        monkeypatch.delenv(variable, raising=False)
    yield
    sys.modules.pop("whisper", None)


@pytest.fixture
def patches(monkeypatch, fake_whisper) -> list[dict[str, object]]:
    """What main() calls patch() with, and whether whisper was ready."""
    made: list[dict[str, object]] = []

    def patch(**asked):
        made.append({**asked, "ready": sys.modules["whisper"].ready})

    monkeypatch.setattr(main, "patch", patch)
    monkeypatch.setattr(main, "is_patched", lambda: False)
    monkeypatch.setattr(sys, "patches", made, raising=False)
    return made


def test_whisper_is_patched_when_the_program_imports_it_and_not_before(patches):
    code = "import sys; assert not sys.patches; import whisper; assert len(sys.patches) == 1"
    main.main(["--precision", "highest", "--mode", "strict", "-c", code])
    (made,) = patches
    assert made == {"precision": "highest", "mode": "strict", "compile": None, "ready": True}


def test_a_program_without_whisper_pays_nothing(patches):
    main.main(["-c", "pass"])
    assert patches == []
    assert "whisper" not in sys.modules


def test_whisper_itself_can_be_the_program(patches):
    main.main(["-m", "whisper", "audio.wav"])
    assert len(patches) == 1
    assert sys.modules["whisper"].ran


def test_off_does_not_patch(monkeypatch, patches):
    main.main(["--mode", "off", "-c", "import whisper"])
    assert patches == []


def test_a_whisper_that_is_already_patched_is_left_as_it_is(monkeypatch, patches):
    monkeypatch.setattr(main, "is_patched", lambda: True)
    main.main(["-c", "import whisper"])
    assert patches == []


def test_another_package_called_whisper_is_not_the_programs_fault(monkeypatch, fake_whisper):
    monkeypatch.setattr(main, "is_patched", lambda: False)
    with pytest.warns(RuntimeWarning, match="nothing was patched: .* is another one"):
        main.main(["-c", "import whisper; assert whisper.ready"])
