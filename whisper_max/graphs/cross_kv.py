"""Keys and values of cross attention, once per window: shared by all beams and all steps."""

from __future__ import annotations

from max.dtype import DType
from max.graph import BufferType, DeviceRef, Graph, KernelLibrary, Module, TensorType

from .layers import Layers
from .specification import CROSS_KV, Storage, inputs, threads_type


CROSS_SHAPE = ("layers", "windows", "heads", "packed")
"""Of the packed keys and of the packed values; packed = padded frames * 64."""


def cross_kv(
    module: Module, library: KernelLibrary, storage: Storage, device: DeviceRef
) -> Graph:
    """Fills keys and values in place from features, shape = (windows, n_audio_ctx, n_state).

    Operands:
    keys and values, shape = CROSS_SHAPE
    copies, of the features' shape and filled with what is read of them; or of no window
    squares, shape = (windows, n_audio_ctx), filled with the squared norm of each vector
    features, threads, and the weights.
    """
    cache_type = BufferType(storage.cross, CROSS_SHAPE, device)
    weights = dict(inputs(CROSS_KV, storage, device))
    features_type = TensorType(DType.float32, ("windows", "n_audio_ctx", "n_state"), device)
    graph = Graph(
        "cross_kv",
        input_types=[
            cache_type,
            cache_type,
            BufferType(DType.float32, ("copied", "n_audio_ctx", "n_state"), device),
            BufferType(DType.float32, ("windows", "n_audio_ctx"), device),
            features_type,
            threads_type(device),
            *weights.values(),
        ],
        kernel_library=library,
        module=module,
    )
    with graph:
        keys, values, copies, squares, features, threads, *tensors = graph.inputs
        named = dict(zip(weights, (value.tensor for value in tensors)))
        layer = Layers(named, threads.tensor, storage, device)
        filled = keys.buffer, values.buffer, copies.buffer, squares.buffer
        layer.cross_kv(features.tensor, filled)
        graph.output()
    return graph
