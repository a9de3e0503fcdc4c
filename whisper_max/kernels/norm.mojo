"""LayerNorm, as `torch.nn.LayerNorm` has it: over the last axis, in float32."""

from std.math import sqrt

from .gemm import F32, Floats, copy

comptime EPSILON: Float32 = 1e-5


@always_inline
def sum_of_squares[width: Int](row: Floats, length: Int, mean: Float32 = 0) -> Float32:
    """Of the differences from `mean`; the length is a multiple of the width."""
    var squares = SIMD[F32, width](0)
    for k in range(0, length, width):
        var d = row.unsafe_offset(k).unsafe_load[width=width]() - mean
        squares = d.fma(d, squares)
    return squares.reduce_add()


@fieldwise_init
struct Norm(ImplicitlyCopyable):
    """LayerNorm's weight and bias; `length` 0 means none."""

    var weight: Floats
    var bias: Floats
    var length: Int

    @always_inline
    def moments[width: Int](self, row: Floats, length: Int) -> Tuple[Float32, Float32]:
        """Mean and reciprocal standard deviation of one row, in two passes; 0 and 1 of no norm."""
        if self.length == 0:
            return (Float32(0), Float32(1))
        var total = SIMD[F32, width](0)
        for k in range(0, length, width):
            total += row.unsafe_offset(k).unsafe_load[width=width]()
        var mean = total.reduce_add() / Float32(length)
        var squares = sum_of_squares[width](row, length, mean)
        return (mean, 1 / sqrt(squares / Float32(length) + EPSILON))

    @always_inline
    def apply[
        width: Int
    ](self, row: Floats, begin: Int, length: Int, moments: Tuple[Float32, Float32], to: Floats):
        """Copies `row[begin : begin + length]`, normalized by the moments of the whole row."""
        var source = row.unsafe_offset(begin)
        if self.length == 0:
            copy[width](source, to, length)
            return
        for k in range(0, length, width):
            var x = (source.unsafe_offset(k).unsafe_load[width=width]() - moments[0]) * moments[1]
            to.unsafe_offset(k).unsafe_store(
                x.fma(
                    self.weight.unsafe_offset(begin + k).unsafe_load[width=width](),
                    self.bias.unsafe_offset(begin + k).unsafe_load[width=width](),
                )
            )

    @always_inline
    def copy_row[width: Int](self, row: Floats, length: Int, to: Floats):
        """Copies a whole row, normalized if there is a norm."""
        self.apply[width](row, 0, length, self.moments[width](row, length), to)
