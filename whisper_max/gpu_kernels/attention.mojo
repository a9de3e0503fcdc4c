"""Attention without a matrix of scores: softmax as the keys go by.

A row's highest score so far, the sum of its weights and the sum of weighted values are kept; when a
higher score comes, both sums are scaled down (FlashAttention, arXiv 2205.14135 and 2307.08691).
Scores are float32 whatever the dtype, and never rounded.
"""

from std.math import ceildiv, exp

import extensibility
from extensibility import InputTensor, OutputTensor
from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext

from .attention_by_lanes import LANE_QUERIES, by_lanes, threads_by_lanes
from .attention_by_tiles import TILE_QUERIES, TILE_THREADS, by_tiles
from .extent import Extent, HEAD_DIM, LOWEST, SCALE


def by_loops[
    dtype: DType, causal: Bool
](
    output: Pointer[Scalar[dtype], MutAnyOrigin],
    queries: Pointer[Scalar[dtype], MutAnyOrigin],
    keys: Pointer[Scalar[dtype], MutAnyOrigin],
    values: Pointer[Scalar[dtype], MutAnyOrigin],
    last_seen: Pointer[Int32, MutAnyOrigin],
    extent: Extent,
    batch: Int,
):
    """The same on a CPU, where graphs for GPUs are only tried: one query after the other.

    With `exp`: on a CPU `exp2` is off by up to 1.4e-5 of its result in Mojo 1.2.
    """

    def one_head(number: Int) {imm}:
        var head = number % extent.heads
        var begin = extent.key(number // extent.heads, head)
        for query in range(extent.queries):
            var at = extent.query(number // extent.heads, query, head)
            var q = queries.unsafe_offset(at).unsafe_load[width=HEAD_DIM]().cast[DType.float32]()
            var end = extent.keys
            comptime if causal:
                end = Int(last_seen.unsafe_offset(query).unsafe_load()) + 1
            var high = LOWEST
            var total = Float32(0)
            var sums = SIMD[DType.float32, HEAD_DIM](0)
            for key in range(end):
                var there = begin + key * extent.key_stride
                var k = keys.unsafe_offset(there).unsafe_load[width=HEAD_DIM]()
                var v = values.unsafe_offset(there).unsafe_load[width=HEAD_DIM]()
                var score = (q * k.cast[DType.float32]()).reduce_add() * SCALE
                if score > high:
                    var rescale = exp(high - score)
                    high = score
                    total *= rescale
                    sums *= rescale
                var weight = exp(score - high)
                total += weight
                sums += weight * v.cast[DType.float32]()
            output.unsafe_offset(at).unsafe_store((sums / total).cast[dtype]())

    sync_parallelize(one_head, batch * extent.heads)


def attend[
    dtype: DType, causal: Bool, target: StaticString
](
    output: Pointer[Scalar[dtype], MutAnyOrigin],
    queries: Pointer[Scalar[dtype], MutAnyOrigin],
    keys: Pointer[Scalar[dtype], MutAnyOrigin],
    values: Pointer[Scalar[dtype], MutAnyOrigin],
    last_seen: Pointer[Int32, MutAnyOrigin],
    extent: Extent,
    batch: Int,
    ctx: DeviceContext,
) raises:
    """The kernel for these sizes."""
    comptime if target == "cpu":
        by_loops[dtype, causal](output, queries, keys, values, last_seen, extent, batch)
    else:
        comptime if dtype.is_half_float():
            if extent.queries > LANE_QUERIES:
                ctx.enqueue_function[by_tiles[dtype, causal]](
                    output,
                    queries,
                    keys,
                    values,
                    last_seen,
                    Int64(extent.queries),
                    Int64(extent.keys),
                    Int64(extent.heads),
                    Int64(extent.key_stride),
                    Int64(extent.head_stride),
                    grid_dim=(ceildiv(extent.queries, TILE_QUERIES), extent.heads, batch),
                    block_dim=TILE_THREADS,
                )
                return
        comptime for several in range(2):
            comptime most = LANE_QUERIES if several == 1 else 1
            if (extent.queries > 1) == (several == 1):
                ctx.enqueue_function[by_lanes[dtype, causal, most]](
                    output,
                    queries,
                    keys,
                    values,
                    last_seen,
                    Int64(extent.queries),
                    Int64(extent.keys),
                    Int64(extent.heads),
                    Int64(extent.key_stride),
                    Int64(extent.head_stride),
                    grid_dim=(ceildiv(extent.queries, most), extent.heads, batch),
                    block_dim=threads_by_lanes[most](),
                )


@extensibility.register("whisper_attention")
struct Attention:
    """Softmax of scores over all keys, times values.

    queries and output, shape = (batch, queries, heads, 64)
    keys and values, shape = (batch, heads, keys, 64) if `heads_first`, else as queries
    """

    @staticmethod
    def execute[
        dtype: DType, //, heads_first: Bool, target: StaticString
    ](
        output: OutputTensor[dtype=dtype, rank=4, ...],
        queries: InputTensor[dtype=dtype, rank=4, ...],
        keys: InputTensor[dtype=dtype, rank=4, ...],
        values: InputTensor[dtype=dtype, rank=4, ...],
        ctx: DeviceContext,
    ) raises:
        var nobody = queries.unsafe_ptr().unsafe_bitcast[Int32]()
        attend[dtype, False, target](
            output.unsafe_ptr(),
            queries.unsafe_ptr(),
            keys.unsafe_ptr(),
            values.unsafe_ptr(),
            nobody,
            extent_of[heads_first](queries, keys),
            queries.dim_size(0),
            ctx,
        )


@extensibility.register("whisper_causal_attention")
struct CausalAttention:
    """As `whisper_attention`; each query sees the keys up to one.

    last_seen, shape = (queries,), int32: that one's number, in ascending order
    """

    @staticmethod
    def execute[
        dtype: DType, //, heads_first: Bool, target: StaticString
    ](
        output: OutputTensor[dtype=dtype, rank=4, ...],
        queries: InputTensor[dtype=dtype, rank=4, ...],
        keys: InputTensor[dtype=dtype, rank=4, ...],
        values: InputTensor[dtype=dtype, rank=4, ...],
        last_seen: InputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        attend[dtype, True, target](
            output.unsafe_ptr(),
            queries.unsafe_ptr(),
            keys.unsafe_ptr(),
            values.unsafe_ptr(),
            last_seen.unsafe_ptr(),
            extent_of[heads_first](queries, keys),
            queries.dim_size(0),
            ctx,
        )


def extent_of[
    dtype: DType, //, heads_first: Bool
](
    queries: InputTensor[dtype=dtype, rank=4, ...], keys: InputTensor[dtype=dtype, rank=4, ...]
) -> Extent:
    """The sizes of these, and how keys lie."""
    var heads = queries.dim_size(2)
    comptime if heads_first:
        var count = keys.dim_size(2)
        return Extent(queries.dim_size(1), count, heads, HEAD_DIM, count * HEAD_DIM)
    else:
        return Extent(queries.dim_size(1), keys.dim_size(1), heads, heads * HEAD_DIM, HEAD_DIM)
