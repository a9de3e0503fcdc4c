"""Memory for large tensors, in huge pages."""

from __future__ import annotations

import gc
import mmap
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from whisper_max.runtime import memory


HUGE, COLLAPSE = mmap.MADV_HUGEPAGE, 25
PAGE = memory.HUGE_PAGE


class Mapped(mmap.mmap):
    """Notes what is advised, from its first huge page on, and is as slow as it is told to be."""

    knows_collapse = True
    pauses: ClassVar[list[float]] = []
    advised: ClassVar[list[tuple[int, ...]]] = []

    def madvise(self, advice, *extent):
        if advice == COLLAPSE and not Mapped.knows_collapse:
            raise OSError(22, "Invalid argument")
        if extent != (0, 0):
            Mapped.advised.append((advice, *(part // PAGE for part in extent)))
        super().madvise(advice, *extent)

    def __setitem__(self, place, value):
        time.sleep(Mapped.pauses.pop(0) if Mapped.pauses else 0)
        super().__setitem__(place, value)


@pytest.fixture
def mapped(monkeypatch):
    """Memory of this test's own, whose pages come at once but for the pauses that it asks for."""
    monkeypatch.setattr(mmap, "mmap", Mapped)
    monkeypatch.setattr(memory, "huge_pages", memory.HugePages())
    monkeypatch.setattr(memory, "SLOW", 0.2)
    monkeypatch.setattr(Mapped, "knows_collapse", True)
    Mapped.pauses.clear()
    Mapped.advised.clear()
    return Mapped


def pages_of(advised, advice):
    return [extent for found, *extent in advised if found == advice]


def windows(count, seconds=3600):
    """As many windows, with this time before each."""
    for _ in range(count):
        memory.huge_pages._window_began -= seconds
        memory.huge_pages.begin_window()


@pytest.mark.parametrize("shape", [(3, 5), (2, 1024, 1024)], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_it_is_an_ordinary_tensor(shape, dtype):
    tensor = memory.empty(shape, dtype)
    assert type(tensor) is torch.Tensor and tensor.shape == shape and tensor.dtype is dtype
    assert tensor.is_contiguous() and tensor.is_leaf
    tensor.fill_(3)
    assert bool((tensor == 3).all())


def test_large_tensors_begin_with_a_huge_page_and_end_with_their_last_tensor():
    def mapped():
        size = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmSize" in x)
        return int(size.split()[1])

    gc.collect()  # what other tests left
    before = mapped()
    tensor = memory.empty((64, 1024, 1024), torch.float32)
    assert tensor.data_ptr() % memory.HUGE_PAGE == 0
    part = tensor[1, 2]
    part.fill_(5)
    del tensor
    gc.collect()
    assert mapped() > before + 200_000  # KiB
    assert part.tolist() == [5] * 1024
    del part
    gc.collect()
    assert mapped() < before + 50_000


def test_without_huge_pages_memory_is_pytorchs(monkeypatch):
    class Refusing(memory.mmap.mmap):
        def madvise(self, *arguments):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Refusing)
    tensor = memory.empty((2, 1024, 1024), torch.float32)
    assert tensor.shape == (2, 1024, 1024) and tensor.untyped_storage().resizable()


def time_is_over(*args):
    raise TimeoutError("time is over")


@pytest.mark.parametrize("where", ["__setitem__", "madvise"])
def test_what_a_signal_handler_raises_is_the_programs(mapped, monkeypatch, where):
    """`TimeoutError` is an error of the system's class, and none of the system's."""
    monkeypatch.setattr(mapped, where, time_is_over)
    with pytest.raises(TimeoutError, match="time is over"):
        three_pages()


def test_what_a_signal_handler_raises_while_pages_are_joined(mapped, monkeypatch):
    mapped.pauses += [0, 0.25]
    tensor = three_pages()
    monkeypatch.setattr(mapped, "madvise", time_is_over)
    with pytest.raises(TimeoutError, match="time is over"):
        windows(1)
    del tensor


def test_memory_that_is_not_written_is_not_taken():
    """Also where PyTorch fills what it has not been told the numbers of."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    torch.use_deterministic_algorithms(True)
    try:
        before = resident()
        tensor = memory.untouched((64, 1024, 1024), torch.float32)
        assert resident() < before + (16 << 20)
    finally:
        torch.use_deterministic_algorithms(False)
    assert type(tensor) is torch.Tensor and tensor.shape == (64, 1024, 1024)
    tensor[3, 4, 5] = 6.0
    assert tensor[3, 4].sum() == 6.0


def test_too_much_is_pytorchs_error():
    with pytest.raises(RuntimeError, match="memory"):
        memory.empty((1 << 50,), torch.int8)


def three_pages():
    return memory.empty((3, PAGE), torch.int8)


def test_huge_pages_that_come_quickly_are_taken_at_once(mapped):
    tensor = three_pages()
    first, second, third, whole = pages_of(mapped.advised, HUGE)
    assert second[0] == first[0] + 1 and third[0] == first[0] + 2 and whole == []
    windows(2)
    assert not pages_of(mapped.advised, COLLAPSE)
    del tensor


def test_from_a_slow_huge_page_on_pages_are_small_and_joined_later(mapped):
    mapped.pauses += [0, 0.25]
    first = three_pages()
    assert len(pages_of(mapped.advised, HUGE)) == 2
    second = three_pages()
    assert len(pages_of(mapped.advised, HUGE)) == 2
    first.fill_(1), second.fill_(2)
    assert not pages_of(mapped.advised, COLLAPSE)
    windows(1)
    joined = pages_of(mapped.advised, COLLAPSE)
    assert len(joined) == 6 and all(pages == 1 for _, pages in joined)
    assert bool((first == 1).all()) and bool((second == 2).all())
    windows(1)
    assert len(pages_of(mapped.advised, COLLAPSE)) == 6
    third = three_pages()  # and huge ones are tried again
    assert len(pages_of(mapped.advised, HUGE)) == 2 + 4
    del third


def test_joining_takes_no_more_than_its_share_of_the_time(mapped, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(memory.time, "perf_counter", lambda: clock[0])

    def join(mapping, page):
        joined.append(page)
        clock[0] += 0.1

    joined = []
    monkeypatch.setattr(memory, "_join", join)
    monkeypatch.setattr(memory, "_come_quickly", lambda mapping, pages: False)
    pages = memory.HugePages()
    tensor = pages.allocate(200 * PAGE)
    pages.begin_window()
    assert not joined
    for _ in range(64):
        clock[0] += 1.0
        pages.begin_window()
    spent, passed = 0.1 * len(joined), clock[0] - 100
    assert memory.SHARE * passed <= spent <= memory.SHARE * passed + 0.1
    assert joined == sorted(joined, reverse=True)  # the youngest first

    clock[0] += 3600.0  # of which nobody waits for a share
    before = len(joined)
    pages.begin_window()
    assert 0.1 * (len(joined) - before) <= memory.SHARE * memory.LONGEST + 0.1
    del tensor


def test_windows_of_several_threads_join_pages_once(mapped):
    mapped.pauses += [0.25]
    tensor = three_pages()
    barrier, done = threading.Barrier(8), []

    def decode():
        barrier.wait()
        windows(200)
        done.append(1)

    threads = [threading.Thread(target=decode) for _ in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(done) == 8 and len(pages_of(mapped.advised, COLLAPSE)) == 3
    del tensor


def test_memory_that_is_no_longer_needed_is_not_joined(mapped):
    mapped.pauses += [0.25]
    first, second = three_pages(), three_pages()
    del first
    gc.collect()
    windows(1)
    assert len(pages_of(mapped.advised, COLLAPSE)) == 3
    del second


def test_pages_that_cannot_be_joined_stay_small(mapped):
    mapped.pauses += [0.25]
    tensor = three_pages().fill_(5)
    mapped.knows_collapse = False
    windows(1)
    assert bool((tensor == 5).all())


def test_where_pages_cannot_be_joined_later_they_are_huge_at_once(mapped):
    mapped.knows_collapse = False
    mapped.pauses += [0.25]
    tensor = three_pages()
    assert mapped.advised == [(HUGE,)] and mapped.pauses == [0.25]
    del tensor
