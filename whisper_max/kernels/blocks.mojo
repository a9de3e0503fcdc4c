"""The residual attention blocks of the encoder and of the decoder, all layers in one op each.

Weights are stacked over the layers. Names and order are those of `ResidualAttentionBlock` in
openai-whisper's model.py, with query, key and value of self-attention as one projection.
"""

import extensibility
from extensibility import InputTensor, OutputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from std.math import align_up, ceildiv
from std.memory.alloc import unsafe_alloc
from std.sys import size_of

from .attention import (
    HEAD_DIM, Attention, SelfAttention, head_size, pack_keys, pack_values, padded
)
from .gemm import F32, PANEL, Bytes, Floats, Packed, copy, raw
from .phases import Phases, team_size
from .norm import Norm, sum_of_squares
from .products import Integers, PackedRows
from .projection import FEW_ROWS, PACKED_ROWS, PROJECT_PHASES, Projection, project

comptime QUERY_ROWS = 192
"""Queries of one head that one worker attends with at a time."""


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


@fieldwise_init
struct EncoderAttention[type: DType, product: DType, width: Int, tiles: Bool](ImplicitlyCopyable):
    """Self-attention of one layer of the encoder, on keys and values packed from its projection.

    A head is one of one window: windows * heads of them.

    type : what it multiplies in
    product : what the layer after it multiplies in
    """

    comptime Left = PackedRows[Self.product, Self.width, Self.tiles]

    var qkv: Floats
    """[windows * frames, 3 * n_state]."""
    var attended: Floats
    """[windows * frames, n_state]."""
    var left: Self.Left
    """Where the attended values go at once if they are `direct`."""
    var direct: Bool
    var keys: Packed[Self.type]
    var values: Packed[Self.type]
    var heads: Int
    var frames: Int

    def pack(self, head: Int):
        """Packs the keys and values of one head."""
        var n = self.heads * HEAD_DIM
        var qkv = self.qkv.unsafe_offset(
            (head // self.heads) * self.frames * 3 * n + (head % self.heads) * HEAD_DIM
        )
        var at = head * head_size(self.frames)
        pack_keys[Self.tiles](
            qkv.unsafe_offset(n), 3 * n, self.frames, self.keys.unsafe_offset(at)
        )
        pack_values[Self.width, Self.tiles](
            qkv.unsafe_offset(2 * n),
            3 * n,
            self.frames,
            self.values.unsafe_offset(at),
            padded(self.frames),
        )

    @always_inline
    def blocks(self) -> Int:
        """Into how many blocks the queries of a head are cut."""
        return ceildiv(self.frames, QUERY_ROWS)

    @always_inline
    def begin(self, block: Int) -> Int:
        """The first query of a block: whole tiles, but for the last of a window."""
        comptime tile = Self.Left.at_once
        var begin = ceildiv(self.frames, tile) * block // self.blocks() * tile
        return min(begin, self.frames)

    def run(self, chunk: Int):
        """Attends with a block of queries of one head."""
        var n = self.heads * HEAD_DIM
        var head = chunk // self.blocks()
        var begin = self.begin(chunk % self.blocks())
        var end = self.begin(chunk % self.blocks() + 1)
        var row = (head // self.heads) * self.frames + begin
        var column = (head % self.heads) * HEAD_DIM
        var to = self.attended.unsafe_offset(row * n + column)
        var stride = n
        comptime if Self.Left.takes_floats:
            if self.direct:
                to = self.left.floats(row, column)
                stride = Self.Left.float_stride
        Attention[Self.type, Self.width, Self.tiles](
            output=to,
            output_stride=stride,
            query=self.qkv.unsafe_offset(row * 3 * n + column),
            query_stride=3 * n,
            keys=self.keys.unsafe_offset(head * head_size(self.frames)),
            values=self.values.unsafe_offset(head * head_size(self.frames)),
            frames=self.frames,
            splits_output=self.direct and Self.Left.parts == 2,
            raw_scores=self.attended,
            wants_scores=False,
        ).run(end - begin)


@extensibility.register("whisper_encoder_blocks")
struct EncoderBlocks:
    @staticmethod
    def execute[
        target: StaticString,
        type: DType,
        //,
        width: Int,
        product: DType,
        attention: DType,
        tiles: Bool,
    ](
        output: OutputTensor[dtype=F32, rank=3, ...],
        x: InputTensor[dtype=F32, rank=3, ...],
        threads: InputTensor[dtype=DType.int32, rank=1, ...],
        attn_ln_weight: InputTensor[dtype=F32, rank=2, ...],
        attn_ln_bias: InputTensor[dtype=F32, rank=2, ...],
        qkv_weight: InputTensor[dtype=type, rank=4, ...],
        qkv_scale: InputTensor[dtype=F32, rank=2, ...],
        qkv_bias: InputTensor[dtype=F32, rank=2, ...],
        out_weight: InputTensor[dtype=type, rank=4, ...],
        out_scale: InputTensor[dtype=F32, rank=2, ...],
        out_bias: InputTensor[dtype=F32, rank=2, ...],
        mlp_ln_weight: InputTensor[dtype=F32, rank=2, ...],
        mlp_ln_bias: InputTensor[dtype=F32, rank=2, ...],
        mlp_0_weight: InputTensor[dtype=type, rank=4, ...],
        mlp_0_scale: InputTensor[dtype=F32, rank=2, ...],
        mlp_0_bias: InputTensor[dtype=F32, rank=2, ...],
        mlp_2_weight: InputTensor[dtype=type, rank=4, ...],
        mlp_2_scale: InputTensor[dtype=F32, rank=2, ...],
        mlp_2_bias: InputTensor[dtype=F32, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """All blocks of the encoder.

        x and output: (windows, frames, n_state). threads: (1,), workers at most. Of the weights,
        stacked over the layers: norms (layers, n_state); packed (layers, panels, in, 32), see
        packing.mojo; biases (layers, out), and so are the scales, or (layers, 0) of weights that
        have none.

        product : what linear layers multiply in
        attention : what attention multiplies in
        tiles : whether both use matrix tiles
        """
        var batch = x.dim_size(0)
        var frames = x.dim_size(1)
        var n = x.dim_size(2)
        var rows = batch * frames
        var heads = n // HEAD_DIM
        var layers = attn_ln_weight.dim_size(0)
        var team = team_size(threads)
        var stream = raw(output.unsafe_ptr())
        copy[width](raw(x.unsafe_ptr()), stream, rows * n)
        comptime Layer = Projection[type, width, product, tiles]
        comptime Left = Layer.Left
        # Attended values and the hidden layer of the MLP are only multiplied: they go where packed
        # rows are, if those take as much.
        var direct = Left.takes_floats and rows > FEW_ROWS
        # The hidden layer (4n) takes the place of qkv (3n) and the attended values (n).
        var hidden = unsafe_alloc[Float32](
            Left.bytes(rows, 4 * n) // size_of[Float32]() if direct else rows * 4 * n, alignment=64
        )
        var packed_hidden = Bytes(unsafe_from_address=Int(hidden))
        var attended = hidden.unsafe_offset(rows * 3 * n)
        var keys = unsafe_alloc[Scalar[attention]](
            2 * batch * heads * head_size(frames), alignment=64
        )
        var values = keys.unsafe_offset(batch * heads * head_size(frames))
        var packed = unsafe_alloc[UInt8](
            Layer.packed_bytes(rows, n if direct else 4 * n), alignment=64
        )
        var memory = raw(packed)
        var qkv = Weights[type].of(qkv_weight, qkv_scale, qkv_bias)
        var attn_out = Weights[type].of(out_weight, out_scale, out_bias)
        var mlp_0 = Weights[type].of(mlp_0_weight, mlp_0_scale, mlp_0_bias)
        var mlp_2 = Weights[type].of(mlp_2_weight, mlp_2_scale, mlp_2_bias)
        var phases = Phases((4 * PROJECT_PHASES + 2) * layers, team)
        var attending = EncoderAttention[attention, product, width, tiles](
            qkv=hidden,
            attended=attended,
            left=Left.at(memory, rows, n),
            direct=direct,
            keys=keys,
            values=values,
            heads=heads,
            frames=frames,
        )
        var all_heads = batch * heads
        var all_blocks = all_heads * attending.blocks()

        @always_inline
        def pack(chunk: Int) {var attending}:
            attending.pack(chunk)

        @always_inline
        def attend(chunk: Int) {var attending}:
            attending.run(chunk)

        def worker(
            index: Int
        ) {
            var stream, var hidden, var attended, var rows, var layers, var team, var phases,
            var all_heads, var all_blocks, var memory, var packed_hidden, var direct, imm
        }:
            var phase = phases.of(index)
            var none = Norm(stream, stream, 0)
            var of_hidden = packed_hidden if direct else memory
            for layer in range(layers):
                var attn_ln = norm_of(attn_ln_weight, attn_ln_bias, layer)
                var mlp_ln = norm_of(mlp_ln_weight, mlp_ln_bias, layer)
                project(phase, team, linear[width, product, tiles](
                    hidden, stream, rows, qkv, layer, attn_ln
                ), memory)
                phase.run(all_heads, pack)
                phase.run(all_blocks, attend)
                project(phase, team, linear[width, product, tiles](
                    stream, attended, rows, attn_out, layer, none, residual=True
                ), memory, is_packed=direct)
                project(phase, team, linear[width, product, tiles](
                    hidden, stream, rows, mlp_0, layer, mlp_ln, gelu=True, packs_output=direct
                ), memory)
                project(phase, team, linear[width, product, tiles](
                    stream, hidden, rows, mlp_2, layer, none, residual=True
                ), of_hidden, is_packed=direct)

        sync_parallelize(worker, team)
        phases.free()
        packed.unsafe_free()
        hidden.unsafe_free()
        keys.unsafe_free()


@always_inline
def keep[width: Int](mut phase: Phases, stream: Floats, to: Floats, place: Int, count: Int):
    """Copies the residual stream, `count` floats, as it is between two phases."""

    @always_inline
    def all(chunk: Int) {var stream, var to, var place, var count}:
        copy[width](stream, to.unsafe_offset(place * count), count)

    phase.run(1, all)


@fieldwise_init
struct CrossAttention[type: DType, width: Int](ImplicitlyCopyable):
    """Cross attention of the decoder: the rows of a window share its packed keys and values."""

    var query: Floats
    """[windows * rows, n_state]."""
    var output: Floats
    """[windows * rows, n_state]."""
    var keys: Packed[Self.type]
    """[layers, windows, heads, packed]."""
    var values: Packed[Self.type]
    """[layers, windows, heads, packed]."""
    var slots: Integers
    """[layers, heads], where in `scores` a head's go, or -1."""
    var scores: Floats
    """[slots, windows * rows, padded frames]."""
    var windows: Int
    var rows: Int
    """Rows that share one window."""
    var heads: Int
    var head_elements: Int
    """Numbers in a head's packed keys."""
    var frames: Int

    @always_inline
    def run(self, layer: Int, window: Int, head: Int):
        """Attends with one head of all rows that share a window."""
        var n = self.heads * HEAD_DIM
        var at = window * self.rows * n + head * HEAD_DIM
        var packed = ((layer * self.windows + window) * self.heads + head) * self.head_elements
        var slot = Int(self.slots.unsafe_offset(layer * self.heads + head).unsafe_load())
        var scores_row = (max(slot, 0) * self.windows + window) * self.rows
        Attention[Self.type, Self.width, False](
            output=self.output.unsafe_offset(at),
            output_stride=n,
            query=self.query.unsafe_offset(at),
            query_stride=n,
            keys=self.keys.unsafe_offset(packed),
            values=self.values.unsafe_offset(packed),
            frames=self.frames,
            splits_output=False,
            raw_scores=self.scores.unsafe_offset(scores_row * padded(self.frames)),
            wants_scores=slot >= 0,
        ).run(self.rows)


@extensibility.register("whisper_decoder_blocks")
struct DecoderBlocks:
    """All blocks, and the logits: one op, since each that is cut into parts wakes the pool.

    A thread of MAX's that is woken while it is awake makes up for that later, when PyTorch wants
    its CPU.
    """

    @staticmethod
    def execute[
        target: StaticString,
        type: DType,
        cache_type: DType,
        //,
        width: Int,
        product: DType,
        tiles: Bool,
    ](
        logits: OutputTensor[dtype=F32, rank=3, ...],
        raw_scores: OutputTensor[dtype=F32, rank=3, ...],
        residuals: OutputTensor[dtype=F32, rank=3, ...],
        x: InputTensor[dtype=F32, rank=3, ...],
        wanted: InputTensor[dtype=DType.int32, rank=1, ...],
        self_cache: MutableInputTensor[dtype=F32, rank=6, ...],
        cross_keys: InputTensor[dtype=cache_type, rank=4, ...],
        cross_values: InputTensor[dtype=cache_type, rank=4, ...],
        source: InputTensor[dtype=DType.int32, rank=2, ...],
        position: InputTensor[dtype=DType.int32, rank=1, ...],
        score_slots: InputTensor[dtype=DType.int32, rank=2, ...],
        threads: InputTensor[dtype=DType.int32, rank=1, ...],
        attn_ln_weight: InputTensor[dtype=F32, rank=2, ...],
        attn_ln_bias: InputTensor[dtype=F32, rank=2, ...],
        qkv_weight: InputTensor[dtype=type, rank=4, ...],
        qkv_scale: InputTensor[dtype=F32, rank=2, ...],
        qkv_bias: InputTensor[dtype=F32, rank=2, ...],
        out_weight: InputTensor[dtype=type, rank=4, ...],
        out_scale: InputTensor[dtype=F32, rank=2, ...],
        out_bias: InputTensor[dtype=F32, rank=2, ...],
        cross_attn_ln_weight: InputTensor[dtype=F32, rank=2, ...],
        cross_attn_ln_bias: InputTensor[dtype=F32, rank=2, ...],
        cross_query_weight: InputTensor[dtype=type, rank=4, ...],
        cross_query_scale: InputTensor[dtype=F32, rank=2, ...],
        cross_query_bias: InputTensor[dtype=F32, rank=2, ...],
        cross_out_weight: InputTensor[dtype=type, rank=4, ...],
        cross_out_scale: InputTensor[dtype=F32, rank=2, ...],
        cross_out_bias: InputTensor[dtype=F32, rank=2, ...],
        mlp_ln_weight: InputTensor[dtype=F32, rank=2, ...],
        mlp_ln_bias: InputTensor[dtype=F32, rank=2, ...],
        mlp_0_weight: InputTensor[dtype=type, rank=4, ...],
        mlp_0_scale: InputTensor[dtype=F32, rank=2, ...],
        mlp_0_bias: InputTensor[dtype=F32, rank=2, ...],
        mlp_2_weight: InputTensor[dtype=type, rank=4, ...],
        mlp_2_scale: InputTensor[dtype=F32, rank=2, ...],
        mlp_2_bias: InputTensor[dtype=F32, rank=2, ...],
        ln_weight: InputTensor[dtype=F32, rank=1, ...],
        ln_bias: InputTensor[dtype=F32, rank=1, ...],
        embedding_weight: InputTensor[dtype=type, rank=3, ...],
        embedding_scale: InputTensor[dtype=F32, rank=1, ...],
        embedding_bias: InputTensor[dtype=F32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """All blocks of the decoder for `tokens` new positions of each row, and their logits.

        x: (rows, tokens, n_state). wanted: flat numbers (row * tokens + token) of those whose
        logits, (wanted, 1, vocabulary), are computed. self_cache: (layers, 2, cache rows, heads,
        context, 64), appended in place at `position[0]`. cross_keys and cross_values: (layers,
        windows, heads, packed); rows are grouped by window, rows / windows each. source: (rows,
        context), the cache row of each earlier position. score_slots: (layers, heads), where in
        raw_scores (slots, rows * tokens, padded frames) a head's scores go, or -1. residuals: (2 *
        layers + 1, rows * tokens, n_state), the residual stream before and after each cross
        attention and at the end; or nothing.
        """
        var rows = x.dim_size(0)
        var tokens = x.dim_size(1)
        var n = x.dim_size(2)
        var all_rows = rows * tokens
        var heads = n // HEAD_DIM
        var layers = attn_ln_weight.dim_size(0)
        var windows = cross_keys.dim_size(1)
        var team = team_size(threads)
        var wanted_rows = wanted.dim_size(0)
        # The hidden layer of the MLP (4n) takes the place of qkv (3n) and the attended values (n),
        # the rows whose logits are wanted (n) that of the hidden layer.
        var hidden = unsafe_alloc[Float32](
            max(all_rows * 4, wanted_rows) * n + all_rows * n, alignment=64
        )
        var attended = hidden.unsafe_offset(all_rows * 3 * n)
        var stream = hidden.unsafe_offset(max(all_rows * 4, wanted_rows) * n)
        copy[width](raw(x.unsafe_ptr()), stream, all_rows * n)
        var kept = raw(residuals.unsafe_ptr())
        var keeps = residuals.dim_size(0) > 0
        var stream_size = all_rows * n
        comptime Layer = Projection[type, width, product, tiles]
        var packed = unsafe_alloc[UInt8](
            max(Layer.packed_bytes(all_rows, 4 * n), Layer.packed_bytes(wanted_rows, n)),
            alignment=64,
        )
        var memory = raw(packed)
        var qkv = Weights[type].of(qkv_weight, qkv_scale, qkv_bias)
        var attn_out = Weights[type].of(out_weight, out_scale, out_bias)
        var cross_query = Weights[type].of(cross_query_weight, cross_query_scale, cross_query_bias)
        var cross_out = Weights[type].of(cross_out_weight, cross_out_scale, cross_out_bias)
        var mlp_0 = Weights[type].of(mlp_0_weight, mlp_0_scale, mlp_0_bias)
        var mlp_2 = Weights[type].of(mlp_2_weight, mlp_2_scale, mlp_2_bias)
        var to_logits = linear[width, product, tiles](
            raw(logits.unsafe_ptr()),
            hidden,
            wanted_rows,
            Weights[type].of_one(embedding_weight, embedding_scale, embedding_bias),
            0,
            Norm(raw(ln_weight.unsafe_ptr()), raw(ln_bias.unsafe_ptr()), n),
        )
        var phases = Phases((6 * PROJECT_PHASES + 4) * layers + 2 + PROJECT_PHASES, team)
        var self_attention = SelfAttention[width](
            output=attended,
            qkv=hidden,
            cache=raw(self_cache.unsafe_ptr()),
            source=raw(source.unsafe_ptr()),
            cache_rows=self_cache.dim_size(2),
            heads=heads,
            context=self_cache.dim_size(4),
            offset=Int(position.unsafe_ptr().unsafe_load()),
            tokens=tokens,
        )
        var cache_size = 2 * self_attention.cache_rows * heads * self_attention.context * HEAD_DIM
        var cross_attention = CrossAttention[cache_type, width](
            query=hidden,
            output=attended,
            keys=raw(cross_keys.unsafe_ptr()),
            values=raw(cross_values.unsafe_ptr()),
            slots=raw(score_slots.unsafe_ptr()),
            scores=raw(raw_scores.unsafe_ptr()),
            windows=windows,
            rows=(rows // windows) * tokens,
            heads=heads,
            head_elements=cross_keys.dim_size(3),
            frames=Int(position.unsafe_ptr().unsafe_offset(1).unsafe_load()),
        )

        def worker(
            index: Int
        ) {
            var stream, var hidden, var attended, var all_rows, var layers, var team, var phases,
            var rows, var windows, var heads, var self_attention, var cross_attention,
            var cache_size, var kept, var keeps, var stream_size, var memory, var n,
            var wanted_rows, var to_logits, imm
        }:
            var phase = phases.of(index)
            var none = Norm(stream, stream, 0)
            for layer in range(layers):
                var attn_ln = norm_of(attn_ln_weight, attn_ln_bias, layer)
                var cross_ln = norm_of(cross_attn_ln_weight, cross_attn_ln_bias, layer)
                var mlp_ln = norm_of(mlp_ln_weight, mlp_ln_bias, layer)
                var attention = self_attention
                attention.cache = attention.cache.unsafe_offset(layer * cache_size)

                @always_inline
                def attend(chunk: Int) {var attention, var heads}:
                    attention.run(chunk // heads, chunk % heads)

                @always_inline
                def cross_attend(chunk: Int) {var cross_attention, var heads, var layer}:
                    cross_attention.run(layer, chunk // heads, chunk % heads)

                project(phase, team, linear[width, product, tiles](
                    hidden, stream, all_rows, qkv, layer, attn_ln
                ), memory)
                phase.run(rows * heads, attend)
                project(phase, team, linear[width, product, tiles](
                    stream, attended, all_rows, attn_out, layer, none, residual=True
                ), memory)
                if keeps:
                    keep[width](phase, stream, kept, 2 * layer, stream_size)
                project(phase, team, linear[width, product, tiles](
                    hidden, stream, all_rows, cross_query, layer, cross_ln
                ), memory)
                phase.run(windows * heads, cross_attend)
                project(phase, team, linear[width, product, tiles](
                    stream, attended, all_rows, cross_out, layer, none, residual=True
                ), memory)
                if keeps:
                    keep[width](phase, stream, kept, 2 * layer + 1, stream_size)
                project(phase, team, linear[width, product, tiles](
                    hidden, stream, all_rows, mlp_0, layer, mlp_ln, gelu=True
                ), memory)
                project(phase, team, linear[width, product, tiles](
                    stream, hidden, all_rows, mlp_2, layer, none, residual=True
                ), memory)

            @always_inline
            def take(row: Int) {var stream, var hidden, var n, imm}:
                var place = Int(wanted.unsafe_ptr().unsafe_offset(row).unsafe_load())
                copy[width](stream.unsafe_offset(place * n), hidden.unsafe_offset(row * n), n)

            if keeps:
                keep[width](phase, stream, kept, 2 * layers, stream_size)
            phase.run(wanted_rows, take)
            project(phase, team, to_logits, memory)

        sync_parallelize(worker, team)
        phases.free()
        packed.unsafe_free()
        hidden.unsafe_free()


@fieldwise_init
struct CrossCaches[
    type: DType, cache_type: DType, width: Int, product: DType, tiles: Bool
](ImplicitlyCopyable):
    """Cross-attention keys and values of all layers, from the encoder's features."""

    comptime Layer = Projection[Self.type, Self.width, Self.product, Self.tiles]
    comptime Left = Self.Layer.Left
    comptime Right = Self.Layer.Right

    var keys: Packed[Self.cache_type]
    """[layers, windows, heads, packed]."""
    var values: Packed[Self.cache_type]
    """[layers, windows, heads, packed]."""
    var copies: Floats
    """[copied rows, n_state], what was read of the first rows."""
    var copied: Int
    """Rows of the features, which are [windows * frames, n_state]."""
    var squares: Floats
    """[windows * frames], squared norms."""
    var features: Floats
    var left: Self.Left
    """The features, packed; windows begin with whole tiles, so that tiles are of one window."""
    var weights: Weights[Self.type]
    """Of keys and of values, of all heads: 2 * n_state columns."""
    var layers: Int
    var windows: Int
    var frames: Int
    var heads: Int
    var elements: Int
    """Numbers in a head's packed keys."""

    @always_inline
    def none(self) -> Norm:
        """The norm of features: they have none."""
        return Norm(self.features, self.features, 0)

    @staticmethod
    def window_rows(frames: Int) -> Int:
        """Packed rows of a window."""
        return align_up(frames, Self.Left.at_once)

    @always_inline
    def blocks(self) -> Int:
        """Into how many blocks the frames of a window are cut."""
        return ceildiv(self.frames, Self.Left.rows_in_cache)

    @always_inline
    def pack(self, chunk: Int):
        """Packs some frames of the features."""
        var n = self.heads * HEAD_DIM
        var first = chunk * PACKED_ROWS
        for row in range(first, min(first + PACKED_ROWS, self.windows * self.frames)):
            var frame = self.features.unsafe_offset(row * n)
            if row < self.copied:  # once: another thread may be writing there
                copy[Self.width](frame, self.copies.unsafe_offset(row * n), n)
                frame = self.copies.unsafe_offset(row * n)
            var window = row // self.frames
            self.left.pack(
                window * Self.window_rows(self.frames) + row % self.frames, frame, self.none()
            )
            self.squares.unsafe_offset(row).unsafe_store(sum_of_squares[Self.width](frame, n))

    @always_inline
    def fill(self, chunk: Int, right: Self.Right, projected: Floats):
        """Keys or values of one head of a layer, of a block of a window's frames.

        All heads and layers of a block follow each other: its features are in the cache. A worker
        has a panel `right` of its own, and `projected`, [rows in cache, 64].
        """
        comptime panels = HEAD_DIM // PANEL
        var of_block = 2 * self.heads * self.layers
        var window = chunk // of_block // self.blocks()
        var first = chunk // of_block % self.blocks() * Self.Left.rows_in_cache
        var rows = min(Self.Left.rows_in_cache, self.frames - first)
        var layer = chunk % of_block // (2 * self.heads)
        var of_values = chunk // self.heads % 2
        var head = chunk % self.heads
        var part = linear[Self.width, Self.product, Self.tiles](
            self.features, self.features, rows, self.weights, layer, self.none()
        ).panels_from((of_values * self.heads + head) * panels, panels, projected)
        var from_row = window * Self.window_rows(self.frames) + first
        comptime for panel in range(panels):
            part.block(self.left, right, from_row, 0, rows, panel)
        var to = ((layer * self.windows + window) * self.heads + head) * self.elements
        if of_values == 1:
            pack_values[Self.width, False](
                projected,
                HEAD_DIM,
                rows,
                self.values.unsafe_offset(to + first * PANEL),
                padded(self.frames),
            )
        else:
            pack_keys[False](
                projected, HEAD_DIM, rows, self.keys.unsafe_offset(to + first * HEAD_DIM)
            )


@extensibility.register("whisper_cross_kv")
struct CrossKV:
    @staticmethod
    def execute[
        target: StaticString,
        type: DType,
        cache_type: DType,
        //,
        width: Int,
        product: DType,
        tiles: Bool,
    ](
        keys: MutableInputTensor[dtype=cache_type, rank=4, ...],
        values: MutableInputTensor[dtype=cache_type, rank=4, ...],
        copies: MutableInputTensor[dtype=F32, rank=3, ...],
        squares: MutableInputTensor[dtype=F32, rank=2, ...],
        features: InputTensor[dtype=F32, rank=3, ...],
        threads: InputTensor[dtype=DType.int32, rank=1, ...],
        kv_weight: InputTensor[dtype=type, rank=4, ...],
        kv_scale: InputTensor[dtype=F32, rank=2, ...],
        kv_bias: InputTensor[dtype=F32, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Cross-attention keys and values of all layers, packed into their caches.

        features: (windows, frames, n_state). keys and values: (layers, windows, heads, packed).
        copies: what is read of the first windows' features, of as many as there is room for.
        squares: (windows, frames), the squared norm of each frame's features.
        """
        var windows = features.dim_size(0)
        var frames = features.dim_size(1)
        var n = features.dim_size(2)
        var layers = kv_bias.dim_size(0)
        comptime Caches = CrossCaches[type, cache_type, width, product, tiles]
        comptime Left = Caches.Left
        var packed_rows = windows * Caches.window_rows(frames)
        var packed = unsafe_alloc[UInt8](Left.bytes(packed_rows, n), alignment=64)
        var caches = Caches(
            keys=raw(keys.unsafe_ptr()),
            values=raw(values.unsafe_ptr()),
            copies=raw(copies.unsafe_ptr()),
            copied=copies.dim_size(0) * frames,
            squares=raw(squares.unsafe_ptr()),
            features=raw(features.unsafe_ptr()),
            left=Left.at(raw(packed), packed_rows, n),
            weights=Weights[type].of(kv_weight, kv_scale, kv_bias),
            layers=layers,
            windows=windows,
            frames=frames,
            heads=n // HEAD_DIM,
            elements=keys.dim_size(3),
        )
        var pack_chunks = ceildiv(windows * frames, PACKED_ROWS)
        var fill_chunks = windows * caches.blocks() * 2 * caches.heads * layers
        var team = team_size(threads)
        var phases = Phases(2, team)

        def worker(index: Int) {var caches, var phases, var pack_chunks, var fill_chunks}:
            var phase = phases.of(index)
            var projected = unsafe_alloc[Float32](Left.rows_in_cache * HEAD_DIM, alignment=64)
            var panel = unsafe_alloc[UInt8](Caches.Right.bytes, alignment=64)
            var right = Caches.Right.at(raw(panel))

            @always_inline
            def pack(chunk: Int) {var caches}:
                caches.pack(chunk)

            @always_inline
            def fill(chunk: Int) {var caches, var right, var projected}:
                caches.fill(chunk, right, projected)

            phase.run(pack_chunks, pack)
            phase.run(fill_chunks, fill)
            panel.unsafe_free()
            projected.unsafe_free()

        sync_parallelize(worker, team)
        packed.unsafe_free()
        phases.free()
