"""Blocks multiplied in float32, bfloat16 or int8, and how each of them wants its operands.

The instructions for half-width and 8-bit numbers add up groups of neighbours along the shared
axis: two bfloat16, two int16 or four int8 make one 32-bit word. So the rows of the left operand
stay as they are, and a panel of the right one holds a group of each column next to each other,
`[length / group, 32, group]`. All sums are float32 or exact int32.

Matrix tiles read the same, the length filled up to whole steps with zeros; with them float32, too,
is made of products of bfloat16 (tiles.mojo).
"""

from std.math import align_up, ceildiv
from std.memory import bitcast, unsafe_stack_allocation
from std.sys import llvm_intrinsic, size_of

from .gemm import F32, PANEL, Bytes, Floats, Packed, accumulate, fetch, raw, tile_rows
from .norm import Norm
from .tiles import STEP_BYTES, TILE_ROWS, multiply_tiles, nothing, parts_of

comptime BF16 = DType.bfloat16
comptime I8 = DType.int8
comptime I16 = DType.int16
comptime I32 = DType.int32
comptime WORDS = 16
"""32-bit words in the vectors of those instructions, which only CPUs with AVX-512 have."""
comptime Words = Pointer[UInt32, MutUntrackedOrigin]
comptime Integers = Pointer[Int32, MutUntrackedOrigin]

