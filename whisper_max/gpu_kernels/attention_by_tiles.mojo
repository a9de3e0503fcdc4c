"""Attention for many queries in half precision, on tensor cores.

A block of four warps has 128 queries of a head, and 64 keys and values at a time in shared memory,
while the next 64 are fetched. Weights are rounded to the dtype before they are multiplied with
values; their sum is of what they were.
"""

from std.math import ceildiv, exp2
from std.memory import bitcast, unsafe_stack_allocation
from std.utils import StaticTuple

from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, block_idx, thread_idx
from max.gpu.memory import AddressSpace
from max.gpu.primitives.warp import shuffle_xor
from max.gpu.sync import barrier

from .extent import Extent, HEAD_DIM, MASKED, LOWEST, SCALE_LOG2E, WARP
from .tensor_cores import (
    CHUNKS,
    CHUNK_BYTES,
    Fragment,
    ROW_BYTES,
    Sums,
    await_fetches,
    chunk_offset,
    close_fetches,
    fetch_chunk,
    load_matrices,
    multiply,
    pair,
)

comptime TILE_THREADS = 128
comptime TILE_KEYS = 64
comptime TILE_BYTES = TILE_KEYS * ROW_BYTES
comptime FRAGMENTS = 2
"""Of 16 queries each, in a warp."""
comptime WARP_QUERIES = 16 * FRAGMENTS
comptime TILE_QUERIES = TILE_THREADS // WARP * WARP_QUERIES
comptime LANE_ROWS = 2 * FRAGMENTS
"""Queries that a lane has a part of: rows g and g + 8 of each fragment."""
comptime EIGHTS = HEAD_DIM // 8
"""Fragments of eight columns: keys of a tile, or numbers of a head."""
comptime STEPS = HEAD_DIM // 16
"""Products for a fragment of scores, and likewise of values."""
comptime HALF_BYTES = 2
comptime PAIR_BYTES = 2 * HALF_BYTES


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(TILE_THREADS)))
def by_tiles[
    dtype: DType, causal: Bool
](
    output: Pointer[Scalar[dtype], MutAnyOrigin],
    queries: Pointer[Scalar[dtype], MutAnyOrigin],
    keys: Pointer[Scalar[dtype], MutAnyOrigin],
    values: Pointer[Scalar[dtype], MutAnyOrigin],
    last_seen: Pointer[Int32, MutAnyOrigin],
    query_count: Int64,
    key_count: Int64,
    heads: Int64,
    key_stride: Int64,
    head_stride: Int64,
):
    """128 queries of a head.

    last_seen : with `causal`, the last key that each query sees, in ascending order
    query_count and the others : the fields of Extent
    """
    var extent = Extent(
        Int(query_count), Int(key_count), Int(heads), Int(key_stride), Int(head_stride)
    )
    var lane = Int(thread_idx.x) % WARP
    var head = Int(block_idx.y)
    var batch = Int(block_idx.z)
    var block_first = Int(block_idx.x) * TILE_QUERIES
    var first = block_first + Int(thread_idx.x) // WARP * WARP_QUERIES + lane // 4
    var end = extent.keys
    comptime if causal:
        var last = min(block_first + TILE_QUERIES, extent.queries) - 1
        end = Int(last_seen.unsafe_offset(last).unsafe_load()) + 1

    var shared = unsafe_stack_allocation[
        4 * TILE_BYTES, UInt8, alignment=128, address_space=AddressSpace.SHARED
    ]()
    var begin = extent.key(batch, head)
    var tiles = KeyValueTiles(
        UInt32(Int(shared)),
        Int(keys.unsafe_offset(begin)),
        Int(values.unsafe_offset(begin)),
        extent.key_stride * HALF_BYTES,
        end,
        Int(thread_idx.x),
    )

    # Of queries that there are not the last is computed again, and not stored.
    var rows = QueryRows[dtype](Int32(end - 1))
    comptime for row in range(LANE_ROWS):
        var query = min(first + 8 * row, extent.queries - 1)
        comptime if causal:
            rows.seen[row] = last_seen.unsafe_offset(query).unsafe_load()
        rows.load[row](queries.unsafe_offset(extent.query(batch, query, head) + lane % 4 * 2))

    var unmasked = 0 if causal else end // TILE_KEYS
    tiles.fetch(0)
    for tile in range(unmasked):
        tiles.await_and_fetch_next(tile)
        rows.add[masked=False](tiles, tile, lane)
        barrier()
    for tile in range(unmasked, ceildiv(end, TILE_KEYS)):
        tiles.await_and_fetch_next(tile)
        rows.add[masked=True](tiles, tile, lane)
        barrier()

    comptime for row in range(LANE_ROWS):
        var total = rows.total[row]
        total += shuffle_xor(total, 1)
        total += shuffle_xor(total, 2)
        var query = first + 8 * row
        if query < extent.queries:
            var to = output.unsafe_offset(extent.query(batch, query, head) + lane % 4 * 2)
            var share = 1 / total
            comptime for eight in range(EIGHTS):
                var s = rows.sums[row // 2 * EIGHTS + eight] * share
                var two = SIMD[DType.float32, 2](s[row % 2 * 2], s[row % 2 * 2 + 1])
                to.unsafe_offset(8 * eight).unsafe_store[alignment=PAIR_BYTES](two.cast[dtype]())


struct QueryRows[dtype: DType]:
    """32 queries of a warp, their softmax so far, and its values: what one lane has of them.

    Fragments are as in tensor_cores.mojo; a lane's row 2 i is row g of the i-th, 2 i + 1 row g + 8.
    """

    var queries: Array[Fragment, FRAGMENTS * STEPS]
    var seen: Array[Int32, LANE_ROWS]
    """The last key that each row sees."""
    var sums: Array[Sums, FRAGMENTS * EIGHTS]
    """Of weighted values."""
    var highest: Array[Float32, LANE_ROWS]
    """Score of each row, times SCALE_LOG2E."""
    var total: Array[Float32, LANE_ROWS]
    """Of the weights in this lane's columns."""

    @always_inline
    def __init__(out self, seen: Int32):
        self.queries = Array[Fragment, FRAGMENTS * STEPS](fill=0)
        self.seen = Array[Int32, LANE_ROWS](fill=seen)
        self.sums = Array[Sums, FRAGMENTS * EIGHTS](fill=0)
        self.highest = Array[Float32, LANE_ROWS](fill=LOWEST)
        self.total = Array[Float32, LANE_ROWS](fill=0)

    @always_inline
    def load[row: Int](mut self, query: Pointer[Scalar[Self.dtype], MutAnyOrigin]):
        """Takes a query, from this lane's first column on."""
        comptime for step in range(STEPS):
            comptime for half in range(2):
                var two = query.unsafe_offset(16 * step + 8 * half).unsafe_load[
                    width=2, alignment=PAIR_BYTES
                ]()
                comptime register = row % 2 + 2 * half
                self.queries[row // 2 * STEPS + step][register] = bitcast[DType.uint32, 1](two)

    @always_inline
    def add[masked: Bool](mut self, tiles: KeyValueTiles, tile: Int, lane: Int):
        """One tile of keys and values, which is there."""
        var scores = Array[Sums, FRAGMENTS * EIGHTS](fill=0)
        comptime for half in range(2):
            var column = tiles.key_chunk(tile, lane % 8, 4 * half + lane // 8)
            comptime for eight in range(EIGHTS):
                var right = load_matrices[transposed=False](
                    column + UInt32(8 * eight * ROW_BYTES)
                )
                comptime for fragment in range(FRAGMENTS):
                    comptime at = fragment * EIGHTS + eight
                    comptime left = fragment * STEPS + 2 * half
                    var sum = multiply[Self.dtype](
                        self.queries[left], right[0], right[1], scores[at]
                    )
                    scores[at] = multiply[Self.dtype](
                        self.queries[left + 1], right[2], right[3], sum
                    )

        comptime for row in range(LANE_ROWS):
            self._weigh[row, masked](scores, Int32(tile * TILE_KEYS + lane % 4 * 2))

        comptime for step in range(STEPS):
            var weights = Array[Fragment, FRAGMENTS](fill=0)
            comptime for fragment in range(FRAGMENTS):
                comptime for i in range(4):
                    var s = scores[fragment * EIGHTS + 2 * step + i // 2]
                    weights[fragment][i] = pair[Self.dtype](s[i % 2 * 2], s[i % 2 * 2 + 1])
            comptime for two in range(EIGHTS // 2):
                var column = tiles.value_chunk(tile, lane % 16, 2 * two + lane // 16)
                var right = load_matrices[transposed=True](
                    column + UInt32(16 * step * ROW_BYTES)
                )
                comptime for fragment in range(FRAGMENTS):
                    comptime at = fragment * EIGHTS + 2 * two
                    self.sums[at] = multiply[Self.dtype](
                        weights[fragment], right[0], right[1], self.sums[at]
                    )
                    self.sums[at + 1] = multiply[Self.dtype](
                        weights[fragment], right[2], right[3], self.sums[at + 1]
                    )

    @always_inline
    def _weigh[
        row: Int, masked: Bool
    ](mut self, mut scores: Array[Sums, FRAGMENTS * EIGHTS], first_key: Int32):
        """Makes weights of a row's scores, and scales down what is there if they are higher.

        first_key : the key of this lane's first column
        """
        comptime first = row // 2 * EIGHTS
        comptime side = row % 2 * 2
        comptime if masked:
            var left = self.seen[row] - first_key
            comptime for eight in range(EIGHTS):
                comptime for i in range(2):
                    if Int32(8 * eight + i) > left:
                        scores[first + eight][side + i] = MASKED
        var high = LOWEST
        comptime for eight in range(EIGHTS):
            high = max(high, scores[first + eight][side])
            high = max(high, scores[first + eight][side + 1])
        high = max(high, shuffle_xor(high, 1))
        high = max(high, shuffle_xor(high, 2))
        high = max(self.highest[row], high * SCALE_LOG2E)
        var rescale = exp2(self.highest[row] - high)
        self.highest[row] = high
        var total = Float32(0)
        comptime for eight in range(EIGHTS):
            comptime for i in range(2):
                var weight = exp2(scores[first + eight][side + i] * SCALE_LOG2E - high)
                scores[first + eight][side + i] = weight
                total += weight
                self.sums[first + eight][side + i] *= rescale
        self.total[row] = self.total[row] * rescale + total


@fieldwise_init
struct KeyValueTiles(ImplicitlyCopyable):
    """Keys and values on their way into shared memory: one tile of each is used, one fetched."""

    var shared: UInt32
    var keys: Int
    var values: Int
    """The addresses of a head's first key and value."""
    var key_stride: Int
    """Bytes from one to the next."""
    var end: Int
    var thread: Int

    @always_inline
    def await_and_fetch_next(self, tile: Int):
        """For a tile that was fetched: it is there for the whole block, the next under way."""
        self.fetch(tile + 1)
        await_fetches[besides=1]()
        barrier()

    @always_inline
    def fetch(self, tile: Int):
        """Begins to fetch a tile, 16 bytes of a row at a time; none where it is beyond the end."""
        if tile * TILE_KEYS < self.end:
            comptime for i in range(TILE_KEYS * CHUNKS // TILE_THREADS):
                var number = i * TILE_THREADS + self.thread
                var row = number // CHUNKS
                var chunk = number % CHUNKS
                var key = tile * TILE_KEYS + row
                var there = key < self.end
                var at = min(key, self.end - 1) * self.key_stride + chunk * CHUNK_BYTES
                fetch_chunk(self.key_chunk(tile, row, chunk), self.keys + at, there)
                fetch_chunk(self.value_chunk(tile, row, chunk), self.values + at, there)
        close_fetches()

    @always_inline
    def key_chunk(self, tile: Int, row: Int, chunk: Int) -> UInt32:
        """The address in shared memory of a part of a key."""
        return self.shared + UInt32(tile % 2 * 2 * TILE_BYTES + chunk_offset(row, chunk))

    @always_inline
    def value_chunk(self, tile: Int, row: Int, chunk: Int) -> UInt32:
        """As `key_chunk`, of a value."""
        return self.key_chunk(tile, row, chunk) + UInt32(TILE_BYTES)
