"""Keeping a thread of MAX's from waking up thousands of times a second.

The first execution in a process starts a thread that waits, a tenth of a millisecond at a time, for
as long as the process lives. Each time it takes a CPU from a thread that computes: 10 to 17% of a
decoding step on two CPUs. New threads inherit the tolerance of their timers from their creator.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TOLERANCE = 50_000_000
"""Nanoseconds: twenty times a second instead of six thousand."""

_PR_SET_TIMERSLACK, _PR_GET_TIMERSLACK = 29, 30
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


@contextmanager
def inherited_timer_slack(nanoseconds: int = TOLERANCE) -> Iterator[None]:
    """Threads that this one starts meanwhile may be woken that much late by their timers (Linux).

    So may this thread itself, until the end. A wake-up by another thread is not delayed.
    """
    before = _libc.prctl(_PR_GET_TIMERSLACK, 0, 0, 0, 0) if _libc is not None else 0
    if before <= 0:  # not Linux, refused, or a real-time thread, which has none
        yield
        return
    _set(nanoseconds)
    try:
        yield
    finally:
        _set(before)


def _set(nanoseconds: int) -> None:
    _libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(nanoseconds), 0, 0, 0)
