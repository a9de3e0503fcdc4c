"""What is asked of a tensor's numbers around MAX's graphs, on the calling thread alone."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from .on_one_thread import only_this_thread


def all_below(limit: float, tensor: Tensor) -> bool:
    """Whether no number is NaN, or larger in magnitude; the tensor is not empty."""
    with only_this_thread():
        return all_below_on_any(limit, tensor)


def all_below_on_any(limit: float, tensor: Tensor) -> bool:
    """The same on all of PyTorch's threads: for weights, which are many and looked at once."""
    # Extremes of numbers with a NaN among them are NaN, which is below nothing.
    # Not in half precision, where a limit beyond its numbers is infinite, too.
    return all(abs(extreme.item()) <= limit for extreme in tensor.detach().aminmax())


def copy(tensor: Tensor) -> Tensor:
    """The same numbers in memory of its own."""
    with only_this_thread():
        return tensor.detach().clone(memory_format=torch.contiguous_format)


def equal(one: Tensor, other: Tensor) -> bool:
    """`torch.equal`; on the CPU NumPy's, which is five times as fast on one thread."""
    if not (_is_plain(one) and _is_plain(other)):
        with only_this_thread():
            return torch.equal(one, other)
    if one.shape != other.shape:
        return False
    arrays = [array_of(tensor) for tensor in (one, other)]
    # What differs does so near the beginning mostly, and to look through all takes time.
    return np.array_equal(*(array[:1000] for array in arrays)) and np.array_equal(*arrays)


def _is_plain(tensor: Tensor) -> bool:
    """Whether these are float32 numbers one after the other, as they stand in the CPU's memory."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype is torch.float32
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and tensor.data_ptr() != 0
    )


def array_of(tensor: Tensor) -> np.ndarray:
    """The numbers of a contiguous float32 tensor, shape = (numel,), in its own memory.

    Not `tensor.numpy()`: PyTorch never again changes the size of memory that NumPy has seen, and
    that may be a buffer which its owner fills anew.
    """
    if tensor.numel() == 0:
        return np.empty(0, np.float32)
    memory = (ctypes.c_float * tensor.numel()).from_address(tensor.data_ptr())
    memory.owner = tensor  # which lives as long as the array
    return np.frombuffer(memory, np.float32)
