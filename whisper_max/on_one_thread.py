"""Looking at and copying a window's tensors on the calling thread alone.

PyTorch hands anything of more than some ten thousand numbers to its own threads. Right after a
graph MAX's are still waiting for work on all CPUs, so that PyTorch's wait for theirs: milliseconds,
where one thread needs a tenth of one. All tensors here are plain ones on the CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


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
    _pytorch.omp_set_num_threads(1)
    # Intel's MKL, of which some functions are, has a number of its own; 0 stands for OpenMP's.
    mkl = getattr(_pytorch, "MKL_Set_Num_Threads_Local", lambda count: 0)
    mkl_before = mkl(1)
    try:
        yield
    finally:
        mkl(mkl_before)
        _pytorch.omp_set_num_threads(before)


_pytorch = ctypes.CDLL(torch._C.__file__)  # and the OpenMP library that PyTorch itself uses


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is infinite or NaN; the tensor is not empty."""
    numbers = _numbers(tensor)
    # Extremes of numbers with a NaN among them are NaN.
    return bool(np.isfinite(numbers.max()) and np.isfinite(numbers.min()))


def copy(tensor: Tensor) -> Tensor:
    """The same numbers in memory of its own."""
    return torch.from_numpy(_numbers(tensor).copy())


def equal(one: Tensor, other: Tensor) -> bool:
    """`torch.equal`."""
    return np.array_equal(_numbers(one), _numbers(other))


def longest_row(tensor: Tensor) -> float:
    """The greatest Euclidean length of a vector along the last axis, in the tensor's precision."""
    numbers = _numbers(tensor)
    return float(np.sqrt(np.einsum("...i,...i->...", numbers, numbers).max()))


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().resolve_neg().numpy()
