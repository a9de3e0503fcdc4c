"""Products in the tile registers of Intel's AMX: 32 rows by 32 columns, two by two tiles of sums.

A tile is 16 rows of 64 bytes. Both operands are sequences of steps along the shared axis, each 64
bytes of a row: 32 bfloat16 or 64 int8. A step of the left operand is that part of each row; a step
of a panel of the right one is 16 lines of 32 groups (products.mojo). An operand of two parts holds
each step twice over, first what bfloat16 takes of a float32, then what it takes of the rest. Three
products of parts then make one of float32, but for 2^-16 of it.

LLVM offers these instructions only where they are asked for at the command line: so assembly.
"""

from std.memory import unsafe_stack_allocation
from std.sys import inlined_assembly

from .gemm import F32, PANEL, Floats, Packed

comptime TILE_ROWS = 16
comptime STEP_BYTES = 64
"""Of a row, and the bytes of a row of a tile."""
comptime PANEL_STEP_BYTES = TILE_ROWS * PANEL * 4
comptime SIDE = 2 * TILE_ROWS
"""Rows that are multiplied at a time, with the 32 columns of a panel."""

comptime ZERO = "tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3"
comptime LOAD_ROWS = "tileloadd ($0,$2,1), %tmm4\n\ttileloadd ($1,$2,1), %tmm5"
comptime LOAD_PANEL = "tileloadd ($0,$2,1), %tmm6\n\ttileloadd ($1,$2,1), %tmm7"
comptime STORE_UPPER = "tilestored %tmm0, ($0,$2,1)\n\ttilestored %tmm1, ($1,$2,1)"
comptime STORE_LOWER = "tilestored %tmm2, ($0,$2,1)\n\ttilestored %tmm3, ($1,$2,1)"


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
def move_pair[text: StaticString](first: Int, distance: Int, stride: Int):
    """Loads or stores two tiles, the second `distance` bytes behind the first."""
    inlined_assembly[text, NoneType, constraints="r,r,r,~{memory}", has_side_effect=True](
        first, first + distance, stride
    )


@always_inline
def multiply_step[product: DType]():
    """Adds the products of the loaded tiles: unsigned rows by signed columns, if of bytes."""
    comptime name = "tdpbusd " if product == DType.int8 else "tdpbf16ps "
    run_assembly[
        name + "%tmm6, %tmm4, %tmm0\n\t"
        + name + "%tmm7, %tmm4, %tmm1\n\t"
        + name + "%tmm6, %tmm5, %tmm2\n\t"
        + name + "%tmm7, %tmm5, %tmm3"
    ]()


@always_inline
def multiply_tiles[
    type: DType, //, parts: Int
](
    rows: Packed[type], row_stride: Int, panel: Packed[type], steps: Int, to: Floats, to_stride: Int
):
    """Stores the sums of 32 rows with a panel: float32 of bfloat16, int32 of int8.

    `row_stride` in numbers of the operands, `to_stride` in sums.
    """
    comptime columns = STEP_BYTES
    comptime line = 2 * STEP_BYTES
    var stride = row_stride * (2 if type == DType.bfloat16 else 1)
    var left = Int(rows)
    var right = Int(panel)
    run_assembly[ZERO]()
    for _ in range(steps):
        comptime if parts == 2:
            # The small products first; the parts that both halves of the work need stay loaded.
            move_pair[LOAD_ROWS](left + STEP_BYTES, TILE_ROWS * stride, stride)
            move_pair[LOAD_PANEL](right, columns, line)
            multiply_step[type]()
            move_pair[LOAD_ROWS](left, TILE_ROWS * stride, stride)
            multiply_step[type]()
            move_pair[LOAD_PANEL](right + PANEL_STEP_BYTES, columns, line)
            multiply_step[type]()
        else:
            move_pair[LOAD_ROWS](left, TILE_ROWS * stride, stride)
            move_pair[LOAD_PANEL](right, columns, line)
            multiply_step[type]()
        left += parts * STEP_BYTES
        right += parts * PANEL_STEP_BYTES
    move_pair[STORE_UPPER](Int(to), columns, 4 * to_stride)
    move_pair[STORE_LOWER](Int(to) + TILE_ROWS * 4 * to_stride, columns, 4 * to_stride)
