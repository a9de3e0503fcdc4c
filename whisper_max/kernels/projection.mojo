"""Linear layers: y = act(norm(x) @ w.T + bias) + residual.

Few rows (a decoding step) stream the weights once and are bound by memory; many rows (the
encoder, a prompt) are cut into blocks whose operands stay in the second-level cache.
"""

from std.math import align_up, ceildiv, sqrt
from std.memory import unsafe_stack_allocation
from std.memory.alloc import unsafe_alloc

from .gemm import AHEAD, F32, PANEL, Floats, Packed, accumulate, copy, raw, tile_rows
from .phases import Phases
from .products import WORDS, Block

comptime EPSILON: Float32 = 1e-5
comptime FEW_ROWS = 48
"""Up to here the weights are the traffic: panels are streamed instead of blocked."""
comptime STREAM_LINES = 2048
"""Lines of panels that a worker claims at a time: microseconds, so that none waits long for the
last one."""
comptime BLOCK_ROWS = 192
comptime BLOCK_PANELS = 16


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
def row_moments[width: Int](row: Floats, length: Int) -> Tuple[Float32, Float32]:
    """Mean and reciprocal standard deviation of one row, in two passes."""
    var total = SIMD[F32, width](0)
    for k in range(0, length, width):
        total += row.unsafe_offset(k).unsafe_load[width=width]()
    var mean = total.reduce_add() / Float32(length)
    var squares = SIMD[F32, width](0)
    for k in range(0, length, width):
        var d = row.unsafe_offset(k).unsafe_load[width=width]() - mean
        squares = d.fma(d, squares)
    return (mean, 1 / sqrt(squares.reduce_add() / Float32(length) + EPSILON))


@fieldwise_init
struct Norm(ImplicitlyCopyable):
    """LayerNorm's weight and bias; `length` 0 means none."""

    var weight: Floats
    var bias: Floats
    var length: Int

    @always_inline
    def copy[
        width: Int
    ](self, row: Floats, row_length: Int, begin: Int, length: Int, to: Floats):
        """Copies `row[begin : begin + length]`, normalized over the whole row if there is a norm."""
        var source = row.unsafe_offset(begin)
        if self.length == 0:
            copy[width](source, to, length)
            return
        var moments = row_moments[width](row, row_length)
        for k in range(0, length, width):
            var x = (source.unsafe_offset(k).unsafe_load[width=width]() - moments[0]) * moments[1]
            to.unsafe_offset(k).unsafe_store(
                x.fma(
                    self.weight.unsafe_offset(begin + k).unsafe_load[width=width](),
                    self.bias.unsafe_offset(begin + k).unsafe_load[width=width](),
                )
            )


