"""Prints the PTX of whisper_max's own kernels for GPUs, each after a line "// kernel NAME"."""

from std.compile import compile_info
from std.sys import get_defined_string
from max.gpu.host.compile import get_gpu_target

from gpu_kernels.attention_by_lanes import LANE_QUERIES, by_lanes
from gpu_kernels.attention_by_tiles import by_tiles
from gpu_kernels.few_rows import by_few_rows

comptime TARGET = get_gpu_target[get_defined_string["architecture"]()]()


def show[dtype: DType, causal: Bool]():
    var kind = String(dtype) + (" causal" if causal else "")
    comptime if dtype.is_half_float():
        print("// kernel tiles", kind)
        print(compile_info[by_tiles[dtype, causal], emission_kind="asm", target=TARGET]())
    print("// kernel lanes 1", kind)
    print(compile_info[by_lanes[dtype, causal, 1], emission_kind="asm", target=TARGET]())
    print("// kernel lanes", LANE_QUERIES, kind)
    print(compile_info[by_lanes[dtype, causal, LANE_QUERIES], emission_kind="asm", target=TARGET]())


def show_linear[dtype: DType, biased: Bool, gelu: Bool, adding: Bool]():
    var kind = " biased" if biased else ""
    kind += " gelu" if gelu else ""
    kind += " adding" if adding else ""
    print("// kernel rows ", dtype, kind, sep="")
    comptime kernel = by_few_rows[dtype, biased, gelu, adding]
    print(compile_info[kernel, emission_kind="asm", target=TARGET]())


def main():
    comptime for half in range(2):
        comptime dtype = DType.bfloat16 if half == 1 else DType.float16
        show_linear[dtype, False, False, False]()
        show_linear[dtype, True, False, False]()
        show_linear[dtype, True, True, False]()
        show_linear[dtype, True, False, True]()
    comptime for causal in range(2):
        show[DType.float16, causal == 1]()
        show[DType.bfloat16, causal == 1]()
        show[DType.float32, causal == 1]()
