"""The text decoder: mirrors `TextDecoder.forward` in openai-whisper's model.py.

Three graphs over the same blocks: the prompt fills the cache (prefill), one token follows another
(step), and a whole text is read at once for its attention (alignment). A step touches the same
memory each time and asks the host nothing, so that it can be captured and replayed: where it
stands, whom it continues and what may follow are operands on the device, and the cache has its
full length, with a mask.
"""

from __future__ import annotations

from collections.abc import Sequence

from max.dtype import DType
from max.graph import BufferType, Graph, KernelLibrary, Module, TensorType, TensorValue, ops

from ..specification import HEAD_DIM
from .cross_kv import cross_types
from .layers import (
    Layers, append, attention, attention_with_scores, merge_heads, split_heads
)
from .selection import select
from .specification import Target

ROWS = ("windows", "beams")


def cache_types(target: Target) -> list[BufferType]:
    """Keys and values of each layer: (windows, beams, heads, n_text_ctx, 64) each."""
    sizes = target.sizes
    shape = (*ROWS, sizes.n_text_head, sizes.n_text_ctx, HEAD_DIM)
    return [BufferType(target.dtype, shape, target.device)] * (2 * sizes.n_text_layer)


def decoder_prefill(module: Module, library: KernelLibrary, target: Target) -> Graph:
    """Runs new tokens through the decoder and appends them to the cache.

    Operands:
    tokens, shape = (windows, beams, tokens), int32
    positions, shape = (tokens,), int32
        consecutive, the first one behind what is in the cache
    parents, shape = (windows, beams), int32
        flat number of the row that each row continues, see gpu_kernels/cache.mojo
    wanted, shape = (any,), int32
        flat numbers of the tokens whose logits are computed
    the buffers of `cache_types`; the tensors of `cross_types`; the weights.

    Returns logits, shape = (wanted, n_vocab), float32.
    """
    types = [
        target.tensor(*ROWS, "tokens", dtype=DType.int32),
        target.tensor("tokens", dtype=DType.int32),
        target.tensor(*ROWS, dtype=DType.int32),
        target.tensor("wanted", dtype=DType.int32),
    ]
    operands = _Operands("decoder_prefill", module, library, target, types, cached=True)
    with operands.graph as graph:
        tokens, positions, parents, wanted = operands.tensors
        decoder = Decoder(operands, tokens, positions, parents)
        graph.output(decoder.logits(ops.gather(decoder.forward(), wanted, axis=0)))
    return graph


def decoder_step(
    module: Module, library: KernelLibrary, target: Target, name: str, ranked: int
) -> Graph:
    """One token of each row, and the choice of what may follow.

    ranked : how many tokens of each row it returns

    Operands: tokens, positions and parents of `decoder_prefill`, for one token; mask and rules of
    `select`, rules with one row for each of tokens; caches and weights as there.

    Returns log probabilities, float32, and tokens, int32, both (windows * beams, ranked).
    """
    types = [
        target.tensor(*ROWS, 1, dtype=DType.int32),
        target.tensor(1, dtype=DType.int32),
        target.tensor(*ROWS, dtype=DType.int32),
        target.tensor(target.sizes.n_vocab, dtype=DType.float32),
        target.tensor(*ROWS, 5, dtype=DType.int32),
    ]
    operands = _Operands(name, module, library, target, types, cached=True)
    with operands.graph as graph:
        tokens, positions, parents, mask, rules = operands.tensors
        # Their kernel is for half precision; on a CPU, where graphs are only tried, for any.
        few_rows = target.dtype != DType.float32 or target.device.is_cpu()
        decoder = Decoder(operands, tokens, positions, parents, few_rows=few_rows)
        logits = decoder.logits(decoder.forward())
        graph.output(*select(logits, mask, rules.reshape((logits.shape[0], 5)), ranked))
    return graph


def decoder_alignment(module: Module, library: KernelLibrary, target: Target) -> Graph:
    """A whole text from its beginning, and what chosen heads of cross attention look at.

    Operands: tokens and positions of `decoder_prefill`;
    heads, shape = (n_text_layer, slots), int32
        for each place in the result the head of a layer that goes there, or -1
    the tensors of `cross_types`; the weights.

    Returns logits, shape = (windows * beams * tokens, n_vocab), float32, and raw scores, shape =
    (windows, slots, beams * tokens, n_audio_ctx), float32.
    """
    types = [
        target.tensor(*ROWS, "tokens", dtype=DType.int32),
        target.tensor("tokens", dtype=DType.int32),
        target.tensor(target.sizes.n_text_layer, "slots", dtype=DType.int32),
    ]
    operands = _Operands("decoder_alignment", module, library, target, types, cached=False)
    with operands.graph as graph:
        tokens, positions, heads = operands.tensors
        decoder = Decoder(operands, tokens, positions, None)
        x, scores = decoder.forward_with_scores(heads)
        graph.output(decoder.logits(x), scores)
    return graph


