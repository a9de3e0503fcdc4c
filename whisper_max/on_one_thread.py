"""What PyTorch computes between two steps of MAX, on the calling thread alone.

PyTorch hands anything of more than some ten thousand numbers to its own threads. Right after a
graph MAX's are still waiting for work on all CPUs, so that PyTorch's wait for theirs: milliseconds,
where one thread needs a tenth of one.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


class _Before(threading.local):
    """How many threads PyTorch had in this one before `only_this_thread`; 0 outside of it."""

    count = 0


_before = _Before()


def pytorch_threads() -> int:
    """How many threads PyTorch computes with, as the user has set it, or PyTorch by itself."""
    return _before.count or torch.get_num_threads()


@contextmanager
def only_this_thread() -> Iterator[None]:
    """PyTorch computes on the calling thread alone meanwhile; other threads' calls as ever.

    `torch.set_num_threads` would also hold for threads that begin to compute meanwhile, and for as
    long as they live. Without effect where PyTorch was built without OpenMP.
    """
    before = torch.get_num_threads()  # PyTorch sets a new thread's number when it is asked first
    if before == 1 or not hasattr(_pytorch, "omp_set_num_threads"):
        yield
        return
    # Intel's MKL, of which some functions are, has a number of its own; 0 stands for OpenMP's.
    mkl = getattr(_pytorch, "MKL_Set_Num_Threads_Local", lambda count: 0)
    mkl_before = 0
    try:  # before anything is set: a signal's handler may raise
        _pytorch.omp_set_num_threads(1)
        mkl_before = mkl(1)
        _before.count = before
        yield
    finally:
        if torch.get_num_threads() == 1:  # nobody has set another number meanwhile
            _pytorch.omp_set_num_threads(before)
        _before.count = 0
        mkl(mkl_before)


class _Decode(threading.local):
    """The decode that a thread is in: what ends with it."""

    ends: ExitStack | None = None
    held = False


_decode = _Decode()


@contextmanager
def decode() -> Iterator[None]:
    """Around a decode, inside which `hold` has an effect, and at whose end `release`."""
    outer, outer_held = _decode.ends, _decode.held
    with ExitStack() as ends:
        _decode.ends, _decode.held = ends, False
        try:
            yield
        finally:
            _decode.ends, _decode.held = outer, outer_held


def hold() -> None:
    """MAX and PyTorch take turns now, in somebody else's loop: as `only_this_thread`.

    Without effect outside of `decode`, where nobody would end it.
    """
    if _decode.ends is not None and not _decode.held:
        _decode.held = True
        _decode.ends.enter_context(only_this_thread())


def release() -> None:
    """Ends `hold`."""
    if _decode.held:
        _decode.held = False
        _decode.ends.close()


@contextmanager
def interrupted() -> Iterator[None]:
    """Ends `hold` for a while: somebody else's code runs, which may have much to compute.

    Not for two threads: whisper-timestamped's hooks took a seventh longer with base then.
    """
    held = _decode.held and pytorch_threads() > 2
    if held:
        release()
    try:
        yield
    finally:
        if held:
            hold()


_pytorch = ctypes.CDLL(torch._C.__file__)  # and the OpenMP library that PyTorch itself uses
