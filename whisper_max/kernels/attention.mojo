"""Attention on packed keys and values: softmax(q k^T / 8) v with head_dim 64.

Keys are packed like weights: panels of 32 frames, `[frames / 32, 64, 32]`. Values are two panels
of 32 channels, `[2, frames, 32]`, frames padded to a multiple of 32 with zeros. Panels of bfloat16
hold pairs (products.mojo): both products are then made of such pairs. For matrix tiles both hold
one bfloat16 or two for each number (tiles.mojo). Scores of a few rows live in a worker's scratch;
the score matrix of a window is never formed.
"""

from std.math import align_up, exp, iota
from std.memory import unsafe_stack_allocation
from std.memory.alloc import unsafe_alloc
from std.sys import llvm_intrinsic

from .gemm import F32, PANEL, Floats, Packed, accumulate, raw, tile_rows
from .packing import LINES, store_turned
from .products import (
    BF16,
    PAIRS_STEP,
    WORDS,
    Words,
    accumulate_pairs,
    split_in_place,
    store_bfloat16,
    store_pairs,
    words_of,
)
from .tiles import (
    TILE_ROWS,
    begin_tiles,
    end_tiles,
    multiply_tiles,
    nothing,
    parts_of,
    turns_of,
)

comptime HEAD_DIM = 64
comptime SCALE: Float32 = 0.125
"""1 / sqrt(head_dim): a power of two, so that it does not matter where it is applied."""
comptime SCORE_PADDING = 16
"""Added to the row distance of the scores: rows of a tile fall into different cache sets."""

comptime ROWS_BY_TILES = 2 * TILE_ROWS
"""Queries that tiles attend with at a time: the second 16 find keys in the first-level cache."""
comptime HIGHEST_TOTAL: Float32 = 18446744073709551616.0
"""2^64, of a row's weights in tiles: beyond, the level was too low. Values of nearly 2^64 can still
be multiplied with them."""

comptime LOG2_E: Float32 = 1.44269504
comptime FLOOR = 1
comptime CURRENT_ROUNDING = 4
"""How AVX-512's instructions are told to round: down; and as the thread does otherwise."""

comptime MASKED: Float32 = -3.0e38
"""A score that softmax turns into zero."""


@always_inline
def padded(frames: Int) -> Int:
    """Frames rounded up to whole panels."""
    return align_up(frames, PANEL)


@always_inline
def head_size(frames: Int) -> Int:
    """Elements of one head's packed keys, and of its packed values."""
    return padded(frames) * HEAD_DIM


def pack_keys[
    type: DType, //, tiles: Bool
](source: Floats, row_stride: Int, frames: Int, to: Packed[type]):
    """Packs the keys of one head; frame `f` of the source starts at `f * row_stride`."""
    comptime if tiles or type == BF16:
        pack_key_pairs[parts_of[type, tiles]()](source, row_stride, frames, words_of(to))
        return
    for first in range(0, frames, PANEL):
        for d in range(0, HEAD_DIM, LINES):
            var block = Array[SIMD[type, LINES], PANEL](fill=0)
            for i in range(min(PANEL, frames - first)):
                block[i] = (
                    source.unsafe_offset((first + i) * row_stride + d)
                    .unsafe_load[width=LINES]()
                    .cast[type]()
                )
            store_turned(block, to.unsafe_offset(first * HEAD_DIM + d * PANEL))


def pack_key_pairs[
    parts: Int
](source: Floats, row_stride: Int, frames: Int, to: Words):
    """Packs keys as pairs: two neighbours of a key are one word, and frames lie side by side."""
    comptime pairs = parts * HEAD_DIM // 2
    var keys = unsafe_stack_allocation[PANEL * 2 * pairs, Scalar[BF16], alignment=64]()
    var words = words_of(raw(keys))
    for first in range(0, frames, PANEL):
        for i in range(min(PANEL, frames - first)):
            store_bfloat16[parts](
                source.unsafe_offset((first + i) * row_stride),
                raw(keys).unsafe_offset(i * 2 * pairs),
                HEAD_DIM,
            )
        for pair in range(0, pairs, LINES):
            var block = Array[SIMD[DType.uint32, LINES], PANEL](fill=0)
            for i in range(min(PANEL, frames - first)):
                block[i] = words.unsafe_offset(i * pairs + pair).unsafe_load[width=LINES]()
            store_turned(block, to.unsafe_offset(first * pairs + pair * PANEL))


