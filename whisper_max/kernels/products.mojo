"""Blocks multiplied in float32, bfloat16 or int8, and how each of them wants its operands.

The instructions for half-width and 8-bit numbers add up groups of neighbours along the shared
axis: two bfloat16 or four int8 make one 32-bit word. So the rows of the left operand stay as they
are, and a panel of the right one holds a group of each column next to each other,
`[length / group, 32, group]`. All sums are float32 or exact int32.

Matrix tiles read the same, the length filled up to whole steps with zeros; with them float32, too,
is made of products of bfloat16 (tiles.mojo).
"""

from std.math import align_up, ceildiv
from std.memory import bitcast, unsafe_stack_allocation
from std.memory.alloc import unsafe_alloc
from std.sys import llvm_intrinsic

from .gemm import F32, PANEL, Floats, Packed, accumulate, copy, tile_rows
from .tiles import SIDE, STEP_BYTES, TILE_ROWS, begin_tiles, end_tiles, multiply_tiles, parts_of

comptime BF16 = DType.bfloat16
comptime I8 = DType.int8
comptime I32 = DType.int32
comptime WORDS = 16
"""32-bit words in the vectors of those instructions, which only CPUs with AVX-512 have."""
comptime Words = Pointer[UInt32, MutUntrackedOrigin]
comptime Integers = Pointer[Int32, MutUntrackedOrigin]

comptime PAIRS_STEP = STEP_BYTES // 2
"""Of bfloat16, the numbers in a step of a tile."""
comptime BLOCK_LENGTH = 512
comptime SMALLEST: Float32 = 1e-30
"""Of the largest number in a quantized row, so that a row of zeros has a scale."""
comptime INT8_ZERO = 128
"""Added to quantized activations: vpdpbusd takes the left operand without a sign."""


@always_inline
def words_of[type: DType](pointer: Packed[type]) -> Words:
    """The same memory as 32-bit words."""
    return Words(unsafe_from_address=Int(pointer))


@always_inline
def dot_pairs(
    sums: SIMD[F32, WORDS], word: UInt32, panel: SIMD[BF16, 2 * WORDS]
) -> SIMD[F32, WORDS]:
    """Adds the products of one pair of bfloat16 with the pairs of 16 columns."""
    return llvm_intrinsic["llvm.x86.avx512bf16.dpbf16ps.512", SIMD[F32, WORDS]](
        sums, bitcast[BF16, 2 * WORDS](SIMD[DType.uint32, WORDS](word)), panel
    )


@always_inline
def dot_fours(
    sums: SIMD[I32, WORDS], word: UInt32, panel: SIMD[I8, 4 * WORDS]
) -> SIMD[I32, WORDS]:
    """Adds the products of four unsigned bytes with four signed ones of each of 16 columns."""
    return llvm_intrinsic["llvm.x86.avx512.vpdpbusd.512", SIMD[I32, WORDS]](
        sums, bitcast[DType.uint8, 4 * WORDS](SIMD[DType.uint32, WORDS](word)), panel
    )


