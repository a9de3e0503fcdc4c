"""Linear layers of a decoding step: up to eight rows at a time, on tensor cores.

Few rows are multiplied with all weights, and wait for these. So weights are the left operand of
the products, 16 outputs at a time, and the rows are the right one's eight columns, of which as many
count as there are rows. Inputs may be added up in any order, if it is the same on both sides: a
lane takes eight neighbours of a row of weights, 16 bytes, and the same eight of its row of inputs.
"""

from std.math import ceildiv, erf
from std.memory import bitcast, unsafe_stack_allocation
from std.utils import StaticTuple

import extensibility
from extensibility import InputTensor, OutputTensor
from max.algorithm import sync_parallelize
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, block_idx, thread_idx
from max.gpu.host import DeviceContext
from max.gpu.memory import AddressSpace
from max.gpu.sync import barrier

from .extent import WARP
from .tensor_cores import CHUNK_BYTES, Fragment, Sums, multiply

comptime ROWS = 8
"""Rows that a thread block computes."""
comptime OUTPUTS = 16
"""Outputs that a thread block computes; its warps share the inputs."""
comptime ROW_WARPS = 8
"""Warps of a thread block."""
comptime ROW_THREADS = ROW_WARPS * WARP
comptime EIGHT = 8
"""Neighbouring inputs that a lane takes."""
comptime INPUTS = 4 * EIGHT
"""Inputs that a warp takes at a time; a layer has a multiple of them."""
comptime LOADS = 4
"""Loads of 16 bytes that are under way at a time, of each row of weights."""
comptime ROOT_OF_HALF: Float32 = 0.7071067811865476


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(ROW_THREADS)))
def by_few_rows[
    dtype: DType, biased: Bool, gelu: Bool, adding: Bool
](
    output: Pointer[Scalar[dtype], MutAnyOrigin],
    inputs: Pointer[Scalar[dtype], MutAnyOrigin],
    weight: Pointer[Scalar[dtype], MutAnyOrigin],
    bias: Pointer[Scalar[dtype], MutAnyOrigin],
    added: Pointer[Scalar[dtype], MutAnyOrigin],
    row_count: Int64,
    output_count: Int64,
    input_count: Int64,
):
    """16 outputs of eight rows: see `whisper_few_rows`."""
    var rows = Int(row_count)
    var outputs = Int(output_count)
    var length = Int(input_count)
    var lane = Int(thread_idx.x) % WARP
    var warp = Int(thread_idx.x) // WARP
    var g = lane // 4
    var t = lane % 4
    var first = Int(block_idx.x) * OUTPUTS
    var first_row = Int(block_idx.y) * ROWS
    # What is beyond the last row or output is the last one's again, and not stored.
    var upper = weight.unsafe_offset(min(first + g, outputs - 1) * length + t * EIGHT)
    var lower = weight.unsafe_offset(min(first + g + 8, outputs - 1) * length + t * EIGHT)
    var row = inputs.unsafe_offset(min(first_row + g, rows - 1) * length + t * EIGHT)

    var sums = Sums(0)
    for begin in range(warp * INPUTS, length, ROW_WARPS * INPUTS * LOADS):
        var a = Array[Fragment, LOADS](fill=0)
        var b = Array[Fragment, LOADS](fill=0)
        var x = Array[Fragment, LOADS](fill=0)
        comptime for i in range(LOADS):
            var at = begin + i * ROW_WARPS * INPUTS
            if at < length:
                a[i] = eight(upper.unsafe_offset(at))
                b[i] = eight(lower.unsafe_offset(at))
                x[i] = eight(row.unsafe_offset(at))
        comptime for i in range(LOADS):
            comptime for half in range(2):
                comptime k = 2 * half
                var left = Fragment(a[i][k], b[i][k], a[i][k + 1], b[i][k + 1])
                sums = multiply[dtype](left, x[i][k], x[i][k + 1], sums)

    var shared = unsafe_stack_allocation[
        ROW_WARPS * ROWS * OUTPUTS, Float32, alignment=16, address_space=AddressSpace.SHARED
    ]()
    comptime for i in range(4):
        var place = (warp * ROWS + 2 * t + i % 2) * OUTPUTS + g + i // 2 * 8
        shared.unsafe_offset(place).unsafe_store(sums[i])
    barrier()
    var at_row = Int(thread_idx.x) // OUTPUTS
    var number = first + Int(thread_idx.x) % OUTPUTS
    if at_row < min(ROWS, rows - first_row) and number < outputs:
        var sum = Float32(0)
        comptime for i in range(ROW_WARPS):
            sum += shared.unsafe_offset(i * ROWS * OUTPUTS + Int(thread_idx.x)).unsafe_load()
        var place = (first_row + at_row) * outputs + number
        var result = finish[dtype, biased, gelu, adding](sum, bias, number, added, place)
        output.unsafe_offset(place).unsafe_store(result)


