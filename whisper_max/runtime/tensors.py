"""Between PyTorch tensors and MAX buffers, without copies."""

from __future__ import annotations

from itertools import accumulate
from math import prod
from struct import Struct

import numpy as np
import torch
from max.driver import Buffer

_ALIGNMENT = 64
"""Bytes, of which the distance between tables is a multiple: none share a cache line."""


def to_buffer(tensor: torch.Tensor) -> Buffer:
    """The tensor's own memory as a MAX buffer; a copy only where it is not contiguous.

    Or where its numbers are the memory's with another sign, of which DLPack does not tell.
    """
    tensor = tensor.detach().resolve_neg().contiguous()
    if not tensor.is_cuda:
        return Buffer.from_dlpack(tensor)
    with torch.cuda.device(tensor.device):  # PyTorch hands out no memory of any other GPU
        return Buffer.from_dlpack(tensor)


def to_torch(buffer: Buffer) -> torch.Tensor:
    """A MAX buffer's own memory as a tensor, which keeps it alive."""
    return torch.from_dlpack(buffer)


def int32(values: list[int] | list[list[int]]) -> Buffer:
    """A small table of integers for the kernels."""
    return Buffer.from_numpy(np.array(values, np.int32))


class Tables:
    """Small tables of numbers that Python and MAX share, all written or read with one call.

    A step of a decode leaves nothing in the CPU's caches, so that little code is fast code there:
    one call of struct's is less than one of NumPy's, and much less than to wrap an array anew.

    tables : dtype, float32 or int32, and shape of each
    """

    def __init__(self, *tables: tuple[type[np.number], tuple[int, ...]]) -> None:
        sizes = [prod(shape) for _, shape in tables]
        ends = list(accumulate(-(-4 * size // _ALIGNMENT) * _ALIGNMENT for size in sizes))
        begins = [0, *ends[:-1]]
        memory = np.zeros(ends[-1], np.uint8)
        self.buffers = [
            Buffer.from_numpy(memory[begin : begin + 4 * size].view(dtype).reshape(shape))
            for (dtype, shape), begin, size in zip(tables, begins, sizes)
        ]
        self._memory = memoryview(memory)
        self._struct = Struct(
            "".join(
                f"{size}{np.dtype(dtype).char}{end - begin - 4 * size}x"
                for (dtype, _), begin, end, size in zip(tables, begins, ends, sizes)
            )
        )

    def write(self, *numbers: float) -> None:
        """Fills the tables, one after the other."""
        self._struct.pack_into(self._memory, 0, *numbers)

    def read(self) -> tuple[float, ...]:
        """What stands in the tables, one after the other."""
        return self._struct.unpack_from(self._memory)