@always_inline
def accumulate_pairs[
    rows: Int
](
    mut sums: Array[SIMD[F32, WORDS], 2 * rows],
    a: Packed[BF16],
    row_stride: Int,
    panel: Packed[BF16],
    length: Int,
):
    """Adds `a[rows, length] @ panel`, the panel as pairs; `row_stride` in numbers."""
    var words = words_of(a)
    for pair in range(ceildiv(length, 2)):
        var line = panel.unsafe_offset(2 * pair * PANEL)
        var left = line.unsafe_load[width=2 * WORDS]()
        var right = line.unsafe_offset(2 * WORDS).unsafe_load[width=2 * WORDS]()
        comptime for r in range(rows):
            var x = words.unsafe_offset(r * (row_stride // 2) + pair).unsafe_load()
            sums[2 * r] = dot_pairs(sums[2 * r], x, left)
            sums[2 * r + 1] = dot_pairs(sums[2 * r + 1], x, right)


@always_inline
def accumulate_fours[
    rows: Int
](
    mut sums: Array[SIMD[I32, WORDS], 2 * rows],
    a: Packed[I8],
    row_stride: Int,
    panel: Packed[I8],
    length: Int,
):
    """Adds `a[rows, length] @ panel`, the panel as fours; `a` holds unsigned bytes."""
    var words = words_of(a)
    for four in range(ceildiv(length, 4)):
        var line = panel.unsafe_offset(4 * four * PANEL)
        var left = line.unsafe_load[width=4 * WORDS]()
        var right = line.unsafe_offset(4 * WORDS).unsafe_load[width=4 * WORDS]()
        comptime for r in range(rows):
            var x = words.unsafe_offset(r * (row_stride // 4) + four).unsafe_load()
            sums[2 * r] = dot_fours(sums[2 * r], x, left)
            sums[2 * r + 1] = dot_fours(sums[2 * r + 1], x, right)


@always_inline
def store_bfloat16[parts: Int = 1](source: Floats, to: Packed[BF16], count: Int):
    """Rounds `count` floats; `to` may be the beginning of the source itself.

    A multiple of 16 of them, or of 32 where what rounding takes away is stored as well.
    """
    comptime width = WORDS if parts == 1 else PAIRS_STEP
    for i in range(0, count, width):
        var x = source.unsafe_offset(i).unsafe_load[width=width]()
        var rounded = x.cast[BF16]()
        to.unsafe_offset(parts * i).unsafe_store(rounded)
        comptime if parts == 2:
            to.unsafe_offset(parts * i + width).unsafe_store((x - rounded.cast[F32]()).cast[BF16]())


@always_inline
def line_of[type: DType](panel: Packed[type], k: Int, length: Int) -> SIMD[type, PANEL]:
    """Line `k` of a packed panel; zeros behind its end, to fill the last group."""
    if k < length:
        return panel.unsafe_offset(k * PANEL).unsafe_load[width=PANEL]()
    return SIMD[type, PANEL](0)


@always_inline
def store_pairs[
    parts: Int
](first: SIMD[F32, PANEL], second: SIMD[F32, PANEL], panel: Packed[BF16], k: Int):
    """One line of a panel of pairs, from the neighbours `k` and `k + 1` along the shared axis."""
    var to = panel.unsafe_offset((k + (parts - 1) * (k - k % PAIRS_STEP)) * PANEL)
    var left = first.cast[BF16]()
    var right = second.cast[BF16]()
    to.unsafe_store(left.interleave(right))
    comptime if parts == 2:
        var rest = (first - left.cast[F32]()).cast[BF16]()
        to.unsafe_offset(PAIRS_STEP * PANEL).unsafe_store(
            rest.interleave((second - right.cast[F32]()).cast[BF16]())
        )


def quantize(source: Floats, to: Packed[I8], count: Int) -> Float32:
    """Rounds `count` floats, a multiple of 16, to 8 bits around INT8_ZERO; returns their scale."""
    var largest = SIMD[F32, WORDS](0)
    for i in range(0, count, WORDS):
        largest = max(largest, abs(source.unsafe_offset(i).unsafe_load[width=WORDS]()))
    var scale = max(largest.reduce_max(), SMALLEST) / 127
    var inverse = 1 / scale
    for i in range(0, count, WORDS):
        var x = round(source.unsafe_offset(i).unsafe_load[width=WORDS]() * inverse)
        to.unsafe_offset(i).unsafe_store((x.cast[I32]() + INT8_ZERO).cast[I8]())
    return scale


struct Block[product: DType, width: Int, tiles: Bool](ImplicitlyCopyable):
    """Rows of a left operand, and one panel of the right one after the other, to be multiplied.

    product : float32, bfloat16 or int8
    tiles : whether matrix tiles multiply; the block must be freed by the thread that made it
    """

    comptime parts = parts_of[Self.product, Self.tiles]()
    comptime held = BF16 if Self.parts == 2 else Self.product
    comptime at_once = SIDE if Self.tiles else tile_rows[Self.width]()
    """Rows that are multiplied at a time."""
    comptime step = 1 if not Self.tiles else STEP_BYTES if Self.held == I8 else PAIRS_STEP
    """Rows and panels are filled up to a multiple of it, with zeros."""
    comptime length = BLOCK_LENGTH // Self.parts
    """Of a row, at most: the panel stays in the first-level cache."""
    comptime stride = BLOCK_LENGTH + (STEP_BYTES if Self.tiles and Self.held == I8 else 32)
    """Row distance: constant, and rows fall into different cache sets."""

    var rows: Packed[Self.held]
    var panel: Packed[Self.held]
    var line: Floats
    """One row before it is rounded."""
    var scales: Floats
    """Of the rows, for int8."""
    var corrections: Integers
    """What INT8_ZERO adds to the sums of each column of the panel."""

    def __init__(out self, rows: Int):
        """Room for `rows` rows, and for those that fill the last `at_once` up."""
        var whole = align_up(rows, Self.at_once)
        self.rows = unsafe_alloc[Scalar[Self.held]](whole * Self.stride, alignment=64)
        self.panel = unsafe_alloc[Scalar[Self.held]](BLOCK_LENGTH * PANEL, alignment=64)
        self.line = unsafe_alloc[Float32](BLOCK_LENGTH, alignment=64)
        self.scales = unsafe_alloc[Float32](whole)
        self.corrections = unsafe_alloc[Int32](PANEL, alignment=64)
        comptime if Self.tiles:
            begin_tiles()

    def free(self):
        """Releases the memory and the tiles, once."""
        comptime if Self.tiles:
            end_tiles()
        self.rows.unsafe_free()
        self.panel.unsafe_free()
        self.line.unsafe_free()
        self.scales.unsafe_free()
        self.corrections.unsafe_free()

    @always_inline
    def room(self, row: Int) -> Floats:
        """Where `take_row` wants to find a row: in its place already, if it stays in float32."""
        comptime if Self.held == F32:
            return Floats(unsafe_from_address=Int(self.rows.unsafe_offset(row * Self.stride)))
        return self.line

    @always_inline
    def take_row(self, row: Int, length: Int):
        """Takes the row that was written to `room(row)`."""
        var to = self.rows.unsafe_offset(row * Self.stride)
        var whole = align_up(length, max(WORDS, Self.step))
        comptime if Self.held != F32:
            for i in range(length, whole):
                self.line.unsafe_offset(i).unsafe_store(Float32(0))
        comptime if Self.held == BF16:
            store_bfloat16[Self.parts](
                self.line, Packed[BF16](unsafe_from_address=Int(to)), whole
            )
        comptime if Self.held == I8:
            var scale = quantize(self.line, Packed[I8](unsafe_from_address=Int(to)), whole)
            self.scales.unsafe_offset(row).unsafe_store(scale)

    def take_panel[type: DType](self, source: Packed[type], length: Int):
        """Takes a packed panel, `[length, 32]`."""
        comptime if Self.held == F32:
            var to = Floats(unsafe_from_address=Int(self.panel))
            for i in range(0, length * PANEL, Self.width):
                to.unsafe_offset(i).unsafe_store(
                    source.unsafe_offset(i).unsafe_load[width=Self.width]().cast[F32]()
                )
        comptime if Self.held == BF16:
            var to = Packed[BF16](unsafe_from_address=Int(self.panel))
            for k in range(0, align_up(length, Self.step), 2):
                store_pairs[Self.parts](
                    line_of(source, k, length).cast[F32](),
                    line_of(source, k + 1, length).cast[F32](),
                    to,
                    k,
                )
        comptime if Self.held == I8:
            self.take_int8_panel(Packed[I8](unsafe_from_address=Int(source)), length)

    def take_int8_panel(self, source: Packed[I8], length: Int):
        """Takes a panel that is int8 already."""
        var to = Packed[I8](unsafe_from_address=Int(self.panel))
        var total = SIMD[I32, PANEL](0)
        for k in range(0, align_up(length, Self.step), 4):
            var first = line_of(source, k, length)
            var second = line_of(source, k + 1, length)
            var third = line_of(source, k + 2, length)
            var fourth = line_of(source, k + 3, length)
            to.unsafe_offset(k * PANEL).unsafe_store(
                first.interleave(third).interleave(second.interleave(fourth))
            )
            total += (
                first.cast[I32]() + second.cast[I32]() + third.cast[I32]() + fourth.cast[I32]()
            )
        self.corrections.unsafe_store(total * INT8_ZERO)

    @always_inline
    def multiply(self, row: Int, length: Int, to: Floats):
        """The sums of `at_once` rows from `row` on with the panel, `[at_once, 32]` in float32."""
        var a = self.rows.unsafe_offset(row * Self.stride)
        comptime if Self.tiles:
            multiply_tiles[Self.parts](
                a, Self.stride, self.panel, ceildiv(length, Self.step), to, PANEL
            )
        elif Self.held == F32:
            self.multiply_floats(Floats(unsafe_from_address=Int(a)), length, to)
        elif Self.held == BF16:
            var sums = Array[SIMD[F32, WORDS], 2 * Self.at_once](fill=SIMD[F32, WORDS](0))
            accumulate_pairs[Self.at_once](
                sums,
                Packed[BF16](unsafe_from_address=Int(a)),
                Self.stride,
                Packed[BF16](unsafe_from_address=Int(self.panel)),
                length,
            )
            comptime for i in range(2 * Self.at_once):
                to.unsafe_offset(i * WORDS).unsafe_store(sums[i])
        else:
            var sums = Array[SIMD[I32, WORDS], 2 * Self.at_once](fill=SIMD[I32, WORDS](0))
            accumulate_fours[Self.at_once](
                sums,
                Packed[I8](unsafe_from_address=Int(a)),
                Self.stride,
                Packed[I8](unsafe_from_address=Int(self.panel)),
                length,
            )
            comptime for i in range(2 * Self.at_once):
                to.unsafe_offset(i * WORDS).unsafe_store(self.widen(sums[i], row, i))
        comptime if Self.tiles and Self.held == I8:
            var sums = Integers(unsafe_from_address=Int(to))
            for i in range(2 * Self.at_once):
                var sum = sums.unsafe_offset(i * WORDS).unsafe_load[width=WORDS]()
                to.unsafe_offset(i * WORDS).unsafe_store(self.widen(sum, row, i))

    @always_inline
    def multiply_floats(self, a: Floats, length: Int, to: Floats):
        """The same in float32."""
        comptime for part in range(PANEL // (2 * Self.width)):
            var sums = Array[SIMD[F32, Self.width], 2 * Self.at_once](
                fill=SIMD[F32, Self.width](0)
            )
            accumulate[Self.at_once, Self.width](
                sums,
                a,
                Self.stride,
                self.panel.unsafe_offset(part * 2 * Self.width),
                length,
            )
            comptime for i in range(2 * Self.at_once):
                to.unsafe_offset(
                    (i // 2) * PANEL + (2 * part + i % 2) * Self.width
                ).unsafe_store(sums[i])

    @always_inline
    def widen(self, sums: SIMD[I32, WORDS], row: Int, i: Int) -> SIMD[F32, WORDS]:
        """Half `i` of the sums of the rows from `row` on with the panel, in float32."""
        var excess = self.corrections.unsafe_offset((i % 2) * WORDS).unsafe_load[width=WORDS]()
        var scale = self.scales.unsafe_offset(row + i // 2).unsafe_load()
        return (sums - excess).cast[F32]() * scale
