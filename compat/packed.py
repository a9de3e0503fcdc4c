"""Packed weights as PyTorch makes them: what kernels/packing.mojo is held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from whisper_max.graphs.specification import PANEL

ABSENT = torch.zeros(1)
"""The scale of weights that have none."""

SMALLEST = 1.5e-36
"""Stands for the largest number of a row of zeros."""


def panels(weight: Tensor) -> Tensor:
    """(out, in) -> (panels, in, 32); channels that the last panel lacks are zero."""
    out, length = weight.shape
    padded = weight.new_zeros((PANEL * math.ceil(out / PANEL), length))
    padded[:out] = weight
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale per output channel: (out, in) -> int8 (out, in), (out,)."""
    scale = weight.abs().amax(dim=1).clamp(min=SMALLEST) / 127
    return torch.round(weight / scale[:, None]).to(torch.int8), scale


def stored(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers as they are stored, not packed, and their scales."""
    return quantize(weight) if dtype is torch.int8 else (weight.to(dtype), ABSENT)