comptime PAIRS_STEP = STEP_BYTES // 2
"""Of bfloat16, the numbers in a step of a tile."""
comptime BLOCK_LENGTH = 512
"""Numbers of the shared axis that are multiplied at a time."""
comptime BLOCK_STEP = 64
"""Blocks along the shared axis are multiples of it: none cuts a panel or a head."""
comptime CACHED_BYTES = 192 * 544 * 4
"""Of a left operand: less than half of the smallest second-level cache beside AVX-512. Tiles, which
wait for each line, get half of that, which was measured to be the fastest."""
comptime ROWS_STEP = 96
"""Blocks of rows are made of whole tiles, of 12 rows or 16, and of whole panels of keys."""
comptime SMALLEST: Float32 = 1e-30
"""Of the largest number in a quantized row, so that a row of zeros has a scale."""
comptime INT8_ZERO = 128
"""Added to quantized activations: vpdpbusd takes the left operand without a sign."""
comptime INT16_LARGEST = 32767
"""Of activations in 16 bits: their products with 8 bits of BLOCK_LENGTH inputs fit 32."""


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
def dot_int16(
    sums: SIMD[I32, WORDS], word: UInt32, panel: SIMD[I16, 2 * WORDS]
) -> SIMD[I32, WORDS]:
    """Adds the products of one pair of 16-bit integers with the pairs of 16 columns."""
    return llvm_intrinsic["llvm.x86.avx512.vpdpwssd.512", SIMD[I32, WORDS]](
        sums, bitcast[I16, 2 * WORDS](SIMD[DType.uint32, WORDS](word)), panel
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
def accumulate_int16[
    type: DType, //, rows: Int
](
    mut sums: Array[SIMD[I32, WORDS], 2 * rows],
    a: Packed[I16],
    row_stride: Int,
    panel: Packed[type],
    length: Int,
):
    """Adds `a[rows, length] @ panel`, the panel as it is packed, of bytes, streamed from memory.

    The length is at most BLOCK_LENGTH.
    """
    comptime assert BLOCK_LENGTH * INT16_LARGEST * 127 < 1 << 31
    var words = words_of(a)
    for pair in range(ceildiv(length, 2)):
        var k = 2 * pair
        fetch[rows, 2 * PANEL](panel.unsafe_offset(k * PANEL))
        var first = line_of(panel, k, length).cast[I16]()
        var both = first.interleave(line_of(panel, k + 1, length).cast[I16]())
        var left = both.slice[2 * WORDS]()
        var right = both.slice[2 * WORDS, offset=2 * WORDS]()
        comptime for r in range(rows):
            var x = words.unsafe_offset(r * (row_stride // 2) + pair).unsafe_load()
            sums[2 * r] = dot_int16(sums[2 * r], x, left)
            sums[2 * r + 1] = dot_int16(sums[2 * r + 1], x, right)


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
def split_in_place(step: Floats):
    """Makes two parts of the float32 numbers of a step, where they stand."""
    store_bfloat16[2](step, Packed[BF16](unsafe_from_address=Int(step)), PAIRS_STEP)


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


def quantize[type: DType](source: Floats, to: Packed[type], count: Int) -> Float32:
    """Rounds `count` floats, a multiple of 16, to integers; returns their scale.

    type : int8, around INT8_ZERO, or int16
    """
    comptime largest_integer: Float32 = 127 if type == I8 else INT16_LARGEST
    comptime zero: Int32 = INT8_ZERO if type == I8 else 0
    # By their bits, of which those of NaN are the largest: it becomes the scale, and the results.
    var largest = SIMD[I32, WORDS](bitcast[I32](SMALLEST))
    for i in range(0, count, WORDS):
        var magnitudes = abs(source.unsafe_offset(i).unsafe_load[width=WORDS]())
        largest = max(largest, bitcast[I32, WORDS](magnitudes))
    var scale = bitcast[F32](largest.reduce_max()) / largest_integer
    var inverse = 1 / scale
    for i in range(0, count, WORDS):
        var x = round(source.unsafe_offset(i).unsafe_load[width=WORDS]() * inverse)
        to.unsafe_offset(i).unsafe_store((x.cast[I32]() + zero).cast[type]())
    return scale


@fieldwise_init
struct PackedRows[product: DType, width: Int, tiles: Bool](ImplicitlyCopyable):
    """The left operand of a product, packed once for all workers; few rows by each for itself.

    Cut along the shared axis into blocks, `[blocks, rows, stride]`; `rows` fill the last tile up.
    Where `product` is int8 or int16, every row of a block has a scale.

    product : float32, bfloat16, int8 or int16
    tiles : whether matrix tiles multiply
    """

    comptime parts = parts_of[Self.product, Self.tiles]()
    comptime stored = BF16 if Self.parts == 2 else Self.product
    comptime at_once = (
        TILE_ROWS if Self.tiles else 1 if Self.product == I16 else tile_rows[Self.width]()
    )
    """Rows that are multiplied at a time; of int16, which few rows are, as many as there are."""
    comptime step = 1 if not Self.tiles else STEP_BYTES if Self.stored == I8 else PAIRS_STEP
    """Rows and panels are filled up to a multiple of it, with zeros."""
    comptime block_length = BLOCK_LENGTH // (2 if Self.tiles and Self.stored == BF16 else 1)
    """Of the shared axis, at most: a panel of it stays in the caches of a core."""
    comptime stride = Self.parts * Self.block_length + (
        STEP_BYTES if Self.tiles and Self.stored == I8 else 32
    )
    """Row distance: constant, and rows fall into different cache sets."""
    comptime takes_floats = Self.stored == F32 or Self.parts == 2
    """Whether numbers take as much memory as in float32: an output is packed where it stands."""
    comptime float_stride = Self.stride * size_of[Scalar[Self.stored]]() // size_of[Float32]()
    """Row distance of such, in float32."""
    comptime rows_in_cache = (
        CACHED_BYTES
        // (2 if Self.tiles else 1)
        // (Self.stride * size_of[Scalar[Self.stored]]())
        // ROWS_STEP
        * ROWS_STEP
    )
    """Rows of a block that stay in the second-level cache."""

    var numbers: Packed[Self.stored]
    var scales: Floats
    var rows: Int
    var length: Int

    @staticmethod
    def bytes(rows: Int, length: Int) -> Int:
        """What `rows` rows take at most, be they `length` or fewer numbers long."""
        var whole = align_up(rows, Self.at_once) * ceildiv(length, Self.block_length)
        return whole * (Self.stride * size_of[Scalar[Self.stored]]() + size_of[Float32]())

    @staticmethod
    def at(memory: Bytes, rows: Int, length: Int) -> Self:
        """Rows to be taken into `memory`, which is aligned to cache lines."""
        var whole = align_up(rows, Self.at_once)
        var numbers = Packed[Self.stored](unsafe_from_address=Int(memory))
        var scales = numbers.unsafe_offset(whole * ceildiv(length, Self.block_length) * Self.stride)
        return Self(numbers, Floats(unsafe_from_address=Int(scales)), whole, length)

    @always_inline
    def length_of_blocks(self) -> Int:
        """Along the shared axis: all are of one length, but for the last."""
        return align_up(ceildiv(self.length, self.blocks()), BLOCK_STEP)

    @always_inline
    def blocks(self) -> Int:
        """Into how many blocks the shared axis is cut."""
        return ceildiv(self.length, Self.block_length)

    @always_inline
    def begin(self, block: Int) -> Int:
        """Where a block begins on the shared axis."""
        return min(block * self.length_of_blocks(), self.length)

    @always_inline
    def floats(self, row: Int, column: Int) -> Floats:
        """Where float32 numbers of a row go, from a column on to the end of its block.

        Where two parts of bfloat16 are stored they are to become those, a step at a time, and the
        column is one at which a step begins.
        """
        comptime assert Self.takes_floats
        var length = self.length_of_blocks()
        var at = self.row(column // length, row).unsafe_offset(Self.parts * (column % length))
        return Floats(unsafe_from_address=Int(at))

    @always_inline
    def row(self, block: Int, row: Int) -> Packed[Self.stored]:
        return self.numbers.unsafe_offset((block * self.rows + row) * Self.stride)

    @always_inline
    def scale(self, block: Int, row: Int) -> Floats:
        return self.scales.unsafe_offset(block * self.rows + row)

    def pack(self, row: Int, source: Floats, norm: Norm):
        """Packs one row, normalized if there is a norm."""
        var moments = norm.moments[Self.width](source, self.length)
        var line = unsafe_stack_allocation[BLOCK_LENGTH, Float32, alignment=64]()
        for block in range(self.blocks()):
            var begin = self.begin(block)
            var length = self.begin(block + 1) - begin
            var to = self.row(block, row)
            comptime if Self.stored == F32:
                norm.apply[Self.width](
                    source, begin, length, moments, Floats(unsafe_from_address=Int(to))
                )
            else:
                var whole = align_up(length, max(WORDS, Self.step))
                var numbers = source.unsafe_offset(begin)
                if norm.length > 0 or whole > length:
                    numbers = raw(line)
                    norm.apply[Self.width](source, begin, length, moments, numbers)
                    for i in range(length, whole):
                        numbers.unsafe_offset(i).unsafe_store(Float32(0))
                comptime if Self.stored == BF16:
                    store_bfloat16[Self.parts](
                        numbers, Packed[BF16](unsafe_from_address=Int(to)), whole
                    )
                else:
                    self.scale(block, row).unsafe_store(
                        quantize(numbers, to, whole)
                    )


@fieldwise_init
struct Panel[product: DType, width: Int, tiles: Bool](ImplicitlyCopyable):
    """A worker's own panel of the right operand, to be multiplied with tiles of the left one."""

    comptime Left = PackedRows[Self.product, Self.width, Self.tiles]
    comptime stored = Self.Left.stored
    comptime at_once = Self.Left.at_once
    comptime bytes = BLOCK_LENGTH * PANEL * size_of[Scalar[Self.stored]]() + PANEL * 4

    var numbers: Packed[Self.stored]
    var corrections: Integers
    """What INT8_ZERO adds to the sums of each column, for int8."""

    @staticmethod
    def at(memory: Bytes) -> Self:
        """A panel in `bytes` of memory, which is aligned to cache lines."""
        var numbers = Packed[Self.stored](unsafe_from_address=Int(memory))
        var behind = numbers.unsafe_offset(BLOCK_LENGTH * PANEL)
        return Self(numbers, Integers(unsafe_from_address=Int(behind)))

    def load[type: DType](self, source: Packed[type], length: Int):
        """Takes a packed panel, `[length, 32]`."""
        comptime if Self.stored == F32:
            var to = Floats(unsafe_from_address=Int(self.numbers))
            for i in range(0, length * PANEL, Self.width):
                to.unsafe_offset(i).unsafe_store(
                    source.unsafe_offset(i).unsafe_load[width=Self.width]().cast[F32]()
                )
        comptime if Self.stored == BF16:
            var to = Packed[BF16](unsafe_from_address=Int(self.numbers))
            for k in range(0, align_up(length, Self.Left.step), 2):
                store_pairs[Self.Left.parts](
                    line_of(source, k, length).cast[F32](),
                    line_of(source, k + 1, length).cast[F32](),
                    to,
                    k,
                )
        comptime if Self.stored == I8:
            self.load_int8(Packed[I8](unsafe_from_address=Int(source)), length)

    def load_int8(self, source: Packed[I8], length: Int):
        """Takes a panel that is int8 already."""
        comptime zeros = UInt32(INT8_ZERO * 0x01010101)
        var to = Packed[I8](unsafe_from_address=Int(self.numbers))
        var left = SIMD[I32, WORDS](0)
        var right = SIMD[I32, WORDS](0)
        for k in range(0, align_up(length, Self.Left.step), 4):
            var first = line_of(source, k, length)
            var second = line_of(source, k + 1, length)
            var third = line_of(source, k + 2, length)
            var fourth = line_of(source, k + 3, length)
            var fours = first.interleave(third).interleave(second.interleave(fourth))
            to.unsafe_offset(k * PANEL).unsafe_store(fours)
            left = dot_fours(left, zeros, fours.slice[4 * WORDS]())
            right = dot_fours(right, zeros, fours.slice[4 * WORDS, offset=4 * WORDS]())
        self.corrections.unsafe_store(left)
        self.corrections.unsafe_offset(WORDS).unsafe_store(right)

    @always_inline
    def multiply(self, left: Self.Left, block: Int, row: Int, length: Int, to: Floats):
        """The sums of `at_once` rows from `row` on with the panel, `[at_once, 32]` in float32."""
        var a = left.row(block, row)
        comptime if Self.tiles:
            multiply_tiles[Self.Left.parts](
                a,
                Self.Left.stride,
                Self.Left.parts * Self.Left.step,
                self.numbers,
                ceildiv(length, Self.Left.step),
                to,
                nothing,
            )
        elif Self.stored == F32:
            self.multiply_floats(Floats(unsafe_from_address=Int(a)), length, to)
        elif Self.stored == BF16:
            var sums = Array[SIMD[F32, WORDS], 2 * Self.at_once](fill=SIMD[F32, WORDS](0))
            accumulate_pairs[Self.at_once](
                sums,
                Packed[BF16](unsafe_from_address=Int(a)),
                Self.Left.stride,
                Packed[BF16](unsafe_from_address=Int(self.numbers)),
                length,
            )
            comptime for i in range(2 * Self.at_once):
                to.unsafe_offset(i * WORDS).unsafe_store(sums[i])
        else:
            var sums = Array[SIMD[I32, WORDS], 2 * Self.at_once](fill=SIMD[I32, WORDS](0))
            accumulate_fours[Self.at_once](
                sums,
                Packed[I8](unsafe_from_address=Int(a)),
                Self.Left.stride,
                Packed[I8](unsafe_from_address=Int(self.numbers)),
                length,
            )
            comptime for i in range(2 * Self.at_once):
                to.unsafe_offset(i * WORDS).unsafe_store(
                    self.widen(sums[i], left.scale(block, row), i)
                )
        comptime if Self.tiles and Self.stored == I8:
            var sums = Integers(unsafe_from_address=Int(to))
            for i in range(2 * Self.at_once):
                var sum = sums.unsafe_offset(i * WORDS).unsafe_load[width=WORDS]()
                to.unsafe_offset(i * WORDS).unsafe_store(
                    self.widen(sum, left.scale(block, row), i)
                )

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
                Self.Left.stride,
                self.numbers.unsafe_offset(part * 2 * Self.width),
                length,
            )
            comptime for i in range(2 * Self.at_once):
                to.unsafe_offset(
                    (i // 2) * PANEL + (2 * part + i % 2) * Self.width
                ).unsafe_store(sums[i])

    @always_inline
    def widen(self, sums: SIMD[I32, WORDS], scales: Floats, i: Int) -> SIMD[F32, WORDS]:
        """Half `i` of the sums of some rows, of which these are the scales, in float32."""
        var excess = self.corrections.unsafe_offset((i % 2) * WORDS).unsafe_load[width=WORDS]()
        return (sums - excess).cast[F32]() * scales.unsafe_offset(i // 2).unsafe_load()
