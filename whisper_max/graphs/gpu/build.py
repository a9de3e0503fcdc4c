"""The module that one compile turns into one artifact: graphs for a model's sizes on a GPU."""

from __future__ import annotations

from max.dtype import DType
from max.graph import DeviceRef, Graph, KernelLibrary, Module

from .cross_kv import cross_kv
from .decoder import decoder_alignment, decoder_prefill, decoder_step
from .encoder import encoder
from .layers import KERNELS
from .specification import AudioSizes, Target, TextSizes

ENCODER = ("encoder",)
DECODER = ("cross_kv", "prefill", "greedy_step", "step", "alignment")
DTYPES = ("float16", "bfloat16", "float32")


def build(
    *, device: str, cpu_level: str, dtype: str, graphs: str, ranked: int = 1, **sizes: int
) -> Graph:
    """Some graphs in one module; returns the last, which stands for the module.

    device : "cuda:" and the architecture; or "cpu", to check the arithmetic
    cpu_level : of no consequence here
    dtype : one of DTYPES
    graphs : of ENCODER or of DECODER, with commas between
    ranked : how many tokens of each row "step" ranks: one more than there are beams
    sizes : the fields of `AudioSizes`, for the encoder, or of `TextSizes`

    Raises ValueError for a dtype or a graph that there is not, and for graphs of both.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; there are {', '.join(DTYPES)}")
    names = graphs.split(",")
    known = ENCODER if names[0] in ENCODER else DECODER
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no graph {unknown[0]!r} beside {', '.join(known)}")
    target = Target(
        (AudioSizes if known is ENCODER else TextSizes)(**sizes),
        DType[dtype],
        DeviceRef.CPU() if device == "cpu" else DeviceRef.GPU(0),
    )
    module, library = Module(), KernelLibrary()
    library.load_paths([KERNELS])
    given = (module, library, target)
    builders = {
        "encoder": lambda: encoder(*given),
        "cross_kv": lambda: cross_kv(module, target),
        "prefill": lambda: decoder_prefill(*given),
        "greedy_step": lambda: decoder_step(*given, "decoder_greedy_step", 1),
        "step": lambda: decoder_step(*given, "decoder_step", ranked),
        "alignment": lambda: decoder_alignment(*given),
    }
    for name in names:
        last = builders[name]()
    return last
