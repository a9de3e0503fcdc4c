"""Packing a matrix of weights, once per model."""

from __future__ import annotations

from max.dtype import DType
from max.graph import BufferType, DeviceRef, Graph, KernelLibrary, Module, TensorType, ops

from .specification import Storage, threads_type


def pack(
    module: Module,
    library: KernelLibrary,
    storage: Storage,
    device: DeviceRef,
    *,
    name: str = "pack",
) -> Graph:
    """Fills packed weights in place, shape = (layers, panels, in, 32), from matrices elsewhere.

    Operands: the packed weights; their scales, shape = (layers, out), filled where the weights are
    int8; the addresses of the matrices, shape = (layers, parts), int64, each of float32 numbers,
    shape = (rows, in); rows, shape = (1,), int32; threads. The parts of a layer stand below one
    another; where there are several, rows is a multiple of 32.

    Returns shape = (panels,), int32: 1 where float16 does not hold every number of a panel.
    """
    graph = Graph(
        name,
        input_types=[
            BufferType(storage.weight, ("layers", "panels", "in", "lanes"), device),
            BufferType(DType.float32, ("layers", "scales"), device),
            TensorType(DType.int64, ("layers", "parts"), device),
            TensorType(DType.int32, ("one",), device),
            threads_type(device),
        ],
        kernel_library=library,
        module=module,
    )
    with graph:
        packed, scales, *others = graph.inputs
        [inexact] = ops.inplace_custom(
            "whisper_pack",
            device,
            [packed.buffer, scales.buffer, *(other.tensor for other in others)],
            [TensorType(DType.int32, ("panels",), device)],
        )
        graph.output(inexact.tensor)
    return graph
