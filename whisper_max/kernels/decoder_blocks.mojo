"""The residual attention blocks of the decoder, all layers and the logits in one op."""

import extensibility
from extensibility import InputTensor, OutputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from std.memory.alloc import unsafe_alloc

from .attention import Attention
from .gemm import F32, Floats, Packed, copy, raw
from .keys_and_values import HEAD_DIM, padded
from .layers import Weights, linear, norm_of
from .norm import Norm
from .phases import Phases, team_size
from .products import Integers
from .projection import PROJECT_PHASES, Projection, project
from .self_attention import SelfAttention


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
