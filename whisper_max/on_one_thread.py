"""Looking at and copying a window's tensors on the calling thread alone.

PyTorch hands anything of more than some ten thousand numbers to its own threads. Right after a
graph MAX's are still waiting for work on all CPUs, so that PyTorch's wait for theirs: milliseconds,
where one thread needs a tenth of one. All tensors here are plain ones on the CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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
