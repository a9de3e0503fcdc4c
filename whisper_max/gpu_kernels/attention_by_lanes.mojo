"""Attention for few queries, which waits for memory, and for float32, which has no tensor cores.

Eight lanes share a key, each with eight of its numbers, and a warp looks at four keys at once. Each
such group has a softmax of its own; at the end they are put together. Weights are not rounded.
"""

from std.math import exp2
from std.memory import unsafe_stack_allocation
from std.utils import StaticTuple

from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, block_idx, thread_idx
from max.gpu.memory import AddressSpace
from max.gpu.primitives.warp import shuffle_xor
from max.gpu.sync import barrier

from .extent import Extent, HEAD_DIM, MASKED, LOWEST, SCALE_LOG2E, WARP

comptime LANE_QUERIES = 8
"""Most queries of a block."""
comptime PART = 8
"""Numbers of a head that one lane keeps."""
comptime PARTS = HEAD_DIM // PART
comptime GROUPS = WARP // PARTS
"""Keys that a warp looks at together."""
comptime AHEAD = 4
"""Keys in a row that a lane loads before it looks at one."""
comptime LOAD_BYTES = 16


@always_inline
def threads_by_lanes[most: Int]() -> Int:
    """Of a block. For one query twice as many: more loads are then under way at a time."""
    return 512 if most == 1 else 256


@__llvm_metadata(
    MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(threads_by_lanes[most]()))
)
def by_lanes[
    dtype: DType, causal: Bool, most: Int
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
    """`most` queries of a head in a block.

    last_seen : with `causal`, the last key that each query sees, in ascending order
    query_count and the others : the fields of Extent
    """
    var extent = Extent(
        Int(query_count), Int(key_count), Int(heads), Int(key_stride), Int(head_stride)
    )
    comptime Numbers = SIMD[DType.float32, PART]
    comptime warps = threads_by_lanes[most]() // WARP
    var lane = Int(thread_idx.x) % WARP
    var warp = Int(thread_idx.x) // WARP
    var part = lane % PARTS * PART
    var head = Int(block_idx.y)
    var batch = Int(block_idx.z)
    var first = Int(block_idx.x) * most
    var present = min(most, extent.queries - first)
    var end = Int32(extent.keys)

    var q = Array[Numbers, most](fill=0)
    var seen = Array[Int32, most](fill=end - 1)
    comptime for i in range(most):
        var query = first + min(i, present - 1)
        var at = queries.unsafe_offset(extent.query(batch, query, head) + part)
        q[i] = at.unsafe_load[width=PART]().cast[DType.float32]() * SCALE_LOG2E
        comptime if causal:
            seen[i] = last_seen.unsafe_offset(query).unsafe_load()
    comptime if causal:
        end = seen[most - 1] + 1

    var begin = extent.key(batch, head) + part
    var highest = Array[Float32, most](fill=LOWEST)
    var total = Array[Float32, most](fill=0)
    var sums = Array[Numbers, most](fill=0)
    comptime stride = warps * GROUPS
    for step in range(warp * GROUPS, Int(end), stride * AHEAD):
        var key = Int32(step + lane // PARTS)
        var k = Array[SIMD[dtype, PART], AHEAD](fill=0)
        var v = Array[SIMD[dtype, PART], AHEAD](fill=0)
        comptime for i in range(AHEAD):
            var there = key + Int32(i * stride)
            var at = begin + Int(min(there, end - 1)) * extent.key_stride
            k[i] = keys.unsafe_offset(at).unsafe_load[width=PART, alignment=LOAD_BYTES]()
            if there < end:  # else 0, as its weight: infinity times 0 would be none
                v[i] = values.unsafe_offset(at).unsafe_load[width=PART, alignment=LOAD_BYTES]()
        comptime for one in range(most):
            if one < present:
                var scores = SIMD[DType.float32, AHEAD](0)
                comptime for i in range(AHEAD):
                    var score = Float32(0)
                    comptime for j in range(PART):
                        score = q[one][j].fma(k[i][j].cast[DType.float32](), score)
                    comptime for bit in range(3):
                        score += shuffle_xor(score, UInt32(1 << bit))
                    scores[i] = score if key + Int32(i * stride) <= seen[one] else MASKED
                var high = max(highest[one], scores.reduce_max())
                var rescale = exp2(highest[one] - high)
                highest[one] = high
                total[one] *= rescale
                sums[one] *= rescale
                comptime for i in range(AHEAD):
                    var weight = exp2(scores[i] - high)
                    total[one] += weight
                    sums[one] += weight * v[i].cast[DType.float32]()

    # The four groups of a warp, and then the warps.
    comptime row = HEAD_DIM + 2
    var shared = unsafe_stack_allocation[
        warps * most * row, Float32, alignment=16, address_space=AddressSpace.SHARED
    ]()
    comptime for one in range(most):
        comptime for bit in range(3, 5):
            comptime distance = UInt32(1 << bit)
            var high = max(highest[one], shuffle_xor(highest[one], distance))
            var rescale = exp2(highest[one] - high)
            highest[one] = high
            total[one] *= rescale
            total[one] += shuffle_xor(total[one], distance)
            sums[one] *= rescale
            comptime for i in range(PART):
                sums[one][i] += shuffle_xor(sums[one][i], distance)
        var mine = shared.unsafe_offset((warp * most + one) * row)
        if lane < PARTS:
            comptime for i in range(PART):
                mine.unsafe_offset(part + i).unsafe_store(sums[one][i])
        if lane == 0:
            mine.unsafe_offset(HEAD_DIM).unsafe_store(highest[one])
            mine.unsafe_offset(HEAD_DIM + 1).unsafe_store(total[one])
    barrier()
    for number in range(Int(thread_idx.x), present * HEAD_DIM, threads_by_lanes[most]()):
        var one = number // HEAD_DIM
        var high = LOWEST
        comptime for i in range(warps):
            var other = shared.unsafe_offset((i * most + one) * row)
            high = max(high, other.unsafe_offset(HEAD_DIM).unsafe_load())
        var all = Float32(0)
        var sum = Float32(0)
        comptime for i in range(warps):
            var other = shared.unsafe_offset((i * most + one) * row)
            var rescale = exp2(other.unsafe_offset(HEAD_DIM).unsafe_load() - high)
            all += rescale * other.unsafe_offset(HEAD_DIM + 1).unsafe_load()
            sum += rescale * other.unsafe_offset(number % HEAD_DIM).unsafe_load()
        var to = output.unsafe_offset(extent.query(batch, first + one, head) + number % HEAD_DIM)
        to.unsafe_store((sum / all).cast[dtype]())
