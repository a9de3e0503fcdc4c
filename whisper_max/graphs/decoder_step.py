"""The text decoder over its caches: mirrors `TextDecoder.forward` in openai-whisper's model.py.

One graph is prefill, single step, full sequence and alignment, depending on its operands; another
goes on to select the next tokens.
"""

from __future__ import annotations

from max.dtype import DType
from max.graph import BufferType, DeviceRef, Graph, KernelLibrary, Module, TensorType, TensorValue
from max.graph.shape import ShapeLike

from .cross_kv import CROSS_SHAPE
from .layers import Layers
from .specification import DECODER, HEAD_DIM, Storage, inputs, threads_type


def decoder_types(storage: Storage, device: DeviceRef) -> list[TensorType | BufferType]:
    """Types of the operands of one step, before the weights:

    tokens, shape = (rows, tokens), int32
    position, shape = (2,), int32
        the position of the first new token; the number of audio frames
    source, shape = (rows, n_text_ctx), int32
        in which row of the cache each earlier position of each row stands
    wanted, shape = (any,), int32
        flat numbers (row * tokens + token) whose logits are computed
    score_slots, shape = (layers, heads), int32
        where in the scores a cross-attention head goes, or -1
    score_shape, shape = (slots, rows * tokens, padded frames)
        only its shape is read
    self_cache, shape = (layers, 2, cache rows, heads, n_text_ctx, 64), appended in place
    cross keys and values, shape = (layers, windows, heads, padded frames * 64)
    threads, shape = (1,), int32
        how many may work at a time
    """
    int32 = DType.int32
    return [
        TensorType(int32, ("rows", "tokens"), device),
        TensorType(int32, ("two",), device),
        TensorType(int32, ("rows", "n_text_ctx"), device),
        TensorType(int32, ("wanted",), device),
        TensorType(int32, ("score_layers", "score_heads"), device),
        TensorType(DType.float32, ("slots", "score_rows", "padded_frames"), device),
        BufferType(
            DType.float32,
            ("self_layers", "key_value", "cache_rows", "self_heads", "n_text_ctx", HEAD_DIM),
            device,
        ),
        TensorType(storage.cross, CROSS_SHAPE, device),
        TensorType(storage.cross, CROSS_SHAPE, device),
        threads_type(device),
    ]


def decoder_step(
    module: Module, library: KernelLibrary, storage: Storage, device: DeviceRef
) -> Graph:
    """Runs new tokens through the decoder. Operands: those of `decoder_types`, then

    residuals_shape, shape = (2 * layers + 1 or 0, rows * tokens, n_state), float32
        only its shape is read

    and the weights. Returns logits, shape = (wanted, 1, n_vocab); scores, shape = (slots, rows *
    tokens, padded frames): cross-attention products before softmax; and residuals, of that shape: x
    before and after each cross attention and at the end.
    """
    weights = dict(inputs(DECODER, storage, device))
    types = [
        *decoder_types(storage, device),
        TensorType(DType.float32, ("residuals", "residual_rows", "n_state"), device),
    ]
    graph = Graph(
        "decoder_step",
        input_types=[*types, *weights.values()],
        kernel_library=library,
        module=module,
    )
    with graph:
        operands, tensors = graph.inputs[: len(types)], graph.inputs[len(types) :]
        named = dict(zip(weights, (value.tensor for value in tensors)))
        layer = Layers(named, operands[-2].tensor, storage, device)
        graph.output(*_decode(layer, operands[:-1], operands[-1].tensor.shape))
    return graph


def decoder_select(
    module: Module, library: KernelLibrary, storage: Storage, device: DeviceRef
) -> Graph:
    """One step and the choice of what may follow: the rules of decoding, log-softmax and top-k.

    Operands: those of `decoder_types`, then
    mask, shape = (n_vocab,), float32
    rules, shape = (rows, 5), int32
        see kernels/select.mojo for both
    logprobs, float32, and best, int32, both of shape (wanted, k)
        filled with the k most likely tokens of each row, and their log probabilities
    and the weights. Returns nothing: to wrap two results costs more than all else in Python.
    """
    weights = dict(inputs(DECODER, storage, device))
    types = [
        *decoder_types(storage, device),
        TensorType(DType.float32, ("vocabulary",), device),
        TensorType(DType.int32, ("rule_rows", "rule"), device),
        BufferType(DType.float32, ("wanted", "k"), device),
        BufferType(DType.int32, ("wanted", "k"), device),
    ]
    graph = Graph(
        "decoder_select",
        input_types=[*types, *weights.values()],
        kernel_library=library,
        module=module,
    )
    with graph:
        operands, tensors = graph.inputs[: len(types)], graph.inputs[len(types) :]
        threads, mask, rules, logprobs, best = operands[-5:]
        named = dict(zip(weights, (value.tensor for value in tensors)))
        layer = Layers(named, threads.tensor, storage, device)
        logits, *_ = _decode(layer, operands[:-5], (0, 0, 0))
        layer.select(logits, mask.tensor, rules.tensor, logprobs.buffer, best.buffer)
        graph.output()
    return graph


def _decode(
    layer: Layers, operands: list, residuals_shape: ShapeLike
) -> tuple[TensorValue, TensorValue, TensorValue]:
    tokens, position, source, wanted, slots = (value.tensor for value in operands[:5])
    score_shape = operands[5].tensor.shape
    self_cache, keys, values = operands[6].buffer, operands[7].tensor, operands[8].tensor

    x = layer.embed(tokens, position)  # (rows, tokens, n_state)
    return layer.decoder(
        x, wanted, self_cache, keys, values, source, position, slots, score_shape, residuals_shape
    )
