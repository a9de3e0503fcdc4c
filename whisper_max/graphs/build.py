"""The module that one compile turns into one artifact: every graph, for every model size."""

from __future__ import annotations

import platform

from max.dtype import DType
from max.graph import DeviceRef, Graph, KernelLibrary, Module

from .cross_kv import cross_kv
from .decoder_step import decoder_select, decoder_step
from .encoder import encoder
from .layers import KERNELS
from .pack import pack
from .specification import Storage


def build(
    *, device: str, cpu_level: str, weight: str, cross: str, product: str, attention: str
) -> Graph:
    """All graphs in one module; returns the last, which stands for the module.

    device : "cpu"
    cpu_level : "baseline", "avx512" or "amx" (see runtime/hardware.py); decides the vector width
        and whether matrix tiles are used
    weight, cross, product, attention : names of dtypes, see `Storage`

    Raises ValueError for a device that there are no kernels for.
    """
    if device != "cpu":
        raise ValueError(f"there are graphs for the CPU only, not for {device!r}")
    storage = Storage(
        DType[weight],
        DType[cross],
        vector_width(cpu_level),
        DType[product],
        DType[attention],
        tiles=cpu_level == "amx",
    )
    # The kernels are compiled once for all graphs.
    library = KernelLibrary()
    library.load_paths([KERNELS])
    module = Module()
    for graph in (pack, encoder, cross_kv, decoder_step, decoder_select):
        last = graph(module, library, storage, DeviceRef.CPU())
    return last


def vector_width(cpu_level: str) -> int:
    """Float32 lanes of the vectors at a CPU level."""
    if cpu_level != "baseline":
        return 16
    return 4 if platform.machine() in ("aarch64", "arm64") else 8
