"""Linear layers: y = act(norm(x) @ w.T + bias) + residual.

Few rows (a decoding step) stream the weights once and are bound by memory. Many rows (the
encoder, a prompt) are packed once, and cut into blocks that stay in the second-level cache while
the panels of the weights pass by.
"""

from std.math import ceildiv
from std.memory import unsafe_stack_allocation
from std.memory.alloc import unsafe_alloc
from std.sys import size_of
from std.sys.intrinsics import PrefetchOptions, prefetch

from .gemm import (
    CACHE_LINE, F32, PANEL, Bytes, Floats, Packed, accumulate, raw, tile_rows
)
from .norm import Norm
from .phases import Phases
from .products import (
    I8, I16, I32, ROWS_STEP, WORDS, Panel, PackedRows, accumulate_int16, split_in_place
)
from .tiles import begin_tiles, end_tiles

comptime FEW_ROWS = 48
"""Up to here the weights are the traffic: panels are streamed instead of blocked."""
comptime STREAM_LINES = 1024
"""Lines of panels that a worker claims at a time: microseconds, so that none waits long for the
last one."""
comptime PACKED_ROWS = 32
"""Rows that a worker packs at a time."""
comptime CHUNKS_PER_WORKER = 4
"""Blocks of rows by one panel that there are at least for each worker, so that all end together."""
comptime PROJECT_PHASES = 2
"""Phases of `project`, at most."""


@always_inline
def erf[width: Int](x: SIMD[F32, width]) -> SIMD[F32, width]:
    """The error function: x P(x^2) / Q(x^2), within 4e-7, and exactly 1 where float32 cannot tell.

    The two polynomials do not wait for each other, and there is no exponential. Coefficients by
    weighted least squares on [0, 4].
    """
    var u = x * x
    var p = SIMD[F32, width](1.974723772946163e-06)
    p = p.fma(u, 0.00028803880559280515)
    p = p.fma(u, 0.0040037864819169044)
    p = p.fma(u, 0.053467895835638046)
    p = p.fma(u, 0.19625304639339447)
    p = p.fma(u, 1.128378987312317)
    var q = SIMD[F32, width](3.7479621823877096e-05)
    q = q.fma(u, 0.001216383185237646)
    q = q.fma(u, 0.015444708988070488)
    q = q.fma(u, 0.11647799611091614)
    q = q.fma(u, 0.5072559118270874)
    q = q.fma(u, 1.0)
    var sign = x.lt(0).select(SIMD[F32, width](-1), SIMD[F32, width](1))
    return abs(x).ge(3.92).select(sign, x * p / q)


@always_inline
def gelu[width: Int](x: SIMD[F32, width]) -> SIMD[F32, width]:
    """The exact GELU, x * Phi(x), as `torch.nn.functional.gelu` has it by default."""
    return 0.5 * x * (1 + erf(x * 0.70710678118654752440))


@always_inline
def rounded_gelu[width: Int](x: SIMD[F32, width]) -> SIMD[F32, width]:
    """The same within 4e-5, for what is rounded to bfloat16 or 8 bits next: without a division.

    Phi(x) - 1/2 is x P(x^2) up to 4.4, and exactly one half beyond, which P exceeds a little there.
    Coefficients by weighted least squares, the weights raised where the error is largest.
    """
    comptime end: Float32 = 4.4
    var inner = min(max(x, -end), end)
    var u = inner * inner
    var p = SIMD[F32, width](3.57828422e-11)
    p = p.fma(u, -3.76194274e-09)
    p = p.fma(u, 1.74378706e-07)
    p = p.fma(u, -4.7307912e-06)
    p = p.fma(u, 8.43628384e-05)
    p = p.fma(u, -0.00105547812)
    p = p.fma(u, 0.00964493207)
    p = p.fma(u, -0.0660801539)
    p = p.fma(u, 0.3987647)
    return x * (0.5 + min(max(inner * p, -0.5), 0.5))


