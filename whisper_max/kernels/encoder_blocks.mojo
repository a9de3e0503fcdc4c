"""The residual attention blocks of the encoder, all layers in one op."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from std.math import ceildiv
from std.memory.alloc import unsafe_alloc
from std.sys import size_of

from .attention import Attention
from .gemm import F32, Bytes, Floats, Packed, copy, raw
from .keys_and_values import HEAD_DIM, head_size, pack_keys, pack_values, padded
from .layers import Weights, linear, norm_of
from .norm import Norm
from .phases import Phases, team_size
from .products import PackedRows
from .projection import FEW_ROWS, PROJECT_PHASES, Projection, project

comptime QUERY_ROWS = 192
"""Queries of one head that one worker attends with at a time."""


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
