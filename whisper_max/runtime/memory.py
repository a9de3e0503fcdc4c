"""Memory for large tensors that are read from one end to the other, again and again."""

from __future__ import annotations

import math
import mmap
import threading
import time
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ..report import is_of_the_system

LARGE = 4 << 20
"""Bytes; below, a share of a huge page would be wasted."""
HUGE_PAGE = 2 << 20
"""Bytes, on x86-64 and mostly on aarch64."""
SLOW = 0.002
"""Seconds to get a huge page. Clearing it takes a tenth of that, its 512 small pages one half."""
SHARE = 1 / 32
"""Of a program's time, spent at most on joining small pages."""
LONGEST = 10.0
"""Seconds from one window to the next that count for that: a service may have had nothing to do."""

_MADV_COLLAPSE = 25  # Linux 6.1; a name in `mmap` from Python 3.13


class HugePages:
    """Huge pages at once where they come quickly, and later where they do not.

    A decoding step reads each page of the weights once, and the translation of a small page costs
    as much as its transfer: with huge pages a step takes 3 to 20% less, by CPU. But a huge page may
    take milliseconds to come: the system moves others out of the way, or the host of a virtual
    machine has to find the memory first, having taken back what was free. A program of some windows
    would wait longer for its huge pages than they save. So, from the first slow one on, memory
    consists of small pages, which are joined in a fixed share of the time that goes by.
    """

    def __init__(self) -> None:
        self._guard = threading.RLock()
        self._small: list[tuple[weakref.ref[mmap.mmap], int]] = []
        self._window_began = 0.0
        self._credit = 0.0  # seconds

    def allocate(self, size: int) -> Tensor:
        """Uninitialized bytes, shape = (size,). Raises OSError where the system gives none."""
        # It lives as long as a tensor in it.
        mapping = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = torch.frombuffer(mapping, dtype=torch.uint8)
        begin = -whole.data_ptr() % HUGE_PAGE
        pages = range(begin, begin + size, HUGE_PAGE)
        if not _can_join(mapping):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        else:
            with self._guard:
                if self._small or not _come_quickly(mapping, pages):
                    if not self._small:
                        self._window_began, self._credit = time.perf_counter(), 0.0
                    self._small.extend((weakref.ref(mapping), page) for page in pages)
        return whole[begin : begin + size]

    def begin_window(self) -> None:
        """Another window is about to be decoded; some pages are joined first."""
        with self._guard:
            if not self._small:
                return
            now = time.perf_counter()
            self._credit += SHARE * min(now - self._window_began, LONGEST)
            self._window_began = now
            while self._credit > 0 and self._small:
                # The youngest first: the decoder's are, and an encoder's are read once a window.
                reference, page = self._small.pop()
                mapping = reference()
                if mapping is not None:
                    begin = time.perf_counter()
                    _join(mapping, page)
                    self._credit -= time.perf_counter() - begin


def _can_join(mapping: mmap.mmap) -> bool:
    try:
        mapping.madvise(_MADV_COLLAPSE, 0, 0)  # of nothing
    except OSError as error:
        if not is_of_the_system(error):
            raise
        return False
    return True


def _come_quickly(mapping: mmap.mmap, pages: range) -> bool:
    """Takes huge pages, one by one, up to the first that is slow to come."""
    for page in pages:
        mapping.madvise(mmap.MADV_HUGEPAGE, page, HUGE_PAGE)
        begin = time.perf_counter()
        mapping[page] = 0
        if time.perf_counter() - begin > SLOW:
            return False
    mapping.madvise(mmap.MADV_HUGEPAGE)
    return True


def _join(mapping: mmap.mmap, page: int) -> None:
    """Moves small pages into a huge one, if the system can. Who reads them does not notice."""
    try:
        mapping.madvise(_MADV_COLLAPSE, page, HUGE_PAGE)
    except OSError as error:
        if not is_of_the_system(error):
            raise


huge_pages = HugePages()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor on the CPU, in `huge_pages` if it is large and there are any."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        tensor = huge_pages.allocate(size)
    except OSError as error:
        if not is_of_the_system(error):
            raise
        # No more memory, or a kernel without huge pages: PyTorch's way, and its error.
        return torch.empty(shape, dtype=dtype, device="cpu")
    return tensor.view(dtype).view(*shape)


def untouched(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor on the CPU of which memory is taken only where it is written.

    `torch.empty` writes to all of it, where PyTorch is told to be deterministic.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return torch.empty(shape, dtype=dtype, device="cpu")
    size = math.prod(shape) * dtype.itemsize
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(mapping, dtype=dtype).view(*shape)
