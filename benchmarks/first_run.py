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

AFTER_CHANGE = 20.0  # seconds that the script goes on for


def measure_first_run(
    model: str, threads: int, work: Path, count: int, say: Callable[[str], None]
) -> FirstRun:
    """Runs `first_run_script` plain and then patched, with an empty cache of compiled graphs.

    count : transcriptions in the plain run, at least one of each recording; the patched run goes
        on until after the change to MAX

    Raises PeerFailed when a script fails.
    """
    say(f"a script of {count} transcriptions, {model}, plain")
    plain = _run(model, threads, work, count, {})
    with tempfile.TemporaryDirectory() as cache:
        say(f"a script of {count} transcriptions, {model}, patched, nothing compiled yet")
        patched = _run(model, threads, work, count, {"WHISPER_MAX_CACHE_DIR": cache})
    on_max = [line["on_max"] for line in patched]
    # The script repeats its recordings, so later texts are known as well.
    texts = {place % len(FIRST_RUN): line["text"] for place, line in enumerate(plain)}
    return FirstRun(
        model=model,
        plain=[line["time"] for line in plain],
        patched=[line["time"] for line in patched],
        changed=on_max.index(True) if True in on_max else -1,
        identical=all(
            line["text"] == texts[place % len(FIRST_RUN)] for place, line in enumerate(patched)
        ),
    )


def _run(
    model: str, threads: int, work: Path, count: int, patched: dict[str, str]
) -> list[dict[str, object]]:
    command = [sys.executable, "-m", "benchmarks.first_run_script", str(work), model]
    numbers = map(str, (threads, time.time(), count, AFTER_CHANGE))
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