@fieldwise_init
struct Projection[type: DType, width: Int, product: DType, tiles: Bool](ImplicitlyCopyable):
    """One linear layer: its operands, and the work on one chunk of its output.

    `product` is what many rows are multiplied in, in matrix tiles or in vectors; few are, in
    float32, as fast as memory is read.
    `weight` is packed, `[panels, length, 32]`. `scale` multiplies each output channel (int8
    weights) where `scaled`. `residual` is read at `row % residual_rows` (0: none) and may be the
    output itself.
    """

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

    def part(self, row: Int, rows: Int, panel: Int, panels: Int, to: Floats) -> Self:
        """Some rows and whole panels of a layer without norm and residual, into `to`."""
        var result = self
        result.output = to
        result.x = self.x.unsafe_offset(row * self.length)
        result.weight = self.weight.unsafe_offset(panel * self.length * PANEL)
        result.scale = self.scale.unsafe_offset(panel * PANEL if self.scaled else 0)
        result.bias = self.bias.unsafe_offset(panel * PANEL)
        result.rows = rows
        result.columns = panels * PANEL
        return result

    def normalized(self, to: Floats) -> Self:
        """The same layer with its norm applied beforehand, into `to`, [rows, length]."""
        var result = self
        result.x = to
        result.norm.length = 0
        for row in range(self.rows):
            var at = row * self.length
            self.norm.copy[Self.width](
                self.x.unsafe_offset(at), self.length, 0, self.length, to.unsafe_offset(at)
            )
        return result

    @always_inline
    def few(self) -> Bool:
        """Whether the panels are streamed."""
        return self.rows <= FEW_ROWS

    @always_inline
    def panels(self) -> Int:
        return ceildiv(self.columns, PANEL)

    @always_inline
    def row_blocks(self) -> Int:
        return ceildiv(self.rows, BLOCK_ROWS)

    def chunks(self, team: Int) -> Int:
        """Into how many independent parts this layer is cut."""
        if self.few():
            var at_once = max(1, STREAM_LINES // self.length)
            return min(self.panels(), max(4 * team, ceildiv(self.panels(), at_once)))
        return self.row_blocks() * ceildiv(self.panels(), BLOCK_PANELS)

    def run(self, chunk: Int, chunks: Int):
        """Computes one of `chunks` parts; the norm of few rows has been applied."""
        if self.few():
            self.stream(self.panels() * chunk // chunks, self.panels() * (chunk + 1) // chunks)
            return
        var row_blocks = self.row_blocks()
        var panel_blocks = chunks // row_blocks
        var i = chunk % row_blocks
        var j = chunk // row_blocks
        self.block(
            self.rows * i // row_blocks,
            self.rows * (i + 1) // row_blocks,
            self.panels() * j // panel_blocks,
            self.panels() * (j + 1) // panel_blocks,
        )

    def stream(self, first_panel: Int, last_panel: Int):
        """All (few) rows times a run of panels, each panel read from memory once."""
        for panel in range(first_panel, last_panel):
            var row = 0
            comptime for tile in range(6):
                comptime rows = (tile_rows[Self.width](), 5, 4, 3, 2, 1)[tile]
                while row + rows <= self.rows:
                    self.stream_tile[rows](self.x.unsafe_offset(row * self.length), row, panel)
                    row += rows

    @always_inline
    def stream_tile[rows: Int](self, a: Floats, row: Int, panel: Int):
        """`rows` rows times one panel, widened in registers."""
        var sums = unsafe_stack_allocation[rows * PANEL, Float32, alignment=64]()
        comptime for part in range(PANEL // (2 * Self.width)):
            var vectors = Array[SIMD[F32, Self.width], 2 * rows](fill=SIMD[F32, Self.width](0))
            accumulate[rows, Self.width, AHEAD if rows > 1 else 0](
                vectors,
                a,
                self.length,
                self.weight.unsafe_offset(panel * self.length * PANEL + part * 2 * Self.width),
                self.length,
            )
            comptime for i in range(2 * rows):
                sums.unsafe_offset(
                    (i // 2) * PANEL + (2 * part + i % 2) * Self.width
                ).unsafe_store(vectors[i])
        for r in range(rows):
            self.finish_row(raw(sums).unsafe_offset(r * PANEL), row + r, panel * PANEL, True, True)

    def block(self, first_row: Int, last_row: Int, first_panel: Int, last_panel: Int):
        """Many rows times a run of panels, `length` in blocks, each packed once for all panels."""
        comptime Operands = Block[Self.product, Self.width, Self.tiles]
        comptime at_once = Operands.at_once
        var rows = last_row - first_row
        var step = align_up(ceildiv(self.length, ceildiv(self.length, Operands.length)), WORDS)
        # As many are always computed; what stands in the rows past the end is never stored.
        var block = Operands(rows)
        # The sums leave the registers through a small buffer, so that what follows the product
        # is compiled once and not once for each register.
        var sums = unsafe_stack_allocation[at_once * PANEL, Float32, alignment=64]()
        for begin in range(0, self.length, step):
            var length = min(step, self.length - begin)
            for row in range(rows):
                self.norm.copy[Self.width](
                    self.x.unsafe_offset((first_row + row) * self.length),
                    self.length,
                    begin,
                    length,
                    block.room(row),
                )
                block.take_row(row, length)
            for panel in range(first_panel, last_panel):
                block.take_panel(
                    self.weight.unsafe_offset((panel * self.length + begin) * PANEL), length
                )
                for row in range(0, rows, at_once):
                    block.multiply(row, length, raw(sums))
                    for r in range(min(at_once, rows - row)):
                        self.finish_row(
                            raw(sums).unsafe_offset(r * PANEL),
                            first_row + row + r,
                            panel * PANEL,
                            begin == 0,
                            begin + length == self.length,
                        )
        block.free()

    def finish_row(self, sums: Floats, row: Int, column: Int, first: Bool, last: Bool):
        """Finishes the sums of one row and one panel; the last panel may be cut off."""
        if column + PANEL <= self.columns:
            # The whole panel at once: its vectors' long chains of operations overlap.
            self.finish[PANEL](sums.unsafe_load[width=PANEL](), row, column, first, last)
            return
        for i in range(self.columns - column):
            self.finish[1](sums.unsafe_offset(i).unsafe_load(), row, column + i, first, last)

    @always_inline
    def finish[
        w: Int
    ](self, sums: SIMD[F32, w], row: Int, column: Int, first: Bool, last: Bool):
        """Stores `w` sums of one block of `length`, the first, the last, both or neither."""
        var at = self.output.unsafe_offset(row * self.columns + column)
        var y = sums
        if self.scaled:
            y *= self.scale.unsafe_offset(column).unsafe_load[width=w]()
        # The residual may be what the output held: it is read before the first store.
        if first and self.residual_rows > 0 and not self.gelu:
            y += self.residual_at[w](row, column)
        if first:
            y += self.bias.unsafe_offset(column).unsafe_load[width=w]()
        else:
            y += at.unsafe_load[width=w]()
        if last and self.gelu:
            y = gelu(y)
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
](mut phases: Phases, team: Int, projection: Projection[type, width, product, tiles]):
    """One phase: a linear layer."""
    var chunks = projection.chunks(team)
    # Every worker applies the norm itself: that takes less time than to wait for another's. One
    # that comes late may read what a later phase overwrites, but finds nothing left to do with it.
    var own = projection.few() and projection.norm.length > 0
    var normalized = unsafe_alloc[Float32](projection.rows * projection.length if own else 0)
    var layer = projection.normalized(normalized) if own else projection

    @always_inline
    def part(chunk: Int) {var layer, var chunks, imm}:
        layer.run(chunk, chunks)

    phases.run(chunks, part)
    normalized.unsafe_free()
