"""Peers in fresh processes: how soon the first window is done, and how much memory it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

from .peers import Entry
from .peers.interface import NotOffered
from .results import NOT_OFFERED, Start
from .scenarios import SCENARIO, Scenario
from .worker_process import PeerFailed, WorkerProcess


def measure_starts(
    entries: Iterable[Entry],
    model: str,
    threads: int,
    work: Path,
    rounds: int,
    window: Scenario,
    say: Callable[[str], None],
) -> list[Start]:
    """Each peer in turn in a process of its own, `rounds` times; what is compiled stays compiled.

    window : the scenario whose operation is run twice in each process
    """
    starts = {entry: Start(model, entry.name) for entry in entries if entry.fresh}
    for _ in range(rounds):
        for entry, start in starts.items():
            if start.missing:
                continue
            say(f"{entry.label} in a fresh process, {model}")
            try:
                _start_once(entry, start, threads, work, window)
            except NotOffered as reason:
                start.missing = f"{NOT_OFFERED}: {reason}"
            except PeerFailed as failed:
                start.missing = f"failed: {failed}"
    return list(starts.values())


def without_warm_up(scenario: Scenario) -> Scenario:
    """The same, measured from the first run on."""
    return dataclasses.replace(scenario, warm_up=None)


def first_window() -> Scenario:
    """What a fresh process does."""
    return without_warm_up(SCENARIO["window"])


def _start_once(entry: Entry, start: Start, threads: int, work: Path, window: Scenario) -> None:
    worker = WorkerProcess(entry, start.model, threads, work)
    try:
        worker.prepare(window)
        first, second = worker.run().seconds, worker.run().seconds
        start.ready.append(round(worker.start_seconds, 4))
        start.loaded_mib.append(round(worker.loaded_mib, 1))
        start.first.append(round(first, 6))
        start.second.append(round(second, 6))
        start.peak_mib.append(round(worker.usage()["peak_mib"], 1))
    finally:
        worker.close()
