"""python -m compat.upstream: run upstream's tests unpatched and patched; they must do the same."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from ..ffmpeg import find
from ..matrix.places import FOLDER_VARIABLE, ROOT
from ..matrix.results import Environment, Suite, save
from .source import NoTests, tests_of

SUITE = "upstream's own"
SOURCES = ROOT / ".cache" / "sources"


def main() -> int:
    """Returns pytest's exit status, and 1 where the two runs differ."""
    argparse.ArgumentParser(prog="python -m compat.upstream", description=__doc__).parse_args()
    release = version("openai-whisper")
    try:
        tests = tests_of(release, SOURCES)
    except NoTests as missing:
        reason = f"there are no tests of openai-whisper {release}: {missing}"
        print(reason)
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder:
            save(Environment(SUITE, suites=[Suite(SUITE, skipped={reason: 1})]), Path(folder))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        plain, patched = Path(folder, "plain.json"), Path(folder, "patched.json")
        _pytest(tests, folder, plain)
        status = _pytest(tests, folder, patched, "--patched", "-p", "compat.matrix.recording")
        differing = _differences(*(json.loads(path.read_text()) for path in (plain, patched)))
    for line in differing:
        print(line)
    return status or int(bool(differing))


def _pytest(tests: Path, folder: str, outcomes: Path, *options: str) -> int:
    command = [sys.executable, "-m", "pytest", "-vv", "--tb=short", "--no-header"]
    command += ["-c", os.devnull, "--rootdir", str(tests), "-p", "no:cacheprovider"]
    command += ["-p", "compat.upstream.plugin", "--outcomes", str(outcomes), *options]
    if "--patched" in options:
        command += ["--suite", SUITE]
    environment = {**os.environ, "PATH": find(Path(folder)) or os.environ["PATH"]}
    return subprocess.run([*command, str(tests)], cwd=ROOT, env=environment).returncode


def _differences(plain: dict, patched: dict) -> list[str]:
    """Where a test came out otherwise, or failed with another message, such as another text."""
    return [
        f"{case}: unpatched {plain.get(case)}, patched {patched.get(case)}"
        for case in sorted({*plain, *patched})
        if plain.get(case) != patched.get(case)
    ]


if __name__ == "__main__":
    sys.exit(main())
