"""Room for large tensors."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from whisper_max.runtime import memory


@pytest.mark.parametrize("shape", [(3, 5), (2, 1024, 1024)], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_room_is_an_ordinary_tensor(shape, dtype):
    room = memory.empty(shape, dtype)
    assert type(room) is torch.Tensor and room.shape == shape and room.dtype is dtype
    assert room.is_contiguous() and room.is_leaf
    room.fill_(3)
    assert bool((room == 3).all())


def test_large_rooms_begin_with_a_huge_page_and_end_with_their_last_tensor():
    def mapped():
        size = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmSize" in x)
        return int(size.split()[1])

    before = mapped()
    room = memory.empty((64, 1024, 1024), torch.float32)
    assert room.data_ptr() % memory.HUGE_PAGE == 0
    part = room[1, 2]
    part.fill_(5)
    del room
    gc.collect()
    assert mapped() > before + 200_000  # KiB
    assert part.tolist() == [5] * 1024
    del part
    gc.collect()
    assert mapped() < before + 50_000


def test_without_huge_pages_room_is_pytorchs(monkeypatch):
    class Refusing(memory.mmap.mmap):
        def madvise(self, *arguments):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Refusing)
    room = memory.empty((2, 1024, 1024), torch.float32)
    assert room.shape == (2, 1024, 1024) and room.untyped_storage().resizable()


def test_too_much_is_pytorchs_error():
    with pytest.raises(RuntimeError, match="memory"):
        memory.empty((1 << 50,), torch.int8)
