"""The layers of Whisper in MAX operations: mirrors the modules in openai-whisper's model.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from max.dtype import DType
from max.graph import BufferValue, TensorType, TensorValue, ops

from ..specification import HEAD_DIM

KERNELS = Path(__file__).resolve().parents[2] / "gpu_kernels"
NORM_EPSILON = 1e-5  # of torch.nn.LayerNorm


class Layers:
    """The weights of a graph, applied under upstream's names.

    weights : by the names in the model's state_dict
    few_rows : whether linear layers get rows of single tokens, as in a step
    """

    def __init__(self, weights: Mapping[str, TensorValue], *, few_rows: bool = False) -> None:
        self.weights = weights
        self.few_rows = few_rows

    def layer_norm(self, x: TensorValue, name: str) -> TensorValue:
        """In float32, as upstream's, whatever x is."""
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return ops.layer_norm(x.cast(DType.float32), weight, bias, NORM_EPSILON).cast(x.dtype)

    def linear(
        self,
        x: TensorValue,
        name: str,
        *,
        activated: bool = False,
        added: TensorValue | None = None,
    ) -> TensorValue:
        """x, shape = (..., in) -> (..., out); then GELU, if `activated`, and a sum, if `added`."""
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        if self.few_rows:
            return _few_rows(x, weight, bias, activated, added)
        y = self.project(x, weight, bias)
        if activated:
            y = gelu(y)
        return y if added is None else added + y

    def project(
        self, x: TensorValue, weight: TensorValue, bias: TensorValue | None = None
    ) -> TensorValue:
        """x @ weight.T + bias; weight, shape = (out, in)."""
        if self.few_rows:
            return _few_rows(x, weight, bias, False, None)
        # One product of two matrices: of more dimensions it would be a batch of small ones.
        y = product(x.reshape((-1, x.shape[-1])), weight.T)
        if bias is not None:
            y = y + bias
        return y.reshape((*x.shape[:-1], weight.shape[0]))

    def conv1d(self, x: TensorValue, name: str, stride: int) -> TensorValue:
        """Kernel 3, padding 1: x, shape = (batch, frames, in) -> (batch, frames / stride, out).

        Unlike upstream's, channels come last; and it is one product with the three neighbours of
        each frame side by side.
        """
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        batch, frames, channels = x.shape
        zero = ops.constant(0, x.dtype, device=x.device)
        edge = ops.broadcast_to(zero, (batch, 1, channels))
        if stride == 1:
            taps = [ops.concat([edge, x[:, :-1]], axis=1), x, ops.concat([x[:, 1:], edge], axis=1)]
        else:
            # Frames 2i and 2i + 1 in one row; before them comes the odd one of the row above.
            pairs = x.reshape((batch, frames // 2, 2 * channels))
            odd = pairs[:, :, int(channels) :]
            taps = [ops.concat([edge, odd[:, :-1]], axis=1), pairs]
        neighbours = ops.concat(taps, axis=2)  # (batch, frames / stride, 3 * in)
        matrix = weight.permute([0, 2, 1]).reshape((weight.shape[0], -1))  # (out, 3 * in)
        return self.project(neighbours, matrix, bias)

    def mlp(self, x: TensorValue, name: str, added: TensorValue) -> TensorValue:
        """Two linear layers, four times as wide between them."""
        return self.linear(self.linear(x, f"{name}.0", activated=True), f"{name}.2", added=added)


def product(a: TensorValue, b: TensorValue) -> TensorValue:
    """a @ b, in the precision of their dtype.

    A GPU's products of float32 numbers round both to TF32, to 11 bits. As sums of two, of which
    the first is rounded to bfloat16, 19 are left: of what is left out, rest by rest is the largest.
    """
    if a.dtype != DType.float32:
        return a @ b
    (a, a_rest), (b, b_rest) = _split(a), _split(b)
    return a @ b + (a @ b_rest + a_rest @ b)


def _split(x: TensorValue) -> tuple[TensorValue, TensorValue]:
    """A part that TF32 holds exactly, and the rest."""
    rounded = x.cast(DType.bfloat16).cast(x.dtype)
    return rounded, x - rounded


def _few_rows(
    x: TensorValue,
    weight: TensorValue,
    bias: TensorValue | None,
    activated: bool,
    added: TensorValue | None,
) -> TensorValue:
    """A linear layer, and what comes after it, of few rows: gpu_kernels/few_rows.mojo."""
    rows = x.reshape((-1, x.shape[-1]))
    shape = (rows.shape[0], weight.shape[0])
    none = ops.broadcast_to(ops.constant(0, x.dtype, device=x.device), (1,))
    y = ops.custom(
        "whisper_few_rows",
        x.device,
        [
            rows,
            weight,
            none if bias is None else bias,
            rows if added is None else added.reshape(shape),
        ],
        [TensorType(x.dtype, shape, x.device)],
        parameters={
            "biased": bias is not None,
            "gelu": activated,
            "adding": added is not None,
        },
    )[0].tensor
    return y.reshape((*x.shape[:-1], weight.shape[0]))


def gelu(x: TensorValue) -> TensorValue:
    """The exact one, computed in float32 as PyTorch does."""
    return ops.gelu(x.cast(DType.float32)).cast(x.dtype)


def split_heads(x: TensorValue) -> TensorValue:
    """x, shape = (batch, length, n_state) -> (batch, length, heads, 64)."""
    batch, length, n_state = x.shape
    return x.reshape((batch, length, int(n_state) // HEAD_DIM, HEAD_DIM))


def merge_heads(x: TensorValue) -> TensorValue:
    """x, shape = (batch, length, heads, 64) -> (batch, length, n_state)."""
    batch, length, heads, _ = x.shape
    return x.reshape((batch, length, int(heads) * HEAD_DIM))


def heads_first(x: TensorValue) -> TensorValue:
    """x, shape = (batch, length, heads, 64) -> (batch, heads, length, 64)."""
    return x.permute([0, 2, 1, 3])


def append(
    keys: BufferValue,
    values: BufferValue,
    new_keys: TensorValue,
    new_values: TensorValue,
    positions: TensorValue,
    parents: TensorValue,
) -> tuple[TensorValue, TensorValue]:
    """Puts new tokens into the caches behind what each row's parent holds: gpu_kernels/cache.mojo.

    new_keys and new_values, shape = (rows, tokens, heads, 64)

    Returns the whole caches, shape = (rows, heads, n_text_ctx, 64). MAX 26.7 reads them where they
    are.
    """
    operands = [keys, values, new_keys, new_values, positions, parents]
    ops.inplace_custom("whisper_append", positions.device, operands)
    shape = (new_keys.shape[0], *keys.shape[2:])
    return tuple(ops.buffer_load(cache).reshape(shape) for cache in (keys, values))


def attention(
    q: TensorValue,
    k: TensorValue,
    v: TensorValue,
    last_seen: TensorValue | None = None,
    *,
    heads_first: bool = False,
) -> TensorValue:
    """Softmax of scaled scores, times values: gpu_kernels/attention.mojo.

    q, shape = (batch, queries, heads, 64)
    k and v, shape = (batch, heads, keys, 64) if `heads_first`, else (batch, keys, heads, 64)
    last_seen, shape = (queries,), int32
        the last key that each query sees, in ascending order; without it they see all

    Returns the values, shape as q.
    """
    operands, name = [q, k, v], "whisper_attention"
    if last_seen is not None:
        operands, name = [*operands, last_seen], "whisper_causal_attention"
    parameters = {"heads_first": heads_first}
    return ops.custom(name, q.device, operands, [q.type], parameters=parameters)[0].tensor


def attention_with_scores(
    q: TensorValue, k: TensorValue, v: TensorValue
) -> tuple[TensorValue, TensorValue]:
    """Attention by a matrix of scores: openai-whisper's own, with `use_sdpa` off.

    q, shape = (batch, queries, heads, 64)
    k and v, shape = (batch, heads, keys, 64)

    Returns the values, shape as q, and the raw scores in float32, (batch, heads, queries, keys).
    """
    keys = _scaled(k).permute([0, 1, 3, 2])
    scores = product(_scaled(heads_first(q)), keys).cast(DType.float32)
    values = product(ops.softmax(scores).cast(q.dtype), v)
    return values.permute([0, 2, 1, 3]), scores


def _scaled(x: TensorValue) -> TensorValue:
    """Queries and keys before their product: in half precision the scores might overflow."""
    return x * ops.constant(HEAD_DIM**-0.25, x.dtype, device=x.device)
