"""Whether an artifact with matrix tiles computes what it should, before anybody uses it.

It is asked in the process that compiled it: nothing is lost if the CPU, the hypervisor or Linux
refuse an instruction and that process ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from max import engine
from torch import Tensor

from ..graphs.specification import HEAD_DIM
from . import hardware
from .compile_worker import ArtifactRefused
from .engine import Engine
from .weights import pack_encoder

# Of an encoder of one block. Lengths that fill no tile, and several blocks of rows and lengths.
N_MELS, FRAMES, HEADS = 5, 230, 2

# The largest error, as a part of the largest number. Many times what rounding makes of it, and a
# small part of what one wrong sum does.
LIMITS = {"float32": 2**-15, "bfloat16": 2**-6, "int8": 2**-5}


def check_tiles(path: Path, options: Mapping) -> None:
    """Run the encoder of a compiled artifact, and compare with PyTorch in float64.

    path : the MEF
    options : those of its key

    Raises ArtifactRefused with the reason.
    """
    if hardware.cpu_level() != "amx":
        raise ArtifactRefused("its tile kernels cannot be checked: Linux grants no tile registers")
    state = _random_state()
    mel = torch.randn(1, N_MELS, 2 * FRAMES, generator=torch.Generator().manual_seed(2))
    graphs = Engine(engine.read(path))
    weights = pack_encoder(state, getattr(torch, options["weight"]), graphs)
    found = graphs.encode(weights, mel)
    exact = _encode({name: tensor.double() for name, tensor in state.items()}, mel.double())
    error = ((found - exact).abs().max() / exact.abs().max()).item()
    limit = LIMITS[options["product"]]
    if not error <= limit:  # nor NaN
        raise ArtifactRefused(
            f"its tile kernels are off by {error:.2g} of the largest number on "
            f"{hardware.cpu_model()}, where {limit:.2g} is the limit"
        )


def _random_state() -> dict[str, Tensor]:
    """The weights of an AudioEncoder, as float16 holds them."""
    n = HEADS * HEAD_DIM
    linear = {
        "conv1": (n, N_MELS, 3),
        "conv2": (n, n, 3),
        **{f"blocks.0.attn.{part}": (n, n) for part in ("query", "key", "value", "out")},
        "blocks.0.mlp.0": (4 * n, n),
        "blocks.0.mlp.2": (n, 4 * n),
    }
    generator = torch.Generator().manual_seed(1)
    state = {"positional_embedding": torch.randn(FRAMES, n, generator=generator)}
    for name, shape in linear.items():
        weight = torch.randn(shape, generator=generator)
        state[f"{name}.weight"] = (weight * weight[0].numel() ** -0.5).half().float()
        if not name.endswith("key"):
            state[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    for name in ("blocks.0.attn_ln", "blocks.0.mlp_ln", "ln_post"):
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(n, generator=generator)
        state[f"{name}.bias"] = torch.randn(n, generator=generator)
    return state


def _encode(state: Mapping[str, Tensor], mel: Tensor) -> Tensor:
    """`AudioEncoder.forward` of openai-whisper's model.py, for one block."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def heads(name: str, x: Tensor) -> Tensor:
        return linear(f"blocks.0.attn.{name}", x).unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)

    x = F.gelu(F.conv1d(mel, state["conv1.weight"], state["conv1.bias"], padding=1))
    x = F.gelu(F.conv1d(x, state["conv2.weight"], state["conv2.bias"], stride=2, padding=1))
    x = x.transpose(1, 2) + state["positional_embedding"]
    y = norm("blocks.0.attn_ln", x)
    attended = F.scaled_dot_product_attention(*(heads(p, y) for p in ("query", "key", "value")))
    x = x + linear("blocks.0.attn.out", attended.transpose(1, 2).flatten(2))
    y = F.gelu(linear("blocks.0.mlp.0", norm("blocks.0.mlp_ln", x)))
    return norm("ln_post", x + linear("blocks.0.mlp.2", y))
