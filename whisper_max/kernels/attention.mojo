"""Attention on packed keys and values: softmax(q k^T / 8) v with head_dim 64.

Scores of a few rows live in a worker's scratch; the score matrix of a window is never formed.
"""

from std.math import iota
from std.memory import unsafe_stack_allocation
from std.memory.alloc import unsafe_alloc

from .gemm import F32, PANEL, Floats, Packed, accumulate, raw, tile_rows
from .keys_and_values import HEAD_DIM, padded
from .products import (
    BF16, PAIRS_STEP, WORDS, accumulate_pairs, split_in_place, store_bfloat16
)
from .softmax import (
    LOG2_E, MASKED, higher, highest_of, look_for_highest, mask, softmax, total_of, weigh_row
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

comptime SCALE: Float32 = 0.125
"""1 / sqrt(head_dim): a power of two, so that it does not matter where it is applied."""
comptime SCORE_PADDING = 16
"""Added to the row distance of the scores: rows of a tile fall into different cache sets."""

comptime ROWS_BY_TILES = 2 * TILE_ROWS
"""Queries that tiles attend with at a time: the second 16 find keys in the first-level cache."""
comptime HIGHEST_TOTAL: Float32 = 18446744073709551616.0
"""2^64, of a row's weights in tiles: beyond, the level was too low. Values of nearly 2^64 can still
be multiplied with them."""


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
            multiply_tiles[parts, apart=False](
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
