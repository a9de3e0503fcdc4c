"""Trained weights in the form that the kernels read, made once per model.

A linear layer's matrix (out, in) becomes panels of 32 output channels, (panels, in, 32), so that a
kernel reads one stream. The layers of all blocks are stacked. Official checkpoints hold float16
numbers that openai-whisper widens to float32: keeping them in float16 loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from max.driver import Buffer
from torch import Tensor

from .. import on_one_thread
from ..graphs.specification import CROSS_KV, DECODER, ENCODER, PANEL, Parameter
from . import memory
from .tensors import to_buffer

State = Mapping[str, Tensor]

ABSENT = torch.zeros(1, dtype=torch.float32, device="cpu")
"""The scale of weights that have none."""

FLOAT16_MAX = 65504.0
_AT_ONCE = 1 << 17
"""Numbers that are looked at or packed together: what is made of them stays in cache."""

# A fused projection and the upstream layers that it is made of.
_FUSED = {"qkv": ("query", "key", "value"), "kv": ("key", "value")}


def exact_in_float16(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is one that float16 holds exactly; they are finite."""
    flat = (tensor.detach().cpu().float().flatten() for tensor in tensors)
    parts = (part for tensor in flat for part in tensor.split(_AT_ONCE))
    return all(_exact_in_float16(part.resolve_neg().numpy()) for part in parts)


def _exact_in_float16(numbers: np.ndarray) -> bool:
    """By their bits, which takes a fraction of the time of converting them there and back."""
    bits = numbers.view(np.uint32)
    if np.bitwise_or.reduce(bits) & 0x1FFF:  # of 23 bits behind the point, float16 has the first 10
        return False
    magnitudes = np.abs(numbers)
    if magnitudes.max(initial=0) > FLOAT16_MAX:
        return False
    # Below its normal numbers float16 has multiples of one step.
    small = numbers[magnitudes < 2.0**-14] * np.float32(2.0**24)
    return np.array_equal(small, np.rint(small))


def matrices(state: State) -> Iterable[Tensor]:
    """The tensors of a state_dict that are held packed: all matrices and convolutions."""
    others = ("positional_embedding", "mask")
    return (tensor for name, tensor in state.items() if tensor.ndim >= 2 and name not in others)


def pack_encoder(state: State, storage: torch.dtype) -> list[Buffer]:
    """The inputs `specification.ENCODER` of an AudioEncoder's state_dict, in order."""
    state = {f"encoder.{name}": tensor for name, tensor in state.items()}
    return [buffer for parameter in ENCODER for buffer in _pack(parameter, state, storage)]


def pack_cross_kv(state: State, storage: torch.dtype) -> list[Buffer]:
    """The inputs `specification.CROSS_KV` of a TextDecoder's state_dict, in order."""
    state = {f"decoder.{name}": tensor for name, tensor in state.items()}
    return [buffer for parameter in CROSS_KV for buffer in _pack(parameter, state, storage)]


def pack_decoder(state: State, storage: torch.dtype) -> list[Buffer]:
    """The inputs `specification.DECODER` of a TextDecoder's state_dict, in order."""
    state = {f"decoder.{name}": tensor for name, tensor in state.items()}
    return [buffer for parameter in DECODER for buffer in _pack(parameter, state, storage)]


def reach(state: State) -> tuple[float, float]:
    """How far a TextDecoder's cross attention can carry audio features, see `may_overflow`.

    Returns the length of the longest row of its key and value matrices, and the largest bias.
    """
    lengths, biases = [], []
    for name in state:
        if name.endswith(".cross_attn.key.weight"):
            weight, bias = _linear(name.replace(".key.weight", ".kv"), state)
            lengths.append(weight.norm(dim=1).max().item())
            biases.append(bias.abs().max().item())
    return max(lengths), max(biases)


def may_overflow(reach: tuple[float, float], features: Tensor) -> bool:
    """Whether keys or values of these features may exceed float16.

    A product of two vectors is at most that of their lengths (Cauchy-Schwarz). Trained models stay
    below a hundredth of the limit, so that no more exact answer is needed.
    """
    longest, bias = reach
    return longest * on_one_thread.longest_row(features) + bias > 0.98 * FLOAT16_MAX


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale per output channel: (out, in) -> int8 (out, in), (out,)."""
    scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return torch.round(weight / scale[:, None]).to(torch.int8), scale


def _pack(parameter: Parameter, state: State, storage: torch.dtype) -> list[Buffer]:
    if parameter.kind == "table":
        return [to_buffer(state[parameter.name].float())]
    names = [parameter.name]
    if parameter.stacked:
        stem, _, name = parameter.name.partition(".blocks.")
        names = [f"{stem}.blocks.{i}.{name}" for i in range(_count_blocks(stem, state))]
    parts = (_norms if parameter.kind == "norm" else _linears)(names, state, storage)
    return [to_buffer(part if parameter.stacked else part[0]) for part in parts]


def _norms(names: list[str], state: State, storage: torch.dtype) -> list[Tensor]:
    """Weights and biases, shape = (layers, n_state)."""
    return [
        torch.stack([state[f"{name}.{part}"].float() for name in names])
        for part in ("weight", "bias")
    ]


def _linears(names: list[str], state: State, storage: torch.dtype) -> list[Tensor]:
    """Packed weights, (layers, panels, in, 32); scales, (layers, out) or none; biases."""
    biases: list[Tensor] = []
    for i, name in enumerate(names):
        weight, bias = _linear(name, state)
        out, length = weight.shape
        if not biases:
            packed = memory.empty((len(names), -(-out // PANEL), length, PANEL), storage)
            scales = weight.new_empty((len(names), out if storage is torch.int8 else 1))
        biases.append(bias)
        rows = PANEL * max(1, _AT_ONCE // (PANEL * length))
        for begin in range(0, out, rows):  # without a second copy of all, a little at a time
            part = weight[begin : begin + rows]
            if storage is torch.int8:
                part, scales[i, begin : begin + rows] = quantize(part)
            fill_panels(packed[i, begin // PANEL : (begin + rows) // PANEL], part)
    if storage is not torch.int8:
        scales[:] = ABSENT
    return [packed, scales, torch.stack(biases)]


def fill_panels(packed: Tensor, weight: Tensor) -> None:
    """Writes (out, in) into (panels, in, 32)."""
    out, length = weight.shape
    weight = weight.to(packed.dtype)  # while a row's numbers still lie together: half the time
    whole, rest = divmod(out, PANEL)
    packed[:whole] = weight[: whole * PANEL].view(whole, PANEL, length).transpose(1, 2)
    if rest:
        packed[whole, :, :rest] = weight[whole * PANEL :].T
        packed[whole, :, rest:] = 0


def _linear(name: str, state: State) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) of a layer in float32; a bias that is not there is zero."""
    stem, _, last = name.rpartition(".")
    if last in _FUSED:
        pairs = [_linear(f"{stem}.{part}", state) for part in _FUSED[last]]
        return torch.cat([w for w, _ in pairs]), torch.cat([b for _, b in pairs])
    weight = state[f"{name}.weight"].detach().float()
    if weight.ndim == 3:  # a convolution, (out, in, 3): the kernels' patches hold tap by tap
        weight = weight.transpose(1, 2).flatten(1)
    bias = state.get(f"{name}.bias")
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().float()


def _count_blocks(stem: str, state: State) -> int:
    prefix = f"{stem}.blocks."
    return 1 + max(int(n[len(prefix) :].split(".")[0]) for n in state if n.startswith(prefix))