def pack_value_pairs[
    parts: Int
](source: Floats, row_stride: Int, frames: Int, to: Packed[BF16], length: Int):
    """Packs values as pairs of frames."""
    for half in range(HEAD_DIM // PANEL):
        for frame in range(0, padded(frames), 2):
            var first = SIMD[F32, PANEL](0)
            var second = SIMD[F32, PANEL](0)
            var at = source.unsafe_offset(frame * row_stride + half * PANEL)
            if frame < frames:
                first = at.unsafe_load[width=PANEL]()
            if frame + 1 < frames:
                second = at.unsafe_offset(row_stride).unsafe_load[width=PANEL]()
            store_pairs[parts](
                first, second, to.unsafe_offset(half * parts * length * PANEL), frame
            )


def pack_values[
    type: DType, //, width: Int, tiles: Bool
](source: Floats, row_stride: Int, frames: Int, to: Packed[type], length: Int):
    """Packs the values of one head, or of a run of its frames, of which panels hold `length`."""
    comptime if tiles or type == BF16:
        pack_value_pairs[parts_of[type, tiles]()](
            source, row_stride, frames, Packed[BF16](unsafe_from_address=Int(to)), length
        )
        return
    for half in range(HEAD_DIM // PANEL):
        for frame in range(padded(frames)):
            var line = to.unsafe_offset((half * length + frame) * PANEL)
            comptime for lane in range(0, PANEL, width):
                var x = SIMD[F32, width](0)
                if frame < frames:
                    x = source.unsafe_offset(
                        frame * row_stride + half * PANEL + lane
                    ).unsafe_load[width=width]()
                line.unsafe_offset(lane).unsafe_store(x.cast[type]())


@always_inline
def higher[width: Int](a: SIMD[F32, width], b: SIMD[F32, width]) -> SIMD[F32, width]:
    """The higher of each two; where one is not a number, `b`: one instruction, unlike `max`."""
    return a.gt(b).select(a, b)


@always_inline
def highest_of(scores: Floats, length: Int) -> Float32:
    """The highest of `length` scores, a multiple of a panel."""
    var highest = SIMD[F32, PANEL](MASKED)
    for i in range(0, length, PANEL):
        highest = higher[PANEL](scores.unsafe_offset(i).unsafe_load[width=PANEL](), highest)
    return highest.reduce_max()


@always_inline
def mask(scores: Floats, count: Int, length: Int):
    """Leaves out the scores from `count` on."""
    for i in range(count, length):
        scores.unsafe_offset(i).unsafe_store(MASKED)


@always_inline
def softmax[
    width: Int, rounded: Bool = False
](scores: Floats, length: Int, highest: Float32) -> Float32:
    """Exponentiates `scores[:length]` less the highest of them; returns the sum.

    `length` is a multiple of a panel, so that vectors overlap. Where `rounded`, what is stored is
    bfloat16, from the beginning of the scores on.
    """
    var to = Packed[BF16](unsafe_from_address=Int(scores))
    var total = SIMD[F32, PANEL](0)
    for i in range(0, length, PANEL):
        var x = scores.unsafe_offset(i).unsafe_load[width=PANEL]() - highest
        var e = SIMD[F32, PANEL](0)
        comptime if width == WORDS:
            comptime for half in range(0, PANEL, WORDS):
                e = e.insert[offset=half](exp_by_scaling[rounded](x.slice[WORDS, offset=half]()))
        else:
            e = exp(x)
        comptime if rounded:
            to.unsafe_offset(i).unsafe_store(e.cast[BF16]())
        else:
            scores.unsafe_offset(i).unsafe_store(e)
        total += e
    return total.reduce_add()


@always_inline
def exp_by_scaling[rough: Bool](x: SIMD[F32, WORDS]) -> SIMD[F32, WORDS]:
    """The exponential of numbers that are not positive, with AVX-512, in half the instructions."""
    return power_of_two[rough](x * LOG2_E)


@always_inline
def power_of_two[rough: Bool](power: SIMD[F32, WORDS]) -> SIMD[F32, WORDS]:
    """2^p with AVX-512, infinite from 2^128 on.

    It is 2^floor(p), by which `vscalefps` scales, times a polynomial of what floor takes away.
    Relative error below 2 / 2^24, and none for whole p. Rounding p beforehand adds ln 2 |p| / 2^24:
    little where p is a score less the highest and next to it, up to 2^-18 in tiles, whose levels
    may lie 64 below. Where `rough`, below 1e-4, a 20th of that of rounding to bfloat16.
    Coefficients by weighted least squares.
    """
    var rest = llvm_intrinsic["llvm.x86.avx512.mask.reduce.ps.512", SIMD[F32, WORDS]](
        power, Int32(FLOOR), power, Int16(-1), Int32(CURRENT_ROUNDING)
    )
    var y: SIMD[F32, WORDS]
    comptime if rough:
        y = SIMD[F32, WORDS](0.07802452)
        y = y.fma(rest, 0.22606718)
        y = y.fma(rest, 0.69583352)
        y = y.fma(rest, 0.99992523)
    else:
        y = SIMD[F32, WORDS](0.0002161291631637141)
        y = y.fma(rest, 0.0012467845808714628)
        y = y.fma(rest, 0.009675451554358006)
        y = y.fma(rest, 0.055485282093286514)
        y = y.fma(rest, 0.2402293086051941)
        y = y.fma(rest, 0.6931470632553101)
        y = y.fma(rest, 1.0)
    return llvm_intrinsic["llvm.x86.avx512.mask.scalef.ps.512", SIMD[F32, WORDS]](
        y, power, y, Int16(-1), Int32(CURRENT_ROUNDING)
    )


@always_inline
def look_for_highest(block: Floats, highest: Floats):
    """Raises the highest scores of 16 rows, `[16, 16]`, by those of a block, `[16, 32]`."""
    for r in range(TILE_ROWS):
        var at = block.unsafe_offset(r * PANEL)
        var left = at.unsafe_load[width=WORDS]()
        var right = at.unsafe_offset(WORDS).unsafe_load[width=WORDS]()
        var high = highest.unsafe_offset(r * WORDS)
        var both = higher[WORDS](left, right)
        high.unsafe_store(higher[WORDS](both, high.unsafe_load[width=WORDS]()))


@always_inline
def weigh_row[
    parts: Int
](scores: Floats, level: Float32, to: Packed[BF16], totals: Floats):
    """Makes weights of the scores of a row with a panel: 2 to their power, less the row's level.

    They are a row of a tile of bfloat16, or of two of parts side by side, and are added to 16
    totals.
    """
    var total = totals.unsafe_load[width=WORDS]()
    var powers = scores.unsafe_load[width=PANEL]() - level
    comptime for half in range(0, PANEL, WORDS):
        var weight = power_of_two[parts == 1](powers.slice[WORDS, offset=half]())
        var rounded = weight.cast[BF16]()
        to.unsafe_offset(half).unsafe_store(rounded)
        comptime if parts == 2:
            to.unsafe_offset(PANEL + half).unsafe_store(
                (weight - rounded.cast[F32]()).cast[BF16]()
            )
        total += weight
    totals.unsafe_store(total)


@always_inline
def total_of(totals: Floats, row: Int) -> Float32:
    """The sum of a row's weights, of which `totals` hold 16 parts."""
    return totals.unsafe_offset(row * WORDS).unsafe_load[width=WORDS]().reduce_add()


@fieldwise_init
struct Attention[type: DType, width: Int, tiles: Bool](ImplicitlyCopyable):
    """Rows of queries against one head's packed keys and values, in matrix tiles or in vectors.

    Row `r` of the queries starts at `r * query_stride`, of the output at `r * output_stride`. Tiles
    leave it in two parts of bfloat16, step by step, where it `splits_output`.
    Where `wants_scores`, the scaled scores before softmax are copied to `raw_scores`, row by row at
    a distance of `padded(frames)`: word timestamps are read from them. Not in tiles, which only the
    encoder uses.
    """

    var output: Floats
    var output_stride: Int
    var query: Floats
    var query_stride: Int
    var keys: Packed[Self.type]
    var values: Packed[Self.type]
    var frames: Int
    var splits_output: Bool
    var raw_scores: Floats
    var wants_scores: Bool

    @always_inline
    def panels(self) -> Int:
        """Of keys."""
        return padded(self.frames) // PANEL

    def run(self, rows: Int):
        """Attends with all rows, as many at a time as the registers hold."""
        comptime largest = ROWS_BY_TILES if Self.tiles else tile_rows[Self.width]()
        var stride = padded(self.frames) + SCORE_PADDING
        var scores = unsafe_alloc[Float32](largest * stride, alignment=64)
        comptime if Self.tiles:
            begin_tiles()
            for row in range(0, rows, ROWS_BY_TILES):
                # What tiles keep are weights, of one or two parts: no more than scores take.
                self.attend_in_tiles(
                    Packed[BF16](unsafe_from_address=Int(scores)),
                    row,
                    min(ROWS_BY_TILES, rows - row),
                )
            end_tiles()
        else:
            var row = 0
            comptime for tile in range(4):
                comptime count = (largest, 5, 2, 1)[tile]
                comptime if count <= largest:
                    while row + count <= rows:
                        self.attend[count](scores, stride, row)
                        row += count
        scores.unsafe_free()

    @always_inline
    def attend[rows: Int](self, scores: Floats, stride: Int, row: Int):
        """Attends with `rows` rows from `row` on."""
        var length = padded(self.frames)
        var highest = unsafe_stack_allocation[rows * PANEL, Float32, alignment=64]()
        for i in range(0, rows * PANEL, Self.width):
            highest.unsafe_offset(i).unsafe_store(SIMD[F32, Self.width](MASKED))
        comptime if Self.type == BF16:
            self.score_pairs[rows](scores, stride, row, raw(highest))
        else:
            self.score[rows](scores, stride, row, raw(highest))
        self.keep_scores(scores, stride, row, rows)
        var totals = Array[Float32, rows](fill=0)
        for r in range(rows):
            totals[r] = softmax[Self.width, Self.type == BF16](
                scores.unsafe_offset(r * stride),
                length,
                highest_of(raw(highest).unsafe_offset(r * PANEL), PANEL),
            )
        comptime if Self.type == BF16:
            self.mix_pairs[rows](scores, stride, totals, row)
        else:
            self.mix[rows](scores, stride, totals, row)

    @always_inline
    def take_scores[
        rows: Int, lanes: Int
    ](
        self,
        sums: Array[SIMD[F32, lanes], 2 * rows],
        scores: Floats,
        stride: Int,
        frame: Int,
        highest: Floats,
    ):
        """Stores the scores of `2 * lanes` frames of a panel, and how high they are.

        Keys that only fill the last panel up are masked.
        """
        var is_cut = frame + 2 * lanes > self.frames
        comptime for r in range(rows):
            var line = scores.unsafe_offset(r * stride + frame)
            var high = highest.unsafe_offset(r * PANEL)
            var highest_of_row = high.unsafe_load[width=lanes]()
            comptime for half in range(2):
                var score = sums[2 * r + half]
                if is_cut:
                    var frames = iota[F32, lanes](Float32(frame + half * lanes))
                    score = frames.lt(Float32(self.frames)).select(score, MASKED)
                line.unsafe_offset(half * lanes).unsafe_store(score)
                highest_of_row = higher[lanes](score, highest_of_row)
            high.unsafe_store(highest_of_row)

    @always_inline
    def keep_scores(self, scores: Floats, stride: Int, row: Int, rows: Int):
        """Copies the scaled products of `rows` rows from `row` on, if they are wanted."""
        if not self.wants_scores:
            return
        var length = padded(self.frames)
        for r in range(rows):
            for i in range(length):
                self.raw_scores.unsafe_offset((row + r) * length + i).unsafe_store(
                    scores.unsafe_offset(r * stride + i).unsafe_load()
                )

    def attend_in_tiles(self, weights: Packed[BF16], row: Int, rows: Int):
        """Attends with up to ROWS_BY_TILES rows; what tiles make of further ones is unused.

        A row's weights are 2 to its scores, less a level that need not be the highest of them: what
        makes a weight too large for float32 is far above. So it is that of the first frames, and a
        panel is weighed while the next one is multiplied. Where a sum tells that it was too low,
        all is done again with the highest of all.
        """
        comptime parts = parts_of[Self.type, True]()
        var line = unsafe_stack_allocation[HEAD_DIM, Float32, alignment=64]()
        var query = unsafe_stack_allocation[
            ROWS_BY_TILES * parts * HEAD_DIM, Scalar[BF16], alignment=64
        ]()
        for r in range(rows):
            self.take_query[SCALE * LOG2_E](row + r, raw(line))
            store_bfloat16[parts](
                raw(line), raw(query).unsafe_offset(r * parts * HEAD_DIM), HEAD_DIM
            )
        var totals = raw(
            unsafe_stack_allocation[ROWS_BY_TILES * WORDS, Float32, alignment=64]()
        )
        self.weigh(raw(query), rows, 1, weights, totals)
        for r in range(rows):
            if total_of(totals, r) > HIGHEST_TOTAL:
                self.weigh(raw(query), rows, self.panels(), weights, totals)
                break
        self.mix_by_tiles(weights, totals, row, rows)

    def weigh(
        self,
        query: Packed[BF16],
        rows: Int,
        panels_to_look_at: Int,
        weights: Packed[BF16],
        totals: Floats,
    ):
        """The weights of up to ROWS_BY_TILES rows, `[rows / 16, panels, 16, parts, 32]`.

        A row's level is its highest score in the first `panels_to_look_at` panels. Scores are those
        of base 2.

        totals : [ROWS_BY_TILES, 16], partial sums of each row's weights
        """
        comptime parts = parts_of[Self.type, True]()
        comptime steps = HEAD_DIM // PAIRS_STEP
        comptime turns = turns_of[parts]()
        comptime rows_a_step = TILE_ROWS // steps
        comptime block = TILE_ROWS * PANEL
        var panels = self.panels()
        var keys = Packed[BF16](unsafe_from_address=Int(self.keys))
        # Of each 16 rows the scores with this panel and with the next one.
        var scores = raw(
            unsafe_stack_allocation[2 * ROWS_BY_TILES * PANEL, Float32, alignment=64]()
        )
        var highest = unsafe_stack_allocation[ROWS_BY_TILES * WORDS, Float32, alignment=64]()
        for i in range(0, ROWS_BY_TILES * WORDS, WORDS):
            highest.unsafe_offset(i).unsafe_store(SIMD[F32, WORDS](MASKED))

        @always_inline
        def scores_of(first_row: Int, panel: Int) {imm} -> Floats:
            return scores.unsafe_offset((first_row // TILE_ROWS * 2 + panel % 2) * block)

        @always_inline
        def score_beside[
            Work: def(Int, Int) -> None, //
        ](first_row: Int, panel: Int, work: Work) {imm}:
            var to = scores_of(first_row, panel)
            multiply_tiles[parts](
                query.unsafe_offset(first_row * parts * HEAD_DIM),
                parts * HEAD_DIM,
                parts * PAIRS_STEP,
                keys.unsafe_offset(panel * parts * HEAD_DIM * PANEL),
                steps,
                to,
                work,
            )
            if (panel + 1) * PANEL > self.frames:
                for r in range(TILE_ROWS):
                    mask(to.unsafe_offset(r * PANEL), self.frames - panel * PANEL, PANEL)

        # Backwards, so that what is left are the scores with the first panel.
        for panel in range(panels_to_look_at - 1, -1, -1):
            for r in range(0, rows, TILE_ROWS):
                score_beside(r, panel, nothing)
                look_for_highest(scores_of(r, panel), raw(highest).unsafe_offset(r * WORDS))
        var levels = raw(unsafe_stack_allocation[ROWS_BY_TILES, Float32]())
        for r in range(ROWS_BY_TILES):
            levels.unsafe_offset(r).unsafe_store(
                highest.unsafe_offset(r * WORDS).unsafe_load[width=WORDS]().reduce_max()
            )
            totals.unsafe_offset(r * WORDS).unsafe_store(SIMD[F32, WORDS](0))
        for panel in range(panels):
            for r in range(0, rows, TILE_ROWS):

                var block_of_scores = scores_of(r, panel)
                var to = weights.unsafe_offset((r // TILE_ROWS * panels + panel) * parts * block)

                @always_inline
                def weigh_some(step: Int, turn: Int) {imm}:
                    for row in range(
                        rows_a_step * turn // turns, rows_a_step * (turn + 1) // turns
                    ):
                        var i = step * rows_a_step + row
                        weigh_row[parts](
                            block_of_scores.unsafe_offset(i * PANEL),
                            levels.unsafe_offset(r + i).unsafe_load(),
                            to.unsafe_offset(i * parts * PANEL),
                            totals.unsafe_offset((r + i) * WORDS),
                        )

                if panel + 1 < panels:
                    score_beside(r, panel + 1, weigh_some)
                else:
                    for step in range(steps):
                        for turn in range(turns):
                            weigh_some(step, turn)

    def mix_by_tiles(
        self,
        weights: Packed[BF16],
        totals: Floats,
        row: Int,
        rows: Int,
    ):
        """The values, weighted by what `weigh` leaves."""
        comptime parts = parts_of[Self.type, True]()
        comptime tile = TILE_ROWS * parts * PANEL
        var panels = self.panels()
        var sums = unsafe_stack_allocation[TILE_ROWS * PANEL, Float32, alignment=64]()
        var values = Packed[BF16](unsafe_from_address=Int(self.values))
        comptime for half in range(HEAD_DIM // PANEL):
            for r in range(0, rows, TILE_ROWS):
                multiply_tiles[parts](
                    weights.unsafe_offset(r // TILE_ROWS * panels * tile),
                    parts * PAIRS_STEP,
                    tile,
                    values.unsafe_offset(half * parts * panels * PANEL * PANEL),
                    panels,
                    raw(sums),
                    nothing,
                )
                for i in range(min(TILE_ROWS, rows - r)):
                    var mixed = raw(sums).unsafe_offset(i * PANEL).unsafe_load[width=PANEL]()
                    var to = self.output.unsafe_offset(
                        (row + r + i) * self.output_stride + half * PANEL
                    )
                    to.unsafe_store(mixed / total_of(totals, r + i))
                    if self.splits_output:
                        split_in_place(to)

    @staticmethod
    def streams[rows: Int]() -> Bool:
        """Beams read keys and values from memory; the encoder's tiles find them in cache."""
        return rows < tile_rows[Self.width]()

    @always_inline
    def take_query[scale: Float32 = SCALE](self, row: Int, to: Floats):
        """Copies one row of the queries, scaled."""
        var source = self.query.unsafe_offset(row * self.query_stride)
        comptime for d in range(0, HEAD_DIM, Self.width):
            to.unsafe_offset(d).unsafe_store(
                source.unsafe_offset(d).unsafe_load[width=Self.width]() * scale
            )

    @always_inline
    def score[rows: Int](self, scores: Floats, stride: Int, row: Int, highest: Floats):
        """The scaled products of the queries with all keys."""
        var query = unsafe_stack_allocation[rows * HEAD_DIM, Float32, alignment=64]()
        for r in range(rows):
            self.take_query(row + r, raw(query).unsafe_offset(r * HEAD_DIM))
        for panel in range(self.panels()):
            comptime for part in range(PANEL // (2 * Self.width)):
                var offset = part * 2 * Self.width
                var sums = Array[SIMD[F32, Self.width], 2 * rows](fill=SIMD[F32, Self.width](0))
                accumulate[rows, Self.width, Self.streams[rows]()](
                    sums,
                    raw(query),
                    HEAD_DIM,
                    self.keys.unsafe_offset(panel * HEAD_DIM * PANEL + offset),
                    HEAD_DIM,
                )
                self.take_scores[rows, Self.width](
                    sums, scores, stride, panel * PANEL + offset, highest
                )

    @always_inline
    def score_pairs[rows: Int](self, scores: Floats, stride: Int, row: Int, highest: Floats):
        """The same from pairs."""
        var line = unsafe_stack_allocation[HEAD_DIM, Float32, alignment=64]()
        var query = unsafe_stack_allocation[rows * HEAD_DIM, Scalar[BF16], alignment=64]()
        for r in range(rows):
            self.take_query(row + r, raw(line))
            store_bfloat16(raw(line), raw(query).unsafe_offset(r * HEAD_DIM), HEAD_DIM)
        var keys = Packed[BF16](unsafe_from_address=Int(self.keys))
        for panel in range(self.panels()):
            var sums = Array[SIMD[F32, WORDS], 2 * rows](fill=SIMD[F32, WORDS](0))
            accumulate_pairs[rows](
                sums, raw(query), HEAD_DIM, keys.unsafe_offset(panel * HEAD_DIM * PANEL), HEAD_DIM
            )
            self.take_scores[rows, WORDS](sums, scores, stride, panel * PANEL, highest)

    @always_inline
    def mix[
        rows: Int
    ](self, scores: Floats, stride: Int, totals: Array[Float32, rows], row: Int):
        """The values, weighted."""
        var length = padded(self.frames)
        comptime for part in range(HEAD_DIM // (2 * Self.width)):
            comptime column = part * 2 * Self.width
            var sums = Array[SIMD[F32, Self.width], 2 * rows](fill=SIMD[F32, Self.width](0))
            accumulate[rows, Self.width, Self.streams[rows]()](
                sums,
                scores,
                stride,
                self.values.unsafe_offset((column // PANEL) * length * PANEL + column % PANEL),
                length,
            )
            comptime for i in range(2 * rows):
                self.output.unsafe_offset(
                    (row + i // 2) * self.output_stride + column + (i % 2) * Self.width
                ).unsafe_store(sums[i] / totals[i // 2])

    @always_inline
    def mix_pairs[
        rows: Int
    ](self, scores: Floats, stride: Int, totals: Array[Float32, rows], row: Int):
        """The same from pairs; each row of weights begins where its scores did."""
        var length = padded(self.frames)
        var weights = Packed[BF16](unsafe_from_address=Int(scores))
        var values = Packed[BF16](unsafe_from_address=Int(self.values))
        comptime for half in range(HEAD_DIM // PANEL):
            var sums = Array[SIMD[F32, WORDS], 2 * rows](fill=SIMD[F32, WORDS](0))
            accumulate_pairs[rows](
                sums, weights, 2 * stride, values.unsafe_offset(half * length * PANEL), length
            )
            comptime for i in range(2 * rows):
                self.output.unsafe_offset(
                    (row + i // 2) * self.output_stride + half * PANEL + (i % 2) * WORDS
                ).unsafe_store(sums[i] / totals[i // 2])


@fieldwise_init
struct SelfAttention[width: Int](ImplicitlyCopyable):
    """Causal self-attention of the decoder over an append-only cache.

    `cache` is one layer's `[2, rows, heads, context, 64]`, keys then values. A row that branched
    off another (beam search) owns only what it appended: the key of position `p` of row `b`
    stands in row `source[b, p]` of the cache.
    """

    var output: Floats
    var qkv: Floats
    var cache: Floats
    var source: Pointer[Int32, MutUntrackedOrigin]
    var cache_rows: Int
    var heads: Int
    var context: Int
    var offset: Int
    var tokens: Int

    @always_inline
    def at(self, kind: Int, row: Int, head: Int, position: Int) -> Floats:
        """One position of one head: 64 floats of the keys (`kind` 0) or the values (1)."""
        return self.cache.unsafe_offset(
            (((kind * self.cache_rows + row) * self.heads + head) * self.context + position)
            * HEAD_DIM
        )

    def append(self, row: Int, head: Int):
        """Writes the new keys and values of one row and head into the cache."""
        var n = self.heads * HEAD_DIM
        for i in range(self.tokens):
            var new = self.qkv.unsafe_offset((row * self.tokens + i) * 3 * n + head * HEAD_DIM)
            for kind in range(2):
                comptime for d in range(0, HEAD_DIM, Self.width):
                    self.at(kind, row, head, self.offset + i).unsafe_offset(d).unsafe_store(
                        new.unsafe_offset((kind + 1) * n + d).unsafe_load[width=Self.width]()
                    )

    def run(self, row: Int, head: Int):
        """Appends, then attends with every new token of one row and head."""
        comptime vectors = HEAD_DIM // Self.width
        var n = self.heads * HEAD_DIM
        self.append(row, head)
        var scores = unsafe_alloc[Float32](
            align_up(self.offset + self.tokens, PANEL), alignment=64
        )
        for i in range(self.tokens):
            var query = self.qkv.unsafe_offset((row * self.tokens + i) * 3 * n + head * HEAD_DIM)
            var q = Array[SIMD[F32, Self.width], vectors](fill=SIMD[F32, Self.width](0))
            comptime for v in range(vectors):
                q[v] = query.unsafe_offset(v * Self.width).unsafe_load[width=Self.width]()
            var count = self.offset + i + 1
            for p in range(count):
                var key = self.at(0, self.row_of(row, p), head, p)
                var product = SIMD[F32, Self.width](0)
                comptime for v in range(vectors):
                    product = q[v].fma(
                        key.unsafe_offset(v * Self.width).unsafe_load[width=Self.width](), product
                    )
                scores.unsafe_offset(p).unsafe_store(product.reduce_add() * SCALE)
            var length = align_up(count, PANEL)
            mask(scores, count, length)
            var total = softmax[Self.width](scores, length, highest_of(scores, length))
            var sums = Array[SIMD[F32, Self.width], vectors](fill=SIMD[F32, Self.width](0))
            for p in range(count):
                var value = self.at(1, self.row_of(row, p), head, p)
                var weight = SIMD[F32, Self.width](scores.unsafe_offset(p).unsafe_load())
                comptime for v in range(vectors):
                    sums[v] = weight.fma(
                        value.unsafe_offset(v * Self.width).unsafe_load[width=Self.width](), sums[v]
                    )
            comptime for v in range(vectors):
                self.output.unsafe_offset(
                    (row * self.tokens + i) * n + head * HEAD_DIM + v * Self.width
                ).unsafe_store(sums[v] / total)
        scores.unsafe_free()

    @always_inline
    def row_of(self, row: Int, position: Int) -> Int:
        """The cache row that holds a position: the new tokens of a row are its own."""
        if position >= self.offset:
            return row
        return Int(self.source.unsafe_offset(row * self.context + position).unsafe_load())
