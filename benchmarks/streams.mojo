"""How fast a few rows are multiplied with weights that come from memory, as in a decoding step.

    mojo run -I whisper_max benchmarks/streams.mojo

Layers of a decoder of width 768, one after the other in 160 MB, two workers, huge pages where there
are any. Prints billions of bytes of weights a second, the median of some passes. Nothing else
should run: what memory gives changes from minute to minute, so compare what was measured in turns.

-D megabytes=N : of weights
-D passes=N
"""

from std.ffi import external_call
from std.memory.alloc import unsafe_alloc
from std.sys import CompilationTarget, get_defined_int, simd_width_of, size_of
from std.time import perf_counter_ns

from max.algorithm import sync_parallelize

from kernels.gemm import F32, Floats, Packed, raw
from kernels.norm import Norm
from kernels.phases import Phases
from kernels.products import I8
from kernels.projection import Projection, project_few

comptime BYTES = get_defined_int["megabytes", 160]() << 20
comptime PASSES = get_defined_int["passes", 9]()
comptime TEAM = 2
comptime WIDTH = simd_width_of[F32]()
comptime HUGE_PAGE = 1 << 21
comptime MADV_HUGEPAGE = Int32(14)
comptime LONGEST = 3072
comptime MOST_ROWS = 10


def zeros(count: Int) -> Floats:
    """So many zeros: they take as long as other numbers."""
    var result = unsafe_alloc[Float32](count, alignment=HUGE_PAGE)
    _ = external_call["madvise", Int32](result, count * size_of[Float32](), MADV_HUGEPAGE)
    for i in range(count):
        result.unsafe_offset(i).unsafe_write(Float32(0))
    return raw(result)


def gigabytes[
    type: DType, product: DType
](memory: Floats, vectors: Floats, output: Floats, rows: Int, length: Int, columns: Int) -> Float64:
    """Of layers (columns, length) in `memory`, a second.

    vectors : what stands for rows, biases, scales and norms
    """
    var weights = Packed[type](unsafe_from_address=Int(memory))
    var size = length * columns
    var layers = max(1, BYTES // (size * size_of[Scalar[type]]()))
    var times = List[Float64]()
    for _ in range(PASSES):
        var phases = Phases(layers, TEAM)

        def worker(
            index: Int
        ) {
            var phases, var weights, var size, var layers, var vectors, var output, var rows,
            var length, var columns,
        }:
            var phase = phases.of(index)
            for layer in range(layers):
                var projection = Projection[type, WIDTH, product, False](
                    output=output,
                    x=vectors,
                    weight=weights.unsafe_offset(layer * size),
                    scale=vectors,
                    bias=vectors,
                    residual=output,
                    norm=Norm(vectors, vectors, length),
                    rows=rows,
                    length=length,
                    columns=columns,
                    residual_rows=rows,
                    scaled=type == I8,
                    gelu=False,
                    packs_output=False,
                )
                project_few(phase, TEAM, projection)

        var begin = perf_counter_ns()
        sync_parallelize(worker, TEAM)
        times.append(Float64(perf_counter_ns() - begin))
        phases.free()
    sort(times)
    return Float64(layers * size * size_of[Scalar[type]]()) / times[PASSES // 2]


def show[type: DType, product: DType](memory: Floats, vectors: Floats, output: Floats):
    """One line for each number of rows, of two layers of an MLP and one of attention."""
    for rows in [1, 2, 3, 4, 5, MOST_ROWS]:
        print(type, "rows", rows, end="")
        for shape in [(768, 768), (768, 3072), (3072, 768)]:
            var rate = gigabytes[type, product](
                memory, vectors, output, rows, shape[0], shape[1]
            )
            print("  ", shape[0], "to", shape[1], round(rate, 1), "GB/s", end="")
        print()


def main():
    var memory = zeros(max(BYTES // size_of[Float32](), LONGEST * 768))
    var vectors = zeros(MOST_ROWS * LONGEST)
    var output = zeros(MOST_ROWS * LONGEST)
    show[DType.float16, F32](memory, vectors, output)
    comptime if CompilationTarget.has_vnni():
        show[I8, I8](memory, vectors, output)
