"""Register-tiled products with packed panels: the inner loop that the other kernels share.

A panel holds 32 columns of the right-hand side, `[length, 32]`, so that one row of it is one
cache line in float16. A tile is `rows x 2 * width` accumulators that stay in vector registers
while `length` is walked once.
"""

from std.sys import size_of
from std.sys.intrinsics import PrefetchOptions, prefetch

comptime PANEL = 32
"""Columns in one packed panel."""
comptime CACHE_LINE = 64
"""Bytes."""
comptime F32 = DType.float32
comptime Floats = Pointer[Float32, MutUntrackedOrigin]
comptime Packed[type: DType] = Pointer[Scalar[type], MutUntrackedOrigin]
comptime Bytes = Packed[DType.uint8]


@always_inline
def raw[type: DType](pointer: Pointer[Scalar[type], _]) -> Packed[type]:
    """The address without its origin: the graph keeps every operand alive during a call."""
    return Packed[type](unsafe_from_address=Int(pointer))


@always_inline
def copy[width: Int](source: Floats, to: Floats, count: Int):
    """Copies `count` floats."""
    var whole = count - count % width
    for i in range(0, whole, width):
        to.unsafe_offset(i).unsafe_store(source.unsafe_offset(i).unsafe_load[width=width]())
    for i in range(whole, count):
        to.unsafe_offset(i).unsafe_store(source.unsafe_offset(i).unsafe_load())


@always_inline
def tile_rows[width: Int]() -> Int:
    """Rows of the largest tile whose accumulators fit the vector registers."""
    return 12 if width >= 16 else 4


@always_inline
def fetch[type: DType, //, rows: Int, count: Int](at: Packed[type]):
    """Asks for `count` numbers some way behind `at`, in a panel that `rows` rows stream.

    What stands there need not be ours. Where products take longer than memory, what is asked for
    waits in the second-level cache: in the first one are the rows. Elsewhere it is asked for twice,
    from memory and then from that cache.
    """
    comptime is_product_bound = rows > 2 * size_of[Scalar[type]]()
    comptime far = (8192 if is_product_bound else 16384) // size_of[Scalar[type]]()
    comptime near = 4096 // size_of[Scalar[type]]()
    comptime options = PrefetchOptions().for_read().to_data_cache()
    comptime for i in range(0, count, CACHE_LINE // size_of[Scalar[type]]()):
        prefetch[options.low_locality()](at.unsafe_offset(far + i))
        comptime if not is_product_bound:
            prefetch[options.high_locality()](at.unsafe_offset(near + i))


@always_inline
def accumulate[
    type: DType, //, rows: Int, width: Int, streams: Bool = False
](
    mut sums: Array[SIMD[F32, width], 2 * rows],
    a: Floats,
    row_stride: Int,
    panel: Packed[type],
    length: Int,
):
    """Adds `a[rows, length] @ panel[length, 2 * width]` to the sums.

    Row `r` of `a` starts at `r * row_stride`. `panel` points at a panel or, where two vectors
    are narrower than a panel, at a part of one. `streams`: whether it comes from memory.
    """
    for k in range(length):
        var line = panel.unsafe_offset(k * PANEL)
        comptime if streams:
            fetch[rows, 2 * width](line)
        var left = line.unsafe_load[width=width]().cast[F32]()
        var right = line.unsafe_offset(width).unsafe_load[width=width]().cast[F32]()
        comptime for r in range(rows):
            var x = SIMD[F32, width](a.unsafe_offset(r * row_stride + k).unsafe_load())
            sums[2 * r] = x.fma(left, sums[2 * r])
            sums[2 * r + 1] = x.fma(right, sums[2 * r + 1])
