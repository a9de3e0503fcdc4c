"""Products on tensor cores, and what feeds them: instructions of NVIDIA GPUs from sm_80 on.

A warp multiplies 16 rows by 16 numbers with 16 by 8 columns. Which of them a lane holds is the
instruction's to say (PTX ISA, "mma.m16n8k16"): with g = lane / 4 and t = lane % 4, four registers
of two neighbours each for the left operand, from column 2t and 2t + 8 of the rows g and g + 8; two
for the right one, from row 2t and 2t + 8 of column g; and sums 2t and 2t + 1 of the rows g and
g + 8.

In shared memory a tile is rows of 64 numbers in half precision, eight chunks of 16 bytes. A chunk
stands at its number xor the row's, so that the same chunk of eight rows lies in all banks.
"""

from std.memory import bitcast
from std.sys import inlined_assembly
from std.sys.intrinsics import _RegisterPackType

comptime CHUNK_BYTES = 16
comptime ROW_BYTES = 128
comptime CHUNKS = ROW_BYTES // CHUNK_BYTES

comptime Sums = SIMD[DType.float32, 4]
"""Of a lane: two neighbours of row g, two of row g + 8."""
comptime Fragment = SIMD[DType.uint32, 4]
"""Four registers of two numbers each."""
comptime Registers = _RegisterPackType[UInt32, UInt32, UInt32, UInt32]


@always_inline
def multiply[
    dtype: DType
](rows: Fragment, upper: UInt32, lower: UInt32, sums: Sums) -> Sums:
    """Adds the products of 16 rows with eight columns.

    upper, lower : the right operand's rows 0 to 7 and 8 to 15
    """
    comptime name = "f16" if dtype == DType.float16 else "bf16"
    comptime text = (
        "mma.sync.aligned.m16n8k16.row.col.f32."
        + name
        + "."
        + name
        + ".f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    var r = inlined_assembly[
        text,
        _RegisterPackType[Float32, Float32, Float32, Float32],
        constraints="=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        has_side_effect=True,  # or it might end up where not all lanes come
    ](rows[0], rows[1], rows[2], rows[3], upper, lower, sums[0], sums[1], sums[2], sums[3])
    return Sums(r[0], r[1], r[2], r[3])


@always_inline
def load_matrices[transposed: Bool](address: UInt32) -> Fragment:
    """Four matrices of 8 rows of 16 bytes: lanes 8 i to 8 i + 7 bring the addresses of the i-th's.

    A lane gets two neighbours of row g, from column 2t, or with `transposed` of column g, from row
    2t.
    """
    comptime name = "ldmatrix.sync.aligned.m8n8.x4" + (".trans" if transposed else "")
    var r = inlined_assembly[
        name + ".shared.b16 {$0, $1, $2, $3}, [$4];",
        Registers,
        constraints="=r,=r,=r,=r,r,~{memory}",
        has_side_effect=True,
    ](address)
    return Fragment(r[0], r[1], r[2], r[3])


@always_inline
def pair[dtype: DType](first: Float32, second: Float32) -> UInt32:
    """Two neighbours, rounded."""
    return bitcast[DType.uint32, 1](SIMD[DType.float32, 2](first, second).cast[dtype]())


@always_inline
def chunk_offset(row: Int, chunk: Int) -> Int:
    """Bytes from the beginning of a tile to a chunk of a row."""
    return row * ROW_BYTES + (chunk ^ (row % CHUNKS)) * CHUNK_BYTES


@always_inline
def fetch_chunk(to: UInt32, address: Int, there: Bool):
    """Begins to copy 16 bytes of global memory into shared memory; zeros if nothing is there."""
    inlined_assembly[
        "cp.async.cg.shared.global [$0], [$1], 16, $2;",
        NoneType,
        constraints="r,l,r,~{memory}",
        has_side_effect=True,
    ](to, address, UInt32(CHUNK_BYTES) if there else UInt32(0))


@always_inline
def close_fetches():
    """What was begun since the last call belongs together."""
    inlined_assembly[
        "cp.async.commit_group;", NoneType, constraints="~{memory}", has_side_effect=True
    ]()


@always_inline
def await_fetches[besides: Int]():
    """Waits for this thread's fetches but those of the last `besides` groups."""
    comptime text = "cp.async.wait_group 1;" if besides == 1 else "cp.async.wait_group 0;"
    inlined_assembly[text, NoneType, constraints="~{memory}", has_side_effect=True]()
