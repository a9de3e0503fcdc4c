"""Between PyTorch tensors and MAX buffers, without copies."""

from __future__ import annotations

import numpy as np
import torch
from max.driver import Buffer


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
