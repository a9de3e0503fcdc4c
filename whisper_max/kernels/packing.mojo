"""Weights from the rows that PyTorch keeps into the panels that the other kernels read."""

from std.math import ceildiv

import extensibility
from extensibility import InputTensor, OutputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from max.gpu.host import DeviceContext

from .gemm import F32, PANEL, Floats, Packed, raw
from .phases import in_one_phase, team_size

comptime LINES = 16
"""Numbers of 32 rows that are turned around at a time: a cache line of each row."""
comptime SHUFFLES = 5
"""The logarithm of PANEL, base 2."""
comptime SHARE = 1 << 16
"""Numbers that a worker claims at a time."""
comptime SMALLEST: Float32 = 1.5e-36
"""The largest number of a row of zeros: 1/127 of it, the scale, is still a normal float32."""


@fieldwise_init
struct Matrix[type: DType](ImplicitlyCopyable):
    """A matrix `[rows, length]`, and where its panels and the scales of its rows go."""

    var packed: Packed[Self.type]
    var scale: Floats
    var weight: Floats
    var rows: Int
    var length: Int

    def pack(self, panel: Int) -> Bool:
        """Packs 32 rows; those that are missing from the last panel are zero.

        Returns whether float16 rounded any of their numbers.
        """
        var first = panel * PANEL
        var count = min(PANEL, self.rows - first)
        var source = self.weight.unsafe_offset(first * self.length)
        var to = self.packed.unsafe_offset(first * self.length)
        var factors = Array[Float32, PANEL](fill=1)
        comptime if Self.type == DType.int8:
            for row in range(count):
                factors[row] = self.scale_of(source.unsafe_offset(row * self.length))
                self.scale.unsafe_offset(first + row).unsafe_store(factors[row])

        var lost = False
        for k in range(0, self.length, LINES):
            var lines = min(LINES, self.length - k)
            var block = Array[SIMD[Self.type, LINES], PANEL](fill=0)
            for row in range(count):
                var at = source.unsafe_offset(row * self.length + k)
                var numbers = SIMD[F32, LINES](0)
                if lines == LINES:
                    numbers = at.unsafe_load[width=LINES]()
                else:
                    for i in range(lines):
                        numbers[i] = at.unsafe_offset(i).unsafe_load()
                block[row] = Self.held(numbers, factors[row])
                comptime if Self.type == DType.float16:
                    lost |= block[row].cast[F32]().ne(numbers).reduce_or()
            store_transposed(block, to.unsafe_offset(k * PANEL), lines)
        return lost

    def scale_of(self, row: Floats) -> Float32:
        """What int8's 1 stands for in a row, whose largest number is 127."""
        var largest = SIMD[F32, LINES](0)
        var whole = self.length - self.length % LINES
        for k in range(0, whole, LINES):
            largest = max(largest, abs(row.unsafe_offset(k).unsafe_load[width=LINES]()))
        var found = largest.reduce_max()
        for k in range(whole, self.length):
            found = max(found, abs(row.unsafe_offset(k).unsafe_load()))
        return max(found, SMALLEST) / 127

    @staticmethod
    @always_inline
    def held(numbers: SIMD[F32, LINES], factor: Float32) -> SIMD[Self.type, LINES]:
        """The numbers as they are stored: in int8 the nearest, and of two the even one."""
        comptime if Self.type == DType.int8:
            return round(numbers / factor).cast[Self.type]()
        else:
            return numbers.cast[Self.type]()


@always_inline
def store_transposed[
    type: DType, //
](mut block: Array[SIMD[type, LINES], PANEL], to: Packed[type], lines: Int = LINES):
    """Stores 32 rows of 16 as the first of 16 lines of 32.

    Each shuffle makes one more bit of the row the lowest of the place.
    """
    comptime for _ in range(SHUFFLES):
        var shuffled = Array[SIMD[type, LINES], PANEL](fill=0)
        comptime for i in range(PANEL // 2):
            var both = block[i].interleave(block[i + PANEL // 2])
            shuffled[2 * i] = both.slice[LINES]()
            shuffled[2 * i + 1] = both.slice[LINES, offset=LINES]()
        block = shuffled^
    comptime for i in range(PANEL):
        if i < 2 * lines:
            to.unsafe_offset(i * LINES).unsafe_store(block[i])


@fieldwise_init
struct Layers[type: DType](ImplicitlyCopyable):
    """The matrices of all layers, each layer's parts one below the other, and their room.

    `part_panels`: of one matrix. `share`: panels that a worker claims at a time, `shares`: of one
    matrix.
    """

    var inexact: Packed[DType.int32]
    var packed: Packed[Self.type]
    var scales: Floats
    var sources: Packed[DType.int64]
    var parts: Int
    var rows: Int
    var length: Int
    var part_panels: Int
    var share: Int
    var shares: Int

    def pack(self, chunk: Int):
        """Packs one share of one matrix."""
        var number = chunk // self.shares
        var address = Int(self.sources.unsafe_offset(number).unsafe_load())
        var matrix = Matrix[Self.type](
            self.packed.unsafe_offset(number * self.part_panels * self.length * PANEL),
            self.scales.unsafe_offset(number * self.rows),
            Floats(unsafe_from_address=address),
            self.rows,
            self.length,
        )
        var begin = (chunk % self.shares) * self.share
        for panel in range(begin, min(begin + self.share, self.part_panels)):
            if matrix.pack(panel):
                self.inexact.unsafe_offset(
                    (number % self.parts) * self.part_panels + panel
                ).unsafe_store(1)


@extensibility.register("whisper_pack")
struct Pack:
    @staticmethod
    def execute[
        target: StaticString, type: DType, //
    ](
        inexact: OutputTensor[dtype=DType.int32, rank=1, ...],
        packed: MutableInputTensor[dtype=type, rank=4, ...],
        scale: MutableInputTensor[dtype=F32, rank=2, ...],
        sources: InputTensor[dtype=DType.int64, rank=2, ...],
        rows: InputTensor[dtype=DType.int32, rank=1, ...],
        threads: InputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Writes the matrices of all layers into packed, (layers, panels, in, 32).

        sources: (layers, parts); the addresses of float32 matrices, (rows[0], in) each, that stand
        below one another. scale: (layers, out), for int8, or of another size.
        inexact: (panels,); 1 where float16 does not hold every number of a panel, in any layer.
        """
        for i in range(inexact.dim_size(0)):
            inexact.unsafe_ptr().unsafe_offset(i).unsafe_store(0)
        var length = packed.dim_size(2)
        var share = max(1, SHARE // (PANEL * max(1, length)))
        var part_panels = packed.dim_size(1) // sources.dim_size(1)
        var layers = Layers[type](
            raw(inexact.unsafe_ptr()),
            raw(packed.unsafe_ptr()),
            raw(scale.unsafe_ptr()),
            raw(sources.unsafe_ptr()),
            sources.dim_size(1),
            Int(rows.unsafe_ptr().unsafe_load()),
            length,
            part_panels,
            share,
            ceildiv(part_panels, share),
        )
        var chunks = sources.dim_size(0) * layers.parts * layers.shares

        def pack(chunk: Int) {var layers}:
            layers.pack(chunk)

        in_one_phase(chunks, team_size(threads), pack)
