"""Prints the PTX of whisper_max's own kernels for GPUs, each after a line "// kernel NAME"."""

from std.compile import compile_info
from std.sys import get_defined_string
from max.gpu.host.compile import get_gpu_target

from gpu_kernels.attention_by_lanes import LANE_QUERIES, by_lanes
from gpu_kernels.attention_by_tiles import by_tiles

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


def main():
    comptime for causal in range(2):
        show[DType.float16, causal == 1]()
        show[DType.bfloat16, causal == 1]()
        show[DType.float32, causal == 1]()