class _Operands:
    """A graph and its inputs: some tensors, the caches, the weights."""

    def __init__(
        self,
        name: str,
        module: Module,
        library: KernelLibrary,
        target: Target,
        types: Sequence[TensorType],
        *,
        cached: bool,
    ) -> None:
        self.target = target
        weights = target.decoder_weights()
        cache, cross = cache_types(target) if cached else [], cross_types(target)
        self.graph = Graph(
            name,
            input_types=[*types, *cache, *cross, *weights.values()],
            kernel_library=library,
            module=module,
        )
        inputs = iter(self.graph.inputs)
        self.tensors = [next(inputs).tensor for _ in types]
        self.cache = [next(inputs).buffer for _ in cache]
        self.cross = [next(inputs).tensor for _ in cross]
        self.weights = {name: next(inputs).tensor for name in weights}


class Decoder:
    """`TextDecoder` over new tokens, with a cache if there are `parents`."""

    def __init__(
        self,
        operands: _Operands,
        tokens: TensorValue,
        positions: TensorValue,
        parents: TensorValue | None,
        *,
        few_rows: bool = False,
    ) -> None:
        self.sizes, self.dtype = operands.target.sizes, operands.target.dtype
        self.layer = Layers(operands.weights, few_rows=few_rows)
        self.cache, self.cross = operands.cache, operands.cross
        self.windows, self.beams, self.count = tokens.shape
        self.rows = self.windows * self.beams
        self.tokens = tokens.reshape((self.rows, self.count))
        self.positions, self.parents = positions, parents

    def forward(self) -> TensorValue:
        """Of the new tokens, shape = (rows * tokens, n_state), after the last norm."""
        x = self._embed()
        for number in range(self.sizes.n_text_layer):
            x, _ = self._block(x, number, with_scores=False)
        return self._finish(x)

    def forward_with_scores(self, heads: TensorValue) -> tuple[TensorValue, TensorValue]:
        """`forward`, and raw scores of chosen heads: see `decoder_alignment`."""
        device = heads.device
        zero = ops.constant(0, DType.int32, device=device)
        chosen = None
        x = self._embed()
        for number in range(self.sizes.n_text_layer):
            x, scores = self._block(x, number, with_scores=True)
            head = heads[number]  # (slots,)
            found = ops.gather(scores, ops.max(head, zero), axis=1)
            if chosen is None:
                chosen = found
            here = (head >= zero).reshape((1, -1, 1, 1))
            chosen = ops.where(here, found, chosen)
        return self._finish(x), chosen

    def logits(self, x: TensorValue) -> TensorValue:
        """x, shape = (rows, n_state) -> (rows, n_vocab), float32."""
        embedding = self.layer.weights["decoder.token_embedding.weight"]
        return self.layer.project(x, embedding).cast(DType.float32)

    def _embed(self) -> TensorValue:
        weights = self.layer.weights
        x = ops.gather(weights["decoder.token_embedding.weight"], self.tokens, axis=0)
        places = ops.gather(weights["decoder.positional_embedding"], self.positions, axis=0)
        return (x.cast(DType.float32) + places).cast(self.dtype)  # (rows, tokens, n_state)

    def _finish(self, x: TensorValue) -> TensorValue:
        return self.layer.layer_norm(x, "decoder.ln").reshape((-1, self.sizes.n_text_state))

    def _block(
        self, x: TensorValue, number: int, *, with_scores: bool
    ) -> tuple[TensorValue, TensorValue | None]:
        """`ResidualAttentionBlock`; also the raw scores of its cross attention."""
        layer, name = self.layer, f"decoder.blocks.{number}"
        x = self._self_attention(x, number)
        x, scores = self._cross_attention(x, number, with_scores=with_scores)
        return layer.mlp(layer.layer_norm(x, f"{name}.mlp_ln"), f"{name}.mlp", x), scores

    def _self_attention(self, x: TensorValue, number: int) -> TensorValue:
        name = f"decoder.blocks.{number}.attn"
        normed = self.layer.layer_norm(x, f"{name}_ln")
        q, k, v = (
            split_heads(self.layer.linear(normed, f"{name}.{part}"))
            for part in ("query", "key", "value")
        )
        if self.cache:
            caches = self.cache[2 * number : 2 * number + 2]
            k, v = append(*caches, k, v, self.positions, self.parents)
        values = attention(q, k, v, self.positions, heads_first=bool(self.cache))
        return self.layer.linear(merge_heads(values), f"{name}.out", added=x)

    def _cross_attention(
        self, x: TensorValue, number: int, *, with_scores: bool
    ) -> tuple[TensorValue, TensorValue | None]:
        """The queries of a window's beams side by side: its keys and values are read once."""
        name = f"decoder.blocks.{number}.cross_attn"
        state = self.sizes.n_text_state
        queries = self.layer.linear(self.layer.layer_norm(x, f"{name}_ln"), f"{name}.query")
        together = split_heads(queries.reshape((self.windows, self.beams * self.count, state)))
        keys, values = self.cross[2 * number : 2 * number + 2]
        if with_scores:
            values, scores = attention_with_scores(together, keys, values)
        else:
            values, scores = attention(together, keys, values, heads_first=True), None
        apart = merge_heads(values).reshape((self.rows, self.count, state))
        return self.layer.linear(apart, f"{name}.out", added=x), scores
