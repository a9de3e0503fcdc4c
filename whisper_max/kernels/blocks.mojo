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
from .gemm import F32, PANEL, Bytes, Floats, Packed, copy, raw, tile_rows
from .phases import Phases, team_size
from .norm import Norm, sum_of_squares
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
        """All blocks of the encoder: x, shape (batch, frames, n_state); threads[0] at most.

        Linear layers multiply in `product`, attention in `attention`, with matrix `tiles` or
        without.
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
        # Float32 is multiplied as it is: attended values and the hidden layer of the MLP, which are
        # only multiplied, go where packed rows are.
        var direct = Left.stored == F32 and rows > FEW_ROWS
        # The hidden layer (4n) takes the place of qkv (3n) and the attended values (n).
        var hidden = unsafe_alloc[Float32](
            Left.bytes(rows, 4 * n) // size_of[Float32]() if direct else rows * 4 * n, alignment=64
        )
        var packed_hidden = Bytes(unsafe_from_address=Int(hidden))
        var attended = hidden.unsafe_offset(rows * 3 * n)
        var keys = unsafe_alloc[Scalar[attention]](2 * batch * heads * head_size(frames))
        var values = keys.unsafe_offset(batch * heads * head_size(frames))
        var packed = unsafe_alloc[UInt8](
            Layer.packed_bytes(rows, n if direct else 4 * n), alignment=64
        )
        var memory = raw(packed)
        var qkv = Weights[type].of(qkv_weight, qkv_scale, qkv_bias)
        var attn_out = Weights[type].of(out_weight, out_scale, out_bias)
        var mlp_0 = Weights[type].of(mlp_0_weight, mlp_0_scale, mlp_0_bias)
        var mlp_2 = Weights[type].of(mlp_2_weight, mlp_2_scale, mlp_2_bias)
        var phases = Phases((4 * PROJECT_PHASES + 2) * layers)
        # Whole tiles, but for the last of a window.
        var query_tiles = ceildiv(frames, tile_rows[width]())
        var query_blocks = ceildiv(frames, QUERY_ROWS)

        @always_inline
        def pack(chunk: Int) {var hidden, var keys, var values, var heads, var frames, var n, imm}:
            """Packs keys and values of one head of one window."""
            var qkv = hidden.unsafe_offset(
                (chunk // heads) * frames * 3 * n + (chunk % heads) * HEAD_DIM
            )
            var at = chunk * head_size(frames)
            pack_keys[tiles](qkv.unsafe_offset(n), 3 * n, frames, keys.unsafe_offset(at))
            pack_values[width, tiles](
                qkv.unsafe_offset(2 * n), 3 * n, frames, values.unsafe_offset(at), padded(frames)
            )

        @always_inline
        def attend(
            chunk: Int
        ) {
            var hidden, var attended, var keys, var values, var heads, var frames, var n,
            var query_tiles, var query_blocks, var direct, var memory, var rows, imm
        }:
            """Attends with a block of queries of one head of one window."""
            var head = chunk // query_blocks
            var block = chunk % query_blocks
            var begin = query_tiles * block // query_blocks * tile_rows[width]()
            var end = min(
                query_tiles * (block + 1) // query_blocks * tile_rows[width](), frames
            )
            var row = (head // heads) * frames + begin
            var column = (head % heads) * HEAD_DIM
            var to = attended.unsafe_offset(row * n + column)
            var stride = n
            comptime if Left.stored == F32:
                if direct:
                    to = Left.at(memory, rows, n).floats(row, column)
                    stride = Left.stride
            Attention[attention, width, tiles](
                output=to,
                output_stride=stride,
                query=hidden.unsafe_offset(row * 3 * n + column),
                query_stride=3 * n,
                keys=keys.unsafe_offset(head * head_size(frames)),
                values=values.unsafe_offset(head * head_size(frames)),
                frames=frames,
                raw_scores=attended,
                wants_scores=False,
            ).run(end - begin)

        def worker(
            index: Int
        ) {
            var stream, var hidden, var attended, var rows, var layers, var team, var phases,
            var batch, var heads, var query_blocks, var memory, var packed_hidden, var direct, imm
        }:
            var phase = phases
            var none = Norm(stream, stream, 0)
            var of_hidden = packed_hidden if direct else memory
            for layer in range(layers):
                var attn_ln = norm_of(attn_ln_weight, attn_ln_bias, layer)
                var mlp_ln = norm_of(mlp_ln_weight, mlp_ln_bias, layer)
                project(phase, team, linear[width, product, tiles](
                    hidden, stream, rows, qkv, layer, attn_ln
                ), memory)
                phase.run(batch * heads, pack)
                phase.run(batch * heads * query_blocks, attend)
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


@extensibility.register("whisper_decoder_blocks")
struct DecoderBlocks:
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
        output: OutputTensor[dtype=F32, rank=3, ...],
        raw_scores: OutputTensor[dtype=F32, rank=3, ...],
        residuals: OutputTensor[dtype=F32, rank=3, ...],
        x: InputTensor[dtype=F32, rank=3, ...],
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
        ctx: DeviceContext,
    ) raises:
        """All blocks of the decoder for `tokens` new positions of each row.

        x and output: (rows, tokens, n_state). self_cache: (layers, 2, cache rows, heads, context,
        64), appended in place at `position[0]`. cross_keys and cross_values: (layers, windows,
        heads, packed); rows are grouped by window, rows / windows each. source: (rows, context),
        the cache row of each earlier position. score_slots: (layers, heads), where in
        raw_scores (slots, rows * tokens, padded frames) a head's scores go, or -1. residuals:
        (2 * layers + 1, rows * tokens, n_state), the residual stream before and after each cross
        attention and at the end; or nothing.
        """
        var rows = x.dim_size(0)
        var tokens = x.dim_size(1)
        var n = x.dim_size(2)
        var all_rows = rows * tokens
        var heads = n // HEAD_DIM
        var layers = attn_ln_weight.dim_size(0)
        var windows = cross_keys.dim_size(1)
        var group = (rows // windows) * tokens
        var head_elements = cross_keys.dim_size(3)
        var frames = Int(position.unsafe_ptr().unsafe_offset(1).unsafe_load())
        var score_size = all_rows * padded(frames)
        var team = team_size(threads)
        var stream = raw(output.unsafe_ptr())
        copy[width](raw(x.unsafe_ptr()), stream, all_rows * n)
        # The hidden layer of the MLP (4n) takes the place of qkv (3n) and the attended values (n).
        var hidden = unsafe_alloc[Float32](all_rows * 4 * n)
        var attended = hidden.unsafe_offset(all_rows * 3 * n)
        var scores = raw(raw_scores.unsafe_ptr())
        var keys = raw(cross_keys.unsafe_ptr())
        var values = raw(cross_values.unsafe_ptr())
        var slots = raw(score_slots.unsafe_ptr())
        var kept = raw(residuals.unsafe_ptr())
        var keeps = residuals.dim_size(0) > 0
        var stream_size = all_rows * n
        var packed = unsafe_alloc[UInt8](
            Projection[type, width, product, tiles].packed_bytes(all_rows, 4 * n), alignment=64
        )
        var memory = raw(packed)
        var qkv = Weights[type].of(qkv_weight, qkv_scale, qkv_bias)
        var attn_out = Weights[type].of(out_weight, out_scale, out_bias)
        var cross_query = Weights[type].of(cross_query_weight, cross_query_scale, cross_query_bias)
        var cross_out = Weights[type].of(cross_out_weight, cross_out_scale, cross_out_bias)
        var mlp_0 = Weights[type].of(mlp_0_weight, mlp_0_scale, mlp_0_bias)
        var mlp_2 = Weights[type].of(mlp_2_weight, mlp_2_scale, mlp_2_bias)
        var phases = Phases((6 * PROJECT_PHASES + 4) * layers)
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

        def worker(
            index: Int
        ) {
            var stream, var hidden, var attended, var scores, var keys, var values, var slots,
            var all_rows, var layers, var team, var phases, var rows, var windows, var heads,
            var group, var head_elements, var frames, var score_size, var self_attention,
            var cache_size, var n, var kept, var keeps, var stream_size, var memory, imm
        }:
            var phase = phases
            var none = Norm(stream, stream, 0)
            for layer in range(layers):
                var attn_ln = norm_of(attn_ln_weight, attn_ln_bias, layer)
                var cross_ln = norm_of(cross_attn_ln_weight, cross_attn_ln_bias, layer)
                var mlp_ln = norm_of(mlp_ln_weight, mlp_ln_bias, layer)
                var attention = self_attention
                attention.cache = attention.cache.unsafe_offset(layer * cache_size)

                @always_inline
                def attend(chunk: Int) {var attention, var heads, imm}:
                    """Self-attention of one head of one row."""
                    attention.run(chunk // heads, chunk % heads)

                @always_inline
                def cross_attend(
                    chunk: Int
                ) {
                    var hidden, var attended, var scores, var keys, var values, var slots, var n,
                    var group, var heads, var windows, var head_elements, var frames,
                    var score_size, var layer, imm
                }:
                    """Cross attention of one head, for all rows that share one window."""
                    var window = chunk // heads
                    var head = chunk % heads
                    var at = window * group * n + head * HEAD_DIM
                    var packed = ((layer * windows + window) * heads + head) * head_elements
                    var slot = Int(slots.unsafe_offset(layer * heads + head).unsafe_load())
                    Attention[cache_type, width, False](
                        output=attended.unsafe_offset(at),
                        output_stride=n,
                        query=hidden.unsafe_offset(at),
                        query_stride=n,
                        keys=keys.unsafe_offset(packed),
                        values=values.unsafe_offset(packed),
                        frames=frames,
                        raw_scores=scores.unsafe_offset(
                            max(slot, 0) * score_size + window * group * padded(frames)
                        ),
                        wants_scores=slot >= 0,
                    ).run(group)

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

        sync_parallelize(worker, team)
        if keeps:
            copy[width](stream, kept.unsafe_offset(2 * layers * stream_size), stream_size)
        phases.free()
        packed.unsafe_free()
        hidden.unsafe_free()


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
        var n = kv_bias.dim_size(1) // 2
        var heads = n // HEAD_DIM
        var layers = kv_bias.dim_size(0)
        var elements = keys.dim_size(3)
        var team = team_size(threads)
        var x = raw(features.unsafe_ptr())
        var to_keys = raw(keys.unsafe_ptr())
        var to_values = raw(values.unsafe_ptr())
        var to_copies = raw(copies.unsafe_ptr())
        var to_squares = raw(squares.unsafe_ptr())
        var copied = copies.dim_size(0) * frames
        comptime Layer = Projection[type, width, product, tiles]
        comptime Left = Layer.Left
        # Windows begin with whole tiles, so that tiles are of one window.
        var window_rows = align_up(frames, Left.at_once)
        var packed = unsafe_alloc[UInt8](Left.bytes(windows * window_rows, n), alignment=64)
        var left = Left.at(raw(packed), windows * window_rows, n)
        var blocks = ceildiv(frames, Left.rows_in_cache)
        var kv = Weights[type].of(kv_weight, kv_scale, kv_bias)
        var phases = Phases(2)

        def worker(
            index: Int
        ) {
            var x, var to_keys, var to_values, var to_copies, var to_squares, var copied,
            var phases, var windows, var frames, var n, var heads, var layers, var elements,
            var left, var window_rows, var blocks, imm
        }:
            var phase = phases
            var none = Norm(x, x, 0)
            var projected = unsafe_alloc[Float32](Left.rows_in_cache * HEAD_DIM, alignment=64)
            var panel_of_worker = unsafe_alloc[UInt8](Layer.Right.bytes, alignment=64)
            var right = Layer.Right.at(raw(panel_of_worker))

            @always_inline
            def pack(
                chunk: Int
            ) {
                var x, var to_copies, var to_squares, var copied, var left, var frames,
                var window_rows, var n, var none, imm
            }:
                """Packs some frames of the features."""
                var first = chunk * PACKED_ROWS
                for row in range(first, min(first + PACKED_ROWS, windows * frames)):
                    var frame = x.unsafe_offset(row * n)
                    if row < copied:  # once: another thread may be writing there
                        copy[width](frame, to_copies.unsafe_offset(row * n), n)
                        frame = to_copies.unsafe_offset(row * n)
                    left.pack(row // frames * window_rows + row % frames, frame, none)
                    to_squares.unsafe_offset(row).unsafe_store(sum_of_squares[width](frame, n))

            @always_inline
            def fill(
                chunk: Int
            ) {
                var x, var to_keys, var to_values, var projected, var windows, var frames, var n,
                var heads, var layers, var elements, var left, var right, var window_rows,
                var blocks, var none, imm
            }:
                """Keys or values of one head of a layer, of a block of a window's frames.

                All heads and layers of a block follow each other: its features are in the cache.
                """
                var of_block = 2 * heads * layers
                var window = chunk // of_block // blocks
                var first = chunk // of_block % blocks * Left.rows_in_cache
                var rows = min(Left.rows_in_cache, frames - first)
                var layer = chunk % of_block // (2 * heads)
                var of_values = chunk // heads % 2
                var head = chunk % heads
                comptime panels = HEAD_DIM // PANEL
                var part = linear[width, product, tiles](
                    x, x, rows, kv, layer, none
                ).panels_from((of_values * heads + head) * panels, panels, projected)
                comptime for panel in range(panels):
                    part.block(left, right, window * window_rows + first, 0, rows, panel)
                var to = ((layer * windows + window) * heads + head) * elements
                if of_values == 1:
                    pack_values[width, False](
                        projected,
                        HEAD_DIM,
                        rows,
                        to_values.unsafe_offset(to + first * PANEL),
                        padded(frames),
                    )
                else:
                    pack_keys[False](
                        projected, HEAD_DIM, rows, to_keys.unsafe_offset(to + first * HEAD_DIM)
                    )

            phase.run(ceildiv(windows * frames, PACKED_ROWS), pack)
            phase.run(windows * blocks * 2 * heads * layers, fill)
            panel_of_worker.unsafe_free()
            projected.unsafe_free()

        sync_parallelize(worker, team)
        packed.unsafe_free()
        phases.free()
