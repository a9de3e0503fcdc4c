"""What stands before and after the blocks: convolution, embedding, norms, single projections."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from std.math import ceildiv
from std.memory.alloc import unsafe_alloc

from .gemm import F32, PANEL, copy, raw
from .phases import Phases, in_one_phase, team_size
from .norm import Norm
from .projection import PROJECT_PHASES, Projection, project

comptime FRAME_BLOCK = 256
"""Frames that one worker takes patches of."""
comptime NORM_BLOCK = 128
"""Rows that one worker normalizes."""


@extensibility.register("whisper_linear")
struct Linear:
    @staticmethod
    def execute[
        target: StaticString, type: DType, //, width: Int, product: DType, tiles: Bool
    ](
        output: OutputTensor[dtype=F32, rank=3, ...],
        x: InputTensor[dtype=F32, rank=3, ...],
        ln_weight: InputTensor[dtype=F32, rank=1, ...],
        ln_bias: InputTensor[dtype=F32, rank=1, ...],
        weight: InputTensor[dtype=type, rank=3, ...],
        scale: InputTensor[dtype=F32, rank=1, ...],
        bias: InputTensor[dtype=F32, rank=1, ...],
        residual: InputTensor[dtype=F32, rank=2, ...],
        threads: InputTensor[dtype=DType.int32, rank=1, ...],
        gelu: Int32,
        ctx: DeviceContext,
    ) raises:
        """One linear layer. ln_weight, scale or residual of another size: without it.

        x: (batch, length, in); weight: (panels, in, 32); output: (batch, length, out). residual:
        (length, out), the same for the whole batch.
        """
        var columns = bias.dim_size(0)
        var length = x.dim_size(2)
        var projection = Projection[type, width, product, tiles](
            output=raw(output.unsafe_ptr()),
            x=raw(x.unsafe_ptr()),
            weight=raw(weight.unsafe_ptr()),
            scale=raw(scale.unsafe_ptr()),
            bias=raw(bias.unsafe_ptr()),
            residual=raw(residual.unsafe_ptr()),
            norm=Norm(
                raw(ln_weight.unsafe_ptr()),
                raw(ln_bias.unsafe_ptr()),
                length if ln_weight.dim_size(0) == length else 0,
            ),
            rows=x.dim_size(0) * x.dim_size(1),
            length=length,
            columns=columns,
            residual_rows=residual.dim_size(0) if residual.dim_size(1) == columns else 0,
            scaled=scale.dim_size(0) == columns,
            gelu=gelu == 1,
            packs_output=False,
        )
        var team = team_size(threads)
        var phases = Phases(PROJECT_PHASES, team)
        var packed = unsafe_alloc[UInt8](
            projection.packed_bytes(projection.rows, length), alignment=64
        )
        var memory = raw(packed)

        def worker(index: Int) {var phases, var team, var projection, var memory, imm}:
            var phase = phases.of(index)
            project(phase, team, projection, memory)

        sync_parallelize(worker, team)
        packed.unsafe_free()
        phases.free()


@extensibility.register("whisper_conv_patches")
struct ConvPatches:
    @staticmethod
    def execute[
        target: StaticString, channels_first: Bool, stride: Int, width: Int
    ](
        output: OutputTensor[dtype=F32, rank=3, ...],
        x: InputTensor[dtype=F32, rank=3, ...],
        threads: InputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """The patches that a convolution of width 3 and padding 1 multiplies.

        x: (batch, channels, frames) or (batch, frames, channels); output: (batch, out_frames,
        3 * channels), out_frames = ceil(frames / stride).
        """
        comptime channel_axis = 1 if channels_first else 2
        var channels = x.dim_size(channel_axis)
        var frames = x.dim_size(3 - channel_axis)
        var out_frames = output.dim_size(1)
        var source = raw(x.unsafe_ptr())
        var to = raw(output.unsafe_ptr())

        var blocks = ceildiv(out_frames, FRAME_BLOCK)

        def block(
            index: Int
        ) {
            var source, var to, var channels, var frames, var out_frames, var blocks, imm
        }:
            var batch = index // blocks
            var begin = (index % blocks) * FRAME_BLOCK
            var first = source.unsafe_offset(batch * channels * frames)
            for frame in range(begin, min(begin + FRAME_BLOCK, out_frames)):
                for tap in range(3):
                    var at = frame * stride + tap - 1
                    var row = to.unsafe_offset(
                        ((batch * out_frames + frame) * 3 + tap) * channels
                    )
                    if at < 0 or at >= frames:
                        for c in range(channels):
                            row.unsafe_offset(c).unsafe_store(Float32(0))
                    elif channels_first:
                        for c in range(channels):
                            row.unsafe_offset(c).unsafe_store(
                                first.unsafe_offset(c * frames + at).unsafe_load()
                            )
                    else:
                        copy[width](first.unsafe_offset(at * channels), row, channels)

        in_one_phase(x.dim_size(0) * blocks, team_size(threads), block)


@extensibility.register("whisper_layer_norm")
struct LayerNorm:
    @staticmethod
    def execute[
        target: StaticString, //, width: Int
    ](
        output: OutputTensor[dtype=F32, rank=3, ...],
        x: InputTensor[dtype=F32, rank=3, ...],
        weight: InputTensor[dtype=F32, rank=1, ...],
        bias: InputTensor[dtype=F32, rank=1, ...],
        threads: InputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """LayerNorm over the last axis."""
        var n = x.dim_size(2)
        var rows = x.dim_size(0) * x.dim_size(1)
        var norm = Norm(raw(weight.unsafe_ptr()), raw(bias.unsafe_ptr()), n)
        var source = raw(x.unsafe_ptr())
        var to = raw(output.unsafe_ptr())

        def block(index: Int) {var norm, var source, var to, var rows, var n, imm}:
            for row in range(index * NORM_BLOCK, min((index + 1) * NORM_BLOCK, rows)):
                norm.copy_row[width](source.unsafe_offset(row * n), n, to.unsafe_offset(row * n))

        if rows <= NORM_BLOCK:  # sooner done than a worker is woken
            block(0)
        else:
            in_one_phase(ceildiv(rows, NORM_BLOCK), team_size(threads), block)


@extensibility.register("whisper_embed")
struct Embed:
    @staticmethod
    def execute[
        target: StaticString, type: DType, //
    ](
        output: OutputTensor[dtype=F32, rank=3, ...],
        tokens: InputTensor[dtype=DType.int32, rank=2, ...],
        position: InputTensor[dtype=DType.int32, rank=1, ...],
        weight: InputTensor[dtype=type, rank=3, ...],
        scale: InputTensor[dtype=F32, rank=1, ...],
        positional: InputTensor[dtype=F32, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Token embedding, taken out of the packed (panels, n_state, 32) matrix, plus position.

        tokens: (rows, tokens); output: (rows, tokens, n_state); positions start at position[0].
        """
        var count = tokens.dim_size(1)
        var n = output.dim_size(2)
        var offset = Int(position.unsafe_ptr().unsafe_load())
        var scaled = scale.dim_size(0) > 1
        for row in range(tokens.dim_size(0) * count):
            var token = Int(tokens.unsafe_ptr().unsafe_offset(row).unsafe_load())
            var factor = scale.unsafe_ptr().unsafe_offset(token).unsafe_load() if scaled else 1
            for k in range(n):
                var embedded = weight.unsafe_ptr().unsafe_offset(
                    ((token // PANEL) * n + k) * PANEL + token % PANEL
                ).unsafe_load().cast[F32]()
                output.unsafe_ptr().unsafe_offset(row * n + k).unsafe_store(
                    embedded * factor
                    + positional.unsafe_ptr()
                    .unsafe_offset((offset + row % count) * n + k)
                    .unsafe_load()
                )
