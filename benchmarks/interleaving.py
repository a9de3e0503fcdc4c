"""Turns: everybody once, then everybody again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from .peers.interface import Outcome
from .worker_process import PeerFailed

Name = TypeVar("Name")

FEWEST_ROUNDS = 3


def interleave(
    turns: Mapping[Name, Callable[[], Outcome]],
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[dict[Name, list[Outcome]], dict[Name, str]]:
    """Runs the turns in rounds (A B C, A B C, …), each once in each round.

    rounds : how many at most
    seconds : no round starts after this many, once there were `FEWEST_ROUNDS`

    Returns the outcomes of each, one for each round, and why some have none: who fails in one
    round takes part in none.
    """
    outcomes: dict[Name, list[Outcome]] = {name: [] for name in turns}
    failures: dict[Name, str] = {}
    end = clock() + seconds
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and clock() >= end:
            break
        for name in list(outcomes):
            try:
                outcomes[name].append(turns[name]())
            except PeerFailed as failed:
                failures[name] = str(failed)
                del outcomes[name]
    return outcomes, failures
