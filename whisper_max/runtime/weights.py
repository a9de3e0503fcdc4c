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

from .. import tensor_numbers
from ..graphs.specification import CROSS_KV, DECODER, ENCODER, PANEL, Parameter
from . import memory
from .engine import Engine
from .tensors import to_buffer

State = Mapping[str, Tensor]

FLOAT16_MAX = 65504.0
_AT_ONCE = 1 << 17
"""Numbers that are looked at together: what is made of them stays in cache."""

# A fused projection and the upstream layers that it is made of.
_FUSED = {"qkv": ("query", "key", "value"), "kv": ("key", "value")}


def exact_in_float16(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is one that float16 holds exactly; they are finite."""
    flat = (tensor.detach().cpu().float().flatten() for tensor in tensors)
    parts = (part for tensor in flat for part in tensor.split(_AT_ONCE))
    plain = (part.resolve_neg().contiguous() for part in parts)
    return all(_exact_in_float16(tensor_numbers.array_of(part)) for part in plain)


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


class Inexact(Exception):
    """float16 would round a weight that must not be rounded."""


def pack_encoder(
    state: State, storage: torch.dtype, engine: Engine, *, exact: bool = False
) -> list[Buffer]:
    """The inputs `specification.ENCODER` of an AudioEncoder's state_dict, in order.

    exact : raise Inexact where float16 would round a weight
    """
    return _pack_all(ENCODER, "encoder", state, storage, engine, exact)


def pack_cross_kv(
    state: State, storage: torch.dtype, engine: Engine, *, exact: bool = False
) -> list[Buffer]:
    """The inputs `specification.CROSS_KV` of a TextDecoder's state_dict; see `pack_encoder`."""
    return _pack_all(CROSS_KV, "decoder", state, storage, engine, exact)


def pack_decoder(
    state: State, storage: torch.dtype, engine: Engine, *, exact: bool = False
) -> list[Buffer]:
    """The inputs `specification.DECODER` of a TextDecoder's state_dict; see `pack_encoder`."""
    return _pack_all(DECODER, "decoder", state, storage, engine, exact)


def reach(state: State) -> tuple[float, float]:
    """How far a TextDecoder's cross attention can carry audio features, see `may_overflow`.

    Returns the largest norm of a row of its key and value matrices, and the largest bias.
    """
    lengths, biases = [], []
    for name in state:
        if name.endswith(".cross_attn.key.weight"):
            for part in _parts(name.replace(".key.weight", ".kv")):
                weight, bias = _linear(part, state)
                lengths.append(weight.norm(dim=1).max().item())
                biases.append(bias.abs().max().item())
    return max(lengths), max(biases)


def may_overflow(reach: tuple[float, float], max_norm: float) -> bool:
    """Whether keys or values of audio features, of this norm at most, may exceed float16.

    A product of two vectors is at most that of their norms (Cauchy-Schwarz). The bundled model
    stays below a hundredth of the limit, and one that does not is PyTorch's: so no more exact
    answer is needed. Rounding to int8 may lengthen either vector, where one number is most of it,
    by sqrt(n_state) / 254: by a seventh, of the largest models.
    """
    row, bias = reach
    return row * max_norm + bias > 0.7 * FLOAT16_MAX


def _pack_all(
    parameters: Iterable[Parameter],
    component: str,
    state: State,
    storage: torch.dtype,
    engine: Engine,
    exact: bool,
) -> list[Buffer]:
    state = {f"{component}.{name}": tensor for name, tensor in state.items()}
    buffers = []
    for parameter in parameters:
        if parameter.kind == "table":
            # Not the user's memory, which may be given back while a decode is open.
            table = state[parameter.name].detach().float()
            buffers.append(to_buffer(table.clone(memory_format=torch.contiguous_format)))
            continue
        names = [parameter.name]
        if parameter.stacked:
            stem, _, name = parameter.name.partition(".blocks.")
            names = [f"{stem}.blocks.{i}.{name}" for i in range(_count_blocks(stem, state))]
        if parameter.kind == "norm":
            parts = _norms(names, state)
        else:
            parts = _linears(names, state, storage, engine, exact)
        buffers += [to_buffer(part if parameter.stacked else part[0]) for part in parts]
    return buffers


def _norms(names: list[str], state: State) -> list[Tensor]:
    """Weights and biases, shape = (layers, n_state)."""
    return [
        torch.stack([state[f"{name}.{part}"].float() for name in names])
        for part in ("weight", "bias")
    ]


def _linears(
    names: list[str], state: State, storage: torch.dtype, engine: Engine, exact: bool
) -> list[Tensor]:
    """Packed weights, (layers, panels, in, 32); scales, (layers, out) or none; biases."""
    layers = [[_linear(part, state) for part in _parts(name)] for name in names]
    biases = torch.stack([torch.cat([bias for _, bias in layer]) for layer in layers])
    matrices = [[weight for weight, _ in layer] for layer in layers]
    out, length = biases.shape[1], matrices[0][0].shape[1]
    packed = memory.empty((len(names), -(-out // PANEL), length, PANEL), storage)
    scaled = out if storage is torch.int8 else 1
    scales = torch.ones((len(names), scaled), dtype=torch.float32, device="cpu")
    if not engine.pack(packed, scales, matrices) and exact:
        raise Inexact
    return [packed, scales, biases]


def _parts(name: str) -> list[str]:
    """The layers of upstream that make up one of ours. Each of several fills whole panels."""
    stem, _, last = name.rpartition(".")
    return [f"{stem}.{part}" for part in _FUSED[last]] if last in _FUSED else [name]


def _linear(name: str, state: State) -> tuple[Tensor, Tensor]:
    """Weight (out, in), contiguous, and bias (out,), float32; a bias that is not there is zero."""
    weight = state[f"{name}.weight"].detach().float().resolve_neg()
    if weight.ndim == 3:  # a convolution, (out, in, 3): the kernels' patches hold tap by tap
        weight = weight.transpose(1, 2).flatten(1)
    bias = state.get(f"{name}.bias")
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().float()
    return weight.contiguous(), bias


def _count_blocks(stem: str, state: State) -> int:
    prefix = f"{stem}.blocks."
    inside = (name[len(prefix) :].split(".") for name in state if name.startswith(prefix))
    return 1 + max(int(number) for number, *of_block in inside if of_block)
