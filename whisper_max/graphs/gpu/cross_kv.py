"""Keys and values of cross attention, once per window: shared by all beams and all steps."""

from __future__ import annotations

from max.graph import BufferType, Graph, Module, TensorType, ops

from ..specification import HEAD_DIM
from .layers import Layers, heads_first, split_heads
from .specification import Target


def cross_types(target: Target) -> list[TensorType]:
    """Keys and values of layer 0, of layer 1, …: (windows, heads, n_audio_ctx, 64) each.

    On their own for each layer: a slice of one large tensor would be copied before it is
    multiplied.
    """
    sizes = target.sizes
    shape = ("windows", sizes.n_text_head, sizes.n_audio_ctx, HEAD_DIM)
    return [target.tensor(*shape)] * (2 * sizes.n_text_layer)


def cross_kv(module: Module, target: Target) -> Graph:
    """Fills keys and values in place from features, shape = (windows, n_audio_ctx, n_state).

    Operands: those of `cross_types`, as buffers, so that a captured step finds them where they
    were for the window before; features; the weights.
    """
    sizes, weights = target.sizes, target.cross_kv_weights()
    caches = [BufferType(t.dtype, t.shape, t.device) for t in cross_types(target)]
    features_type = target.tensor("windows", sizes.n_audio_ctx, sizes.n_text_state)
    graph = Graph(
        "cross_kv", input_types=[*caches, features_type, *weights.values()], module=module
    )
    with graph:
        buffers = [value.buffer for value in graph.inputs[: len(caches)]]
        features, *values = (value.tensor for value in graph.inputs[len(caches) :])
        layer = Layers(dict(zip(weights, values)))
        for number in range(sizes.n_text_layer):
            name = f"decoder.blocks.{number}.cross_attn"
            for buffer, part in zip(buffers[2 * number :], ("key", "value")):
                new = split_heads(layer.linear(features, f"{name}.{part}"))
                ops.buffer_store(buffer, heads_first(new))
        graph.output()
    return graph
