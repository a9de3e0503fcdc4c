"""The operands of a graph as layers: LayerNorms and projections, stacked over the layers.

Names and order are those of `ResidualAttentionBlock` in openai-whisper's model.py, with query, key
and value of self-attention as one projection.
"""

from extensibility import InputTensor

from .gemm import F32, PANEL, Floats, Packed, raw
from .norm import Norm
from .projection import Projection


@always_inline
def norm_of(
    weight: InputTensor[dtype=F32, rank=2, ...],
    bias: InputTensor[dtype=F32, rank=2, ...],
    layer: Int,
) -> Norm:
    """The LayerNorm of one layer."""
    var length = weight.dim_size(1)
    return Norm(
        raw(weight.unsafe_ptr()).unsafe_offset(layer * length),
        raw(bias.unsafe_ptr()).unsafe_offset(layer * length),
        length,
    )


@fieldwise_init
struct Weights[type: DType](ImplicitlyCopyable):
    """The packed weights of one projection, stacked over the layers."""

    var weight: Packed[Self.type]
    var scale: Floats
    var bias: Floats
    var layer_size: Int
    """Weights of a layer, the filled up ones of its last panel among them."""
    var length: Int
    var columns: Int
    var scaled: Bool

    @staticmethod
    def of(
        weight: InputTensor[dtype=Self.type, rank=4, ...],
        scale: InputTensor[dtype=F32, rank=2, ...],
        bias: InputTensor[dtype=F32, rank=2, ...],
    ) -> Self:
        """A graph's operands: (layers, panels, in, 32), and twice (layers, out)."""
        return Self(
            weight=raw(weight.unsafe_ptr()),
            scale=raw(scale.unsafe_ptr()),
            bias=raw(bias.unsafe_ptr()),
            layer_size=weight.dim_size(1) * weight.dim_size(2) * PANEL,
            length=weight.dim_size(2),
            columns=bias.dim_size(1),
            scaled=scale.dim_size(1) == bias.dim_size(1),
        )

    @staticmethod
    def of_one(
        weight: InputTensor[dtype=Self.type, rank=3, ...],
        scale: InputTensor[dtype=F32, rank=1, ...],
        bias: InputTensor[dtype=F32, rank=1, ...],
    ) -> Self:
        """Operands of a single layer: (panels, in, 32), and twice (out,)."""
        return Self(
            weight=raw(weight.unsafe_ptr()),
            scale=raw(scale.unsafe_ptr()),
            bias=raw(bias.unsafe_ptr()),
            layer_size=0,
            length=weight.dim_size(1),
            columns=bias.dim_size(0),
            scaled=scale.dim_size(0) == bias.dim_size(0),
        )


@always_inline
def linear[
    type: DType, //, width: Int, product: DType, tiles: Bool
](
    output: Floats,
    x: Floats,
    rows: Int,
    weights: Weights[type],
    layer: Int,
    norm: Norm,
    *,
    residual: Bool = False,
    gelu: Bool = False,
    packs_output: Bool = False,
) -> Projection[type, width, product, tiles]:
    """The projection of one layer; `residual` adds to what the output holds."""
    return Projection[type, width, product, tiles](
        output=output,
        x=x,
        weight=weights.weight.unsafe_offset(layer * weights.layer_size),
        scale=weights.scale.unsafe_offset(layer * weights.columns if weights.scaled else 0),
        bias=weights.bias.unsafe_offset(layer * weights.columns),
        residual=output,
        norm=norm,
        rows=rows,
        length=weights.length,
        columns=weights.columns,
        residual_rows=rows if residual else 0,
        scaled=weights.scaled,
        gelu=gelu,
        packs_output=packs_output,
    )
