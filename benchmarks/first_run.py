"""The first run of a script: graphs are compiled beside it, and must not hold it up."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .inputs import FIRST_RUN
from .places import ROOT
from .results import FirstRun
from .worker_process import PeerFailed, environment

AFTER_CHANGE = 20.0  # seconds that the last patched script goes on for


def measure_first_run(
    model: str, threads: int, work: Path, count: int, rounds: int, say: Callable[[str], None]
) -> FirstRun:
    """Runs `first_run_script` plain and patched in turns, each with no compiled graphs yet.

    count : transcriptions in a run, at least one of each recording; the last patched run goes on
        until after the change to MAX

    Raises PeerFailed when a script fails.
    """
    turns = []
    for remaining in reversed(range(rounds)):
        say(f"a script of {count} transcriptions, {model}, plain")
        plain = _run(model, threads, work, count, 0.0, {})
        with tempfile.TemporaryDirectory() as cache:
            say(f"a script of {count} transcriptions, {model}, patched, nothing compiled yet")
            after = 0.0 if remaining else AFTER_CHANGE
            patched = _run(model, threads, work, count, after, {"WHISPER_MAX_CACHE_DIR": cache})
        turns.append((plain, patched))
    # The script repeats its recordings, so later texts are known as well.
    texts = {place % len(FIRST_RUN): line["text"] for place, line in enumerate(turns[0][0])}
    on_max = [line["on_max"] for line in turns[-1][1]]
    return FirstRun(
        model=model,
        plain=[[line["time"] for line in lines] for lines, _ in turns],
        patched=[[line["time"] for line in lines] for _, lines in turns],
        changed=on_max.index(True) if True in on_max else -1,
        identical=all(
            line["text"] == texts[place % len(FIRST_RUN)]
            for turn in turns
            for lines in turn
            for place, line in enumerate(lines)
        ),
    )


def _run(
    model: str, threads: int, work: Path, count: int, after: float, patched: dict[str, str]
) -> list[dict[str, object]]:
    command = [sys.executable, "-m", "benchmarks.first_run_script", str(work), model]
    numbers = map(str, (threads, time.time(), count, after))
    script = subprocess.run(
        [*command, *numbers, *(["patch"] if patched else [])],
        cwd=ROOT,
        env={**environment(threads), **patched},
        capture_output=True,
        text=True,
    )
    if script.returncode:
        raise PeerFailed(f"the script ended with {script.returncode}: {script.stderr.strip()}")
    return [json.loads(line) for line in script.stdout.splitlines()]