@fieldwise_init
struct OutputTile(ImplicitlyCopyable):
    """A panel's columns of some rows of an output, `stride` apart."""

    var at: Floats
    var stride: Int

    @always_inline
    def row(self, number: Int) -> Floats:
        return self.at.unsafe_offset(number * self.stride)

    @always_inline
    def fetch(self, rows: Int):
        """Asks for what will be written when a tile is computed: it has left the cache long ago."""
        for r in range(rows):
            comptime for i in range(0, PANEL, CACHE_LINE // size_of[Float32]()):
                prefetch[PrefetchOptions().for_write().high_locality().to_data_cache()](
                    self.row(r).unsafe_offset(i)
                )


@fieldwise_init
struct Projection[type: DType, width: Int, product: DType, tiles: Bool](ImplicitlyCopyable):
    """One linear layer: its operands, and the work on one chunk of its output.

    `product` is what many rows are multiplied in, in matrix tiles or in vectors; few are, in
    float32 or 16-bit integers, as fast as memory is read.
    `weight` is packed, `[panels, length, 32]`. `scale` multiplies each output channel (int8
    weights) where `scaled`. `residual` is read at `row % residual_rows` (0: none) and may be the
    output itself. Where `packs_output`, which is for many rows that take floats and for whole
    panels, the output is left as the next layer's packed rows.
    """

    comptime Left = PackedRows[Self.product, Self.width, Self.tiles]
    comptime Right = Panel[Self.product, Self.width, Self.tiles]
    comptime in_int16 = Self.type == I8 and Self.product == I8
    """Whether few rows are rounded to 16 bits: their products with bytes have exact sums, and take
    half of the instructions that float32 does."""
    comptime Few = PackedRows[I16, Self.width, False]

    var output: Floats
    var x: Floats
    var weight: Packed[Self.type]
    var scale: Floats
    var bias: Floats
    var residual: Floats
    var norm: Norm
    var rows: Int
    var length: Int
    var columns: Int
    var residual_rows: Int
    var scaled: Bool
    var gelu: Bool
    var packs_output: Bool

    def panels_from(self, panel: Int, panels: Int, to: Floats) -> Self:
        """Some whole panels of a layer without residual, into `to`."""
        var result = self
        result.output = to
        result.weight = self.weight.unsafe_offset(panel * self.length * PANEL)
        result.scale = self.scale.unsafe_offset(panel * PANEL if self.scaled else 0)
        result.bias = self.bias.unsafe_offset(panel * PANEL)
        result.columns = panels * PANEL
        return result

    def normalized(self, to: Floats) -> Self:
        """The same layer with its norm applied beforehand, into `to`, [rows, length]."""
        var result = self
        result.x = to
        result.norm.length = 0
        for row in range(self.rows):
            var at = row * self.length
            self.norm.copy_row[Self.width](
                self.x.unsafe_offset(at), self.length, to.unsafe_offset(at)
            )
        return result

    @always_inline
    def is_streamed(self) -> Bool:
        """Whether the panels are streamed."""
        return self.rows <= FEW_ROWS

    @staticmethod
    def packed_bytes(rows: Int, length: Int) -> Int:
        """What rows of at most this length take when they are packed, 0 for few."""
        return 0 if rows <= FEW_ROWS else Self.Left.bytes(rows, length)

    @always_inline
    def panels(self) -> Int:
        return ceildiv(self.columns, PANEL)

    def row_blocks(self, team: Int) -> Int:
        """Into how many blocks many rows are cut: they stay in cache, and there is work for all."""
        var for_cache = ceildiv(self.rows, Self.Left.rows_in_cache)
        var for_team = ceildiv(CHUNKS_PER_WORKER * team, self.panels())
        return max(for_cache, min(for_team, ceildiv(self.rows, ROWS_STEP)))

    def chunks(self, team: Int) -> Int:
        """Into how many independent parts this layer is cut."""
        if self.is_streamed():
            var at_once = max(1, STREAM_LINES // self.length)
            return min(self.panels(), max(4 * team, ceildiv(self.panels(), at_once)))
        return self.row_blocks(team) * self.panels()

    def run(self, chunk: Int, chunks: Int, left: Self.Left, right: Self.Right):
        """Computes one of `chunks` parts of many rows, which have been packed.

        right : the worker's own
        """
        # All panels of one block of rows follow each other: those rows are in the cache then.
        var blocks = chunks // self.panels()
        var block = chunk // self.panels()
        var all_tiles = ceildiv(self.rows, Self.Left.at_once)
        self.block(
            left,
            right,
            0,
            all_tiles * block // blocks * Self.Left.at_once,
            min(all_tiles * (block + 1) // blocks * Self.Left.at_once, self.rows),
            chunk % self.panels(),
        )

    def stream(self, few: Self.Few, chunk: Int, chunks: Int):
        """Computes one of `chunks` parts of few rows: each panel is read from memory once.

        few : the rows `in_int16`; else they have been normalized
        """
        for panel in range(self.panels() * chunk // chunks, self.panels() * (chunk + 1) // chunks):
            var row = 0
            comptime for tile in range(6):
                comptime rows = (tile_rows[Self.width](), 5, 4, 3, 2, 1)[tile]
                while row + rows <= self.rows:
                    self.stream_tile[rows](few, row, panel)
                    row += rows

    @always_inline
    def stream_tile[rows: Int](self, few: Self.Few, row: Int, panel: Int):
        """`rows` rows times one panel."""
        var memory = unsafe_stack_allocation[rows * PANEL, Float32, alignment=64]()
        var sums = raw(memory)
        comptime if Self.in_int16:
            self.multiply_int16[rows](few, row, panel, sums)
        else:
            self.multiply_floats[rows](row, panel, sums)
        var column = panel * PANEL
        self.finish(sums, self.output_at(row, column), row, rows, column, True, True)

    @always_inline
    def multiply_floats[rows: Int](self, row: Int, panel: Int, sums: Floats):
        """The sums of `rows` rows with one panel, widened in registers, `[rows, 32]`."""
        var a = self.x.unsafe_offset(row * self.length)
        comptime for part in range(PANEL // (2 * Self.width)):
            var vectors = Array[SIMD[F32, Self.width], 2 * rows](fill=SIMD[F32, Self.width](0))
            accumulate[rows, Self.width, streams=True](
                vectors,
                a,
                self.length,
                self.weight_at(panel, 0).unsafe_offset(part * 2 * Self.width),
                self.length,
            )
            comptime for i in range(2 * rows):
                sums.unsafe_offset(
                    (i // 2) * PANEL + (2 * part + i % 2) * Self.width
                ).unsafe_store(vectors[i])

    @always_inline
    def multiply_int16[rows: Int](self, few: Self.Few, row: Int, panel: Int, sums: Floats):
        """The same of rows of 16-bit integers, the panel widened to as many bits."""
        for block in range(few.blocks()):
            var begin = few.begin(block)
            var vectors = Array[SIMD[I32, WORDS], 2 * rows](fill=SIMD[I32, WORDS](0))
            accumulate_int16[rows](
                vectors,
                Packed[I16](unsafe_from_address=Int(few.row(block, row))),
                Self.Few.stride,
                self.weight_at(panel, begin),
                few.begin(block + 1) - begin,
            )
            comptime for i in range(2 * rows):
                var at = sums.unsafe_offset(i * WORDS)
                var scale = few.scale(block, row + i // 2).unsafe_load()
                var sum = vectors[i].cast[F32]() * scale
                if block > 0:
                    sum += at.unsafe_load[width=WORDS]()
                at.unsafe_store(sum)

    @always_inline
    def weight_at(self, panel: Int, line: Int) -> Packed[Self.type]:
        """A panel, from one of its lines on."""
        return self.weight.unsafe_offset((panel * self.length + line) * PANEL)

    def block(
        self,
        left: Self.Left,
        right: Self.Right,
        shift: Int,
        first_row: Int,
        last_row: Int,
        panel: Int,
    ):
        """Many rows times one panel; row 0 of the output is row `shift` of the left operand.

        `first_row` and `last_row` are those of the output.
        """
        comptime at_once = Self.Left.at_once
        # The sums leave the registers through a small buffer, so that what follows the product
        # is compiled once and not once for each register.
        var sums = unsafe_stack_allocation[at_once * PANEL, Float32, alignment=64]()
        var column = panel * PANEL
        comptime if Self.tiles:
            begin_tiles()
        var blocks = ceildiv(self.length, Self.Left.block_length)
        for block in range(blocks):
            var begin = left.begin(block)
            var length = left.begin(block + 1) - begin
            right.load(self.weight_at(panel, begin), length)
            for row in range(first_row, last_row, at_once):
                var rows = min(at_once, last_row - row)
                var to = self.output_at(row, column)
                to.fetch(rows)
                right.multiply(left, block, shift + row, length, raw(sums))
                self.finish(raw(sums), to, row, rows, column, block == 0, block == blocks - 1)
        comptime if Self.tiles:
            end_tiles()

    @always_inline
    def output_at(self, row: Int, column: Int) -> OutputTile:
        """Where a row's outputs from a column on stand, and those of the rows below."""
        comptime if Self.Left.takes_floats:
            if self.packs_output:
                var memory = Bytes(unsafe_from_address=Int(self.output))
                var packed = Self.Left.at(memory, self.rows, self.columns)
                return OutputTile(packed.floats(row, column), Self.Left.float_stride)
        return OutputTile(self.output.unsafe_offset(row * self.columns + column), self.columns)

    def finish(
        self,
        sums: Floats,
        to: OutputTile,
        row: Int,
        rows: Int,
        column: Int,
        first: Bool,
        last: Bool,
    ):
        """Finishes the sums of some rows and a panel, which may be cut off.

        A whole panel at once: its vectors' long chains of operations overlap.
        """
        var ends = last and self.gelu
        if column + PANEL > self.columns:
            for r in range(rows):
                for i in range(self.columns - column):
                    var sum = sums.unsafe_offset(r * PANEL + i)
                    var at = to.row(r).unsafe_offset(i)
                    if ends:
                        self.store[1, True](sum, at, row + r, column + i, first)
                    else:
                        self.store[1, False](sum, at, row + r, column + i, first)
        elif ends:
            for r in range(rows):
                var sum = sums.unsafe_offset(r * PANEL)
                comptime if Self.product != F32:
                    if not self.is_streamed():
                        self.store[PANEL, True, rounded=True](
                            sum, to.row(r), row + r, column, first
                        )
                        continue
                self.store[PANEL, True](sum, to.row(r), row + r, column, first)
        else:
            for r in range(rows):
                var sum = sums.unsafe_offset(r * PANEL)
                self.store[PANEL, False](sum, to.row(r), row + r, column, first)
        comptime if Self.Left.parts == 2:
            if last and self.packs_output:
                for r in range(rows):
                    split_in_place(to.row(r))

    @always_inline
    def store[
        w: Int, with_gelu: Bool, rounded: Bool = False
    ](self, sums: Floats, at: Floats, row: Int, column: Int, first: Bool):
        """Adds `w` sums of one block of the shared axis to the output; of the first, stores them.

        at: where in the output
        with_gelu: of the last block, where there is a GELU
        rounded: whether that is `rounded_gelu`
        """
        var y = sums.unsafe_load[width=w]()
        if self.scaled:
            y *= self.scale.unsafe_offset(column).unsafe_load[width=w]()
        # The residual may be what the output held: it is read before the first store.
        if first and self.residual_rows > 0 and not self.gelu:
            y += self.residual_at[w](row, column)
        if first:
            y += self.bias.unsafe_offset(column).unsafe_load[width=w]()
        else:
            y += at.unsafe_load[width=w]()
        comptime if with_gelu:
            y = rounded_gelu(y) if rounded else gelu(y)
            if self.residual_rows > 0:
                y += self.residual_at[w](row, column)
        at.unsafe_store(y)

    @always_inline
    def residual_at[w: Int](self, row: Int, column: Int) -> SIMD[F32, w]:
        return self.residual.unsafe_offset(
            (row % self.residual_rows) * self.columns + column
        ).unsafe_load[width=w]()


@always_inline
def project[
    type: DType, width: Int, product: DType, tiles: Bool, //
](
    mut phases: Phases,
    team: Int,
    projection: Projection[type, width, product, tiles],
    memory: Bytes,
    *,
    is_packed: Bool = False,
):
    """A linear layer in one phase, or for many rows in two; they are packed into `memory` first.

    is_packed: whether they are already
    """
    if projection.is_streamed():
        project_few(phases, team, projection)
        return
    var chunks = projection.chunks(team)
    var rows = projection.rows
    var left = projection.Left.at(memory, rows, projection.length)
    var panel = unsafe_alloc[UInt8](projection.Right.bytes, alignment=64)
    var right = projection.Right.at(raw(panel))

    @always_inline
    def pack(chunk: Int) {var projection, var left, var rows, imm}:
        for row in range(chunk * PACKED_ROWS, min((chunk + 1) * PACKED_ROWS, rows)):
            left.pack(row, projection.x.unsafe_offset(row * projection.length), projection.norm)

    @always_inline
    def part(chunk: Int) {var projection, var chunks, var left, var right, imm}:
        projection.run(chunk, chunks, left, right)

    if not is_packed:
        phases.run(ceildiv(rows, PACKED_ROWS), pack)
    phases.run(chunks, part)
    panel.unsafe_free()


@always_inline
def project_few[
    type: DType, width: Int, product: DType, tiles: Bool, //
](mut phases: Phases, team: Int, projection: Projection[type, width, product, tiles]):
    """A linear layer of few rows.

    Every worker applies the norm and rounds to integers itself: for a few beams that takes less
    time than to wait for another's. One that comes late may read what a later phase overwrites, but
    finds nothing left to do with it.
    """
    comptime Few = projection.Few
    var chunks = projection.chunks(team)
    var rows = projection.rows
    var length = projection.length
    var layer = projection
    var room: Int
    comptime if projection.in_int16:
        room = Few.bytes(rows, length)
    else:
        room = rows * projection.norm.length * size_of[Float32]()
    var memory = unsafe_alloc[UInt8](room, alignment=64)
    var few = Few.at(raw(memory), rows, length)
    comptime if projection.in_int16:
        for row in range(rows):
            few.pack(row, projection.x.unsafe_offset(row * length), projection.norm)
    else:
        if projection.norm.length > 0:
            layer = projection.normalized(Floats(unsafe_from_address=Int(memory)))

    @always_inline
    def part(chunk: Int) {var layer, var few, var chunks, imm}:
        layer.stream(few, chunk, chunks)

    phases.run(chunks, part)
    memory.unsafe_free()
