"""Products in the tile registers of Intel's AMX: 16 rows by 32 columns, two tiles of sums.

A tile is 16 rows of 64 bytes. Both operands are sequences of steps along the shared axis, each 64
bytes of a row: 32 bfloat16 or 64 int8. A step of the left operand is that part of each row; a step
of a panel of the right one is 16 lines of 32 groups (products.mojo). An operand of two parts holds
each step twice over, first what bfloat16 takes of a float32, then what it takes of the rest. Three
products of parts then make one of float32, but for 2^-16 of it.

Four of the eight registers are written, no more: two hyperthreads share what stands behind their
names, and beside a busy one a loop that writes all eight waits for each load (docs/kernels.md).

LLVM offers these instructions only where they are asked for at the command line: so assembly.
"""

from std.memory import unsafe_stack_allocation
from std.sys import inlined_assembly, size_of

from .gemm import F32, PANEL, Floats, Packed

comptime TILE_ROWS = 16
comptime STEP_BYTES = 64
"""Of a row, and the bytes of a row of a tile."""
comptime PANEL_STEP_BYTES = TILE_ROWS * PANEL * 4
comptime PANEL_LINE_BYTES = PANEL * 4

comptime ZERO = "tilezero %tmm0\n\ttilezero %tmm1"
comptime STORE = "tilestored %tmm0, ($0,$1,1)\n\ttilestored %tmm1, 64($0,$1,1)"


@always_inline
def parts_of[product: DType, tiles: Bool]() -> Int:
    """The parts of an operand that is to be multiplied in `product`."""
    return 2 if tiles and product == F32 else 1


def begin_tiles():
    """Configures this thread's tile registers: all eight of 16 rows of 64 bytes."""
    var config = unsafe_stack_allocation[64, UInt8, alignment=64]()
    for i in range(64):
        config.unsafe_offset(i).unsafe_store(UInt8(0))
    config.unsafe_store(UInt8(1))  # the palette
    for tile in range(8):
        config.unsafe_offset(16 + 2 * tile).unsafe_store(UInt8(STEP_BYTES))
        config.unsafe_offset(48 + tile).unsafe_store(UInt8(TILE_ROWS))
    inlined_assembly["ldtilecfg ($0)", NoneType, constraints="r,~{memory}", has_side_effect=True](
        Int(config)
    )


@always_inline
def end_tiles():
    """Gives the tile registers back: Linux need not save them when it switches threads."""
    run_assembly["tilerelease"]()


@always_inline
def run_assembly[text: StaticString]():
    inlined_assembly[text, NoneType, constraints="~{memory}", has_side_effect=True]()


@always_inline
def multiply_step[product: DType, parts: Int](left: Int, right: Int, stride: Int):
    """Adds the products of a step to both tiles of sums: unsigned rows by signed columns, if bytes.

    The rows go to tile 2, one half of a panel after the other to tile 3. Of two parts the small
    products come first.
    """
    comptime assert STEP_BYTES == 64 and PANEL_STEP_BYTES == 2048  # as the addresses have it
    comptime rows = "tileloadd ($0,$2,1), %tmm2\n\t"
    comptime rest_of_rows = "tileloadd 64($0,$2,1), %tmm2\n\t"
    comptime left_half = "tileloadd ($1,$3,1), %tmm3\n\t"
    comptime right_half = "tileloadd 64($1,$3,1), %tmm3\n\t"
    comptime rest_of_left_half = "tileloadd 2048($1,$3,1), %tmm3\n\t"
    comptime rest_of_right_half = "tileloadd 2112($1,$3,1), %tmm3\n\t"
    comptime name = "tdpbusd" if product == DType.int8 else "tdpbf16ps"
    comptime to_left = name + " %tmm3, %tmm2, %tmm0\n\t"
    comptime to_right = name + " %tmm3, %tmm2, %tmm1\n\t"
    comptime one = rows + left_half + to_left + right_half + to_right
    comptime two = (
        rest_of_rows + left_half + to_left + right_half + to_right
        + rows + to_right + rest_of_right_half + to_right
        + rest_of_left_half + to_left + left_half + to_left
    )
    comptime text = two if parts == 2 else one
    inlined_assembly[text, NoneType, constraints="r,r,r,r,~{memory}", has_side_effect=True](
        left, right, stride, PANEL_LINE_BYTES
    )


@always_inline
def multiply_tiles[
    type: DType, //, parts: Int
](
    rows: Packed[type],
    row_stride: Int,
    step: Int,
    panel: Packed[type],
    steps: Int,
    to: Floats,
    to_stride: Int,
):
    """Stores the sums of 16 rows with a panel: float32 of bfloat16, int32 of int8.

    From row to row there are `row_stride` numbers of the operands, from one step of the rows to the
    next `step`, and `to_stride` sums from one row of them to the next.
    """
    comptime size = size_of[Scalar[type]]()
    var left = Int(rows)
    var right = Int(panel)
    run_assembly[ZERO]()
    for _ in range(steps):
        multiply_step[type, parts](left, right, size * row_stride)
        left += size * step
        right += parts * PANEL_STEP_BYTES
    inlined_assembly[STORE, NoneType, constraints="r,r,~{memory}", has_side_effect=True](
        Int(to), 4 * to_stride
    )