@always_inline
def eight[dtype: DType](at: Pointer[Scalar[dtype], MutAnyOrigin]) -> Fragment:
    """Eight neighbours, 16 bytes."""
    var numbers = at.unsafe_load[width=EIGHT, alignment=CHUNK_BYTES]()
    return bitcast[DType.uint32, 4](numbers)


@always_inline
def finish[
    dtype: DType, biased: Bool, gelu: Bool, adding: Bool
](
    sum: Float32,
    bias: Pointer[Scalar[dtype], MutAnyOrigin],
    number: Int,
    added: Pointer[Scalar[dtype], MutAnyOrigin],
    place: Int,
) -> Scalar[dtype]:
    """What comes after a product. It is rounded once, at the end."""
    var y = sum
    comptime if biased:
        y += bias.unsafe_offset(number).unsafe_load().cast[DType.float32]()
    comptime if gelu:
        y = 0.5 * y * (1 + erf(y * ROOT_OF_HALF))
    comptime if adding:
        y += added.unsafe_offset(place).unsafe_load().cast[DType.float32]()
    return y.cast[dtype]()


@extensibility.register("whisper_few_rows")
struct FewRows:
    """Computes inputs @ weight.T + bias; then GELU, if asked for; then something added.

    inputs, shape = (rows, in); in is a multiple of 32
    weight, shape = (out, in)
    bias, shape = (out,), if `biased`
    added, shape = (rows, out), if `adding`
    """

    @staticmethod
    def execute[
        dtype: DType, //, biased: Bool, gelu: Bool, adding: Bool, target: StaticString
    ](
        output: OutputTensor[dtype=dtype, rank=2, ...],
        inputs: InputTensor[dtype=dtype, rank=2, ...],
        weight: InputTensor[dtype=dtype, rank=2, ...],
        bias: InputTensor[dtype=dtype, rank=1, ...],
        added: InputTensor[dtype=dtype, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        var rows = inputs.dim_size(0)
        var length = inputs.dim_size(1)
        var outputs = weight.dim_size(0)
        var to = output.unsafe_ptr()
        var x = inputs.unsafe_ptr()
        var weights = weight.unsafe_ptr()
        var biases = bias.unsafe_ptr()
        var others = added.unsafe_ptr()
        comptime if target == "cpu":

            def one_output(number: Int) {imm}:
                for row in range(rows):
                    var sum = SIMD[DType.float32, INPUTS](0)
                    for at in range(0, length, INPUTS):
                        var w = weights.unsafe_offset(number * length + at)
                        var v = x.unsafe_offset(row * length + at)
                        sum = v.unsafe_load[width=INPUTS]().cast[DType.float32]().fma(
                            w.unsafe_load[width=INPUTS]().cast[DType.float32](), sum
                        )
                    var place = row * outputs + number
                    var result = finish[dtype, biased, gelu, adding](
                        sum.reduce_add(), biases, number, others, place
                    )
                    to.unsafe_offset(place).unsafe_store(result)

            sync_parallelize(one_output, outputs)
        else:
            ctx.enqueue_function[by_few_rows[dtype, biased, gelu, adding]](
                to,
                x,
                weights,
                biases,
                others,
                Int64(rows),
                Int64(outputs),
                Int64(length),
                grid_dim=(ceildiv(outputs, OUTPUTS), ceildiv(rows, ROWS)),
                block_dim=ROW_THREADS,
            )
