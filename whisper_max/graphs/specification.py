"""What the graphs take: one table of weights per component, and the storage of a precision.

No dimension is static. The number of layers, the widths, the vocabulary and the lengths are read
from the operands at run time, so one artifact serves every model size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Literal

from max.dtype import DType
from max.graph import DeviceRef, TensorType

PANEL = 32
"""Output channels in one packed panel, as in kernels/gemm.mojo."""

MASKED = -3.0e38
"""The score of a token or key that is left out, as in kernels/softmax.mojo."""

HEAD_DIM = 64
"""The head size of every Whisper model, and the only one the kernels know."""

Kind = Literal["linear", "norm", "table"]


@dataclass(frozen=True)
class Parameter:
    """One layer's parameters, stacked over the blocks where `stacked`.

    A "linear" becomes the inputs `name.weight` (packed), `name.scale` and `name.bias`; a "norm"
    `name.weight` and `name.bias`; a "table" is one float32 matrix of that name.
    """

    name: str
    kind: Kind
    stacked: bool = False


ENCODER_BLOCKS = tuple(
    Parameter(f"encoder.blocks.{name}", kind, stacked=True)
    for name, kind in (
        ("attn_ln", "norm"),
        ("attn.qkv", "linear"),
        ("attn.out", "linear"),
        ("mlp_ln", "norm"),
        ("mlp.0", "linear"),
        ("mlp.2", "linear"),
    )
)
ENCODER = (
    Parameter("encoder.conv1", "linear"),
    Parameter("encoder.conv2", "linear"),
    Parameter("encoder.positional_embedding", "table"),
    *ENCODER_BLOCKS,
    Parameter("encoder.ln_post", "norm"),
)
CROSS_KV = (Parameter("decoder.blocks.cross_attn.kv", "linear", stacked=True),)
DECODER_BLOCKS = tuple(
    Parameter(f"decoder.blocks.{name}", kind, stacked=True)
    for name, kind in (
        ("attn_ln", "norm"),
        ("attn.qkv", "linear"),
        ("attn.out", "linear"),
        ("cross_attn_ln", "norm"),
        ("cross_attn.query", "linear"),
        ("cross_attn.out", "linear"),
        ("mlp_ln", "norm"),
        ("mlp.0", "linear"),
        ("mlp.2", "linear"),
    )
)
DECODER = (
    Parameter("decoder.token_embedding", "linear"),
    Parameter("decoder.positional_embedding", "table"),
    *DECODER_BLOCKS,
    Parameter("decoder.ln", "norm"),
)


@dataclass(frozen=True)
class Storage:
    """How numbers are held, and what many rows are multiplied in. All sums are float32.

    weight : dtype of the packed linear weights: float16 (exact for official checkpoints),
        float32, or int8 with one scale per output channel.
    cross : dtype of the cached cross-attention keys and values.
    width : float32 lanes of the vectors that the kernels use: 16, 8 or 4.
    product : what linear layers multiply many rows in: float32, bfloat16 or, where the weights
        are int8, int8. The last two need width 16 and the instructions.
    attention : what the encoder's attention multiplies in: float32 or bfloat16.
    tiles : whether matrix tiles (AMX) multiply many rows and the encoder's attention; float32 is
        then made of three products of bfloat16.
    """

    weight: DType
    cross: DType
    width: int
    product: DType
    attention: DType
    tiles: bool


def threads_type(device: DeviceRef) -> TensorType:
    """The operand of every graph that says how many threads may work at a time: (1,), int32."""
    return TensorType(DType.int32, ("one",), device)


def inputs(
    parameters: tuple[Parameter, ...], storage: Storage, device: DeviceRef
) -> Iterator[tuple[str, TensorType]]:
    """Names and types of the graph inputs that carry `parameters`, in order.

    Shapes: packed weights (layers, panels, in, 32), without layers where not stacked; scales
    (layers, out), or one element where the storage has none; biases (layers, out).
    """

    def tensor(name: str, dtype: DType, *shape: str) -> tuple[str, TensorType]:
        axes = [f"{name.replace('.', '_')}_{axis}" for axis in shape]
        return name, TensorType(dtype, axes, device)

    for p in parameters:
        layers = ("layers",) if p.stacked else ()
        if p.kind == "table":
            yield tensor(p.name, DType.float32, "rows", "columns")
        elif p.kind == "norm":
            yield tensor(f"{p.name}.weight", DType.float32, *layers, "columns")
            yield tensor(f"{p.name}.bias", DType.float32, *layers, "columns")
        else:
            yield tensor(f"{p.name}.weight", storage.weight, *layers, "panels", "in", "lanes")
            yield tensor(f"{p.name}.scale", DType.float32, *layers, "columns")
            yield tensor(f"{p.name}.bias", DType.float32, *layers, "out")
