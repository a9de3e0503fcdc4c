"""Products in the tile registers of Intel's AMX: 16 rows by 32 columns, two tiles of sums.

A tile is 16 rows of 64 bytes. Both operands are sequences of steps along the shared axis, each 64
bytes of a row: 32 bfloat16 or 64 int8. A step of the left operand is that part of each row; a step
of a panel of the right one is 16 lines of 32 groups (products.mojo). An operand of two parts holds
each step twice over, first what bfloat16 takes of a float32, then what it takes of the rest. Three
products of parts then make one of float32, but for 2^-16 of it.

Five of the eight registers are written, no more, and operands are zeroed when they have been
multiplied: two hyperthreads share what stands behind the names, and beside a busy one a loop that
holds all eight waits for each load (docs/kernels.md).

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
comptime APART = "\n\t.rept 8\n\tnop\n\t.endr\n\t"
"""Between two instructions on tiles that have no other work between them: beside a busy hyperthread
they are done sooner so, by a tenth (docs/kernels.md)."""


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
def nothing(step: Int, turn: Int):
    """No other work."""
    pass


@always_inline
def turns_of[parts: Int]() -> Int:
    """How often other work takes turns with the products of a step."""
    return 6 if parts == 2 else 2


@always_inline
def multiply_step[
    Work: def(Int) -> None, //, product: DType, parts: Int, apart: Bool
](left: Int, right: Int, stride: Int, work: Work):
    """Adds the products of a step to both tiles of sums: unsigned rows by signed columns, if bytes.

    The rows go to tile 2, the halves of a panel to tiles 3 and 4. Of two parts the small products
    come first and last. While a tile is loaded and the one before multiplied the core has time for
    `work(turn)`, which `turns_of` counts.
    """
    comptime assert STEP_BYTES == 64 and PANEL_STEP_BYTES == 2048  # as the addresses have it
    comptime then = APART if apart else "\n\t"
    comptime rows = "tileloadd ($0,$2,1), %tmm2" + then
    comptime rest_of_rows = "tileloadd 64($0,$2,1), %tmm2" + then
    comptime left_half = "tileloadd ($1,$3,1), %tmm3" + then
    comptime right_half = "tileloadd 64($1,$3,1), %tmm4" + then
    comptime rest_of_left_half = "tileloadd 2048($1,$3,1), %tmm3" + then
    comptime rest_of_right_half = "tileloadd 2112($1,$3,1), %tmm4" + then
    comptime name = "tdpbusd" if product == DType.int8 else "tdpbf16ps"
    comptime to_left = name + " %tmm3, %tmm2, %tmm0" + then
    comptime to_right = name + " %tmm4, %tmm2, %tmm1" + then
    comptime leave_rows = "tilezero %tmm2" + then
    comptime leave_left_half = "tilezero %tmm3" + then
    comptime leave_right_half = "tilezero %tmm4" + then

    @always_inline
    def run[text: StaticString]() {imm}:
        inlined_assembly[text, NoneType, constraints="r,r,r,r,~{memory}", has_side_effect=True](
            left, right, stride, PANEL_LINE_BYTES
        )

    comptime if parts == 2:
        run[rest_of_rows + left_half]()
        work(0)
        run[to_left + right_half]()
        work(1)
        run[to_right + leave_rows + rows]()
        work(2)
        run[to_left + leave_left_half]()
        work(3)
        run[to_right + leave_right_half + rest_of_left_half]()
        work(4)
        run[to_left + leave_left_half + rest_of_right_half]()
        work(5)
        run[to_right + leave_rows + leave_right_half]()
    else:
        run[rows + left_half]()
        work(0)
        run[to_left + leave_left_half + right_half]()
        work(1)
        run[to_right + leave_rows + leave_right_half]()


@always_inline
def multiply_tiles[
    type: DType, Work: def(Int, Int) -> None, //, parts: Int, apart: Bool = True
](
    rows: Packed[type],
    row_stride: Int,
    step: Int,
    panel: Packed[type],
    steps: Int,
    to: Floats,
    work: Work,
):
    """Stores the sums of 16 rows with a panel, `[16, 32]`: float32 of bfloat16, int32 of int8.

    From row to row there are `row_stride` numbers of the operands, from one step of the rows to the
    next `step`. Between the instructions other work is done: `work(i, turn)` for each step and each
    of `turns_of` it, in order. It leaves the tiles alone, and what is read and written here.

    apart : whether there is no such work
    """
    comptime size = size_of[Scalar[type]]()
    var left = Int(rows)
    var right = Int(panel)
    run_assembly["tilezero %tmm0\n\ttilezero %tmm1"]()
    for i in range(steps):

        @always_inline
        def of_step(turn: Int) {imm}:
            work(i, turn)

        multiply_step[type, parts, apart](left, right, size * row_stride, of_step)
        left += size * step
        right += parts * PANEL_STEP_BYTES
    inlined_assembly[
        "tilestored %tmm0, ($0,$1,1)\n\ttilestored %tmm1, 64($0,$1,1)",
        NoneType,
        constraints="r,r,~{memory}",
        has_side_effect=True,
    ](Int(to), PANEL_LINE_BYTES)
