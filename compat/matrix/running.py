"""Run environments of tox.ini one by one, and keep what each found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from benchmarks.machine import digest_of_sources

from .places import FOLDER_VARIABLE, LOGS, ROOT
from .results import Environment, load_all

TOX_ENDS = re.compile(r"evaluation failed :\(|: FAIL |: exit \d")
TOX = [sys.executable, "-m", "tox", "--colored", "no"]


def environments() -> list[str]:
    """The default environments of tox.ini, in its order."""
    listed = subprocess.run(
        [*TOX, "list", "-q", "-d", "--no-desc"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [line for line in listed.stdout.splitlines() if re.fullmatch(r"[\w-]+", line)]


def run(name: str) -> Environment:
    """Runs an environment; its output goes to a log, what it found is returned."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    with tempfile.TemporaryDirectory() as folder, log.open("w", encoding="utf-8") as output:
        status = subprocess.run(
            [*TOX, "run", "-e", name],
            cwd=ROOT,
            env={**os.environ, FOLDER_VARIABLE: folder},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        ).returncode
        sessions = list(load_all(Path(folder)).values())
    text = log.read_text(encoding="utf-8", errors="replace")
    return combined(name, sessions, status, text)


def combined(name: str, sessions: list[Environment], status: int, text: str) -> Environment:
    """One environment's result from its sessions, tox's exit status and its output."""
    skipped = re.search(r"skipped because (.*)", text)
    if skipped and not sessions:
        return Environment(name, recorded=date.today().isoformat(), absent=skipped[1].strip())
    result = Environment(name, recorded=date.today().isoformat(), sources=digest_of_sources())
    for session in sessions:
        if session.versions:  # not where a session could not begin
            result.versions, result.patched = session.versions, session.patched
            result.refused = session.refused
        result.suites += session.suites
    if status and not result.failed:
        said = [line for line in text.splitlines() if line.strip() and not TOX_ENDS.search(line)]
        result.error = said[-1] if said else f"tox ended with status {status}"
    return result
