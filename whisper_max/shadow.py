"""Mode "shadow": how two results of the same call differ, if they do."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-3
"""Relative to the largest number of PyTorch's result: far above rounding, far below a fault."""


def tensors_differ(found: Tensor, expected: Tensor) -> str | None:
    """In words, how a tensor differs from what it should be; None where it does not."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype} {tuple(found.shape)} for {expected.dtype} {tuple(expected.shape)}"
    scale = expected.abs().max().item()
    worst = torch.nan_to_num((found - expected).abs(), nan=float("inf")).max().item()
    if worst <= TOLERANCE * scale:
        return None
    return f"by {worst:.3g} at most, where the largest number is {scale:.3g}"
