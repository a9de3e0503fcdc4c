"""One artifact, loaded: its graphs as functions of tensors."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from math import sqrt

import numpy as np
import torch
from max.driver import CPU, Buffer
from max.engine import CompiledModel, InferenceSession, Model
from torch import Tensor

from .. import on_one_thread, report
from ..conditions import UnsupportedByMax
from ..graphs.specification import HEAD_DIM, MASKED, PANEL
from ..rule import Rule
from . import limits, memory
from .load_max import without_signal_handler
from .tensors import Tables, int32, to_buffer, to_torch
from .timer_slack import inherited_timer_slack


class Engine:
    """The graphs of one artifact, without weights: one serves all models of a process."""

    def __init__(self, compiled: CompiledModel) -> None:
        with without_signal_handler():
            session = InferenceSession(devices=[CPU()])
        self.graphs = session.init_all(compiled, weights_registry={})
        self._calls = {name: _call_of(graph) for name, graph in self.graphs.items()}
        self._most_threads = limits.threads()
        self._threads: dict[int, Buffer] = {}
        self.no_residuals = Buffer.from_numpy(np.zeros((0, 0, 0), np.float32))
        self._has_run = False

    @property
    def threads(self) -> Buffer:
        """How many threads a graph may use now, shape = (1,), int32: never more than PyTorch may.

        So whoever runs a worker for each CPU, with `torch.set_num_threads(1)` in each, goes on to.
        """
        count = min(self._most_threads, on_one_thread.pytorch_threads())
        buffer = self._threads.get(count)
        if buffer is None:
            buffer = self._threads[count] = int32([count])
        return buffer

    def execute(self, graph: str, *operands: Buffer) -> list[Buffer]:
        """Runs one graph. Raises UnsupportedByMax where MAX fails: PyTorch can take over."""
        try:
            if self._has_run:
                return self._calls[graph](operands)
            with inherited_timer_slack():
                results = self._calls[graph](operands)
            self._has_run = True
            return results
        except (RuntimeError, ValueError, MemoryError) as error:
            raise report.as_unsupported(graph, error) from error

    def pack(self, packed: Tensor, scales: Tensor, matrices: Sequence[Sequence[Tensor]]) -> bool:
        """Writes each layer's matrices, one below the other, into packed weights.

        packed : shape = (layers, panels, in, 32)
        scales : shape = (layers, out), float32, filled where the weights are int8
        matrices : for each layer as many, each of shape = (rows, in), float32 and contiguous;
            of several, rows is a multiple of 32

        Returns whether the packed weights hold what the matrices do, or are int8.
        """
        addresses = [[matrix.data_ptr() for matrix in layer] for layer in matrices]
        sources = Buffer.from_numpy(np.array(addresses, np.int64))
        rows = int32([len(matrices[0][0])])
        operands = to_buffer(packed), to_buffer(scales), sources, rows, self.threads
        return not self.execute("pack", *operands)[0].to_numpy().any()

    def encode(self, weights: list[Buffer], mel: Tensor) -> Tensor:
        """mel, shape = (batch, n_mels, 2 * n_audio_ctx), -> (batch, n_audio_ctx, n_state)."""
        return to_torch(self.execute("encoder", to_buffer(mel), self.threads, *weights)[0])


def _call_of(graph: Model) -> Callable[[Sequence[Buffer]], list[Buffer]]:
    """A graph as a function of its operands, contiguous buffers all of them.

    `execute` looks at each of some forty once more in Python: 40 microseconds of a step.
    """
    call = getattr(graph, "_execute_device_tensors", None)
    return call if call is not None else lambda operands: graph.execute(*operands)


class TensorPool:
    """The memory of a `CrossCache` that no decode uses any more, for the next window's.

    New memory is mapped and cleared by the system page by page, which for huge pages may mean
    moving others out of the way: up to half of the time that filling it takes.
    """

    def __init__(self) -> None:
        # Its operations are atomic: a lock could be held when the garbage collector gives back.
        self._kept: deque[tuple[Tensor, ...]] = deque(maxlen=1)

    def take(self, *kinds: tuple[tuple[int, ...], torch.dtype]) -> tuple[Tensor, ...]:
        """Tensors of these shapes and dtypes, uninitialized; the spare ones, if they are such."""
        try:
            kept = self._kept.pop()
        except IndexError:
            kept = ()
        if tuple((tensor.shape, tensor.dtype) for tensor in kept) != kinds:
            kept = tuple(memory.empty(shape, dtype) for shape, dtype in kinds)
        return kept

    def give(self, tensors: tuple[Tensor, ...]) -> None:
        """Nobody uses these any more."""
        self._kept.append(tensors)


class CrossCache:
    """Cross-attention keys and values of some windows, for all layers.

    features : shape = (windows, n_audio_ctx, n_state), float32
    pool : where the memory comes from and, of a single window, goes back to

    `copied` is what was read of a single window, in memory that nobody changes while this lives;
    `max_norm` is the largest norm of a vector, not finite where one of the numbers is not.
    """

    def __init__(
        self,
        engine: Engine,
        weights: list[Buffer],
        features: Tensor,
        layers: int,
        dtype: torch.dtype,
        pool: TensorPool,
    ) -> None:
        self.windows, self.frames, n_state = features.shape
        self.padded_frames = -(-self.frames // PANEL) * PANEL
        heads = n_state // HEAD_DIM
        is_single = self.windows == 1
        cache = (layers, self.windows, heads, self.padded_frames * HEAD_DIM), dtype
        copy = (int(is_single), self.frames, n_state), torch.float32
        tensors = pool.take(cache, cache, copy)
        self.copied = tensors[2]
        self.keys, self.values, copied = map(to_buffer, tensors)
        if is_single:
            # When the last decode and the memo have let go of this; the pool goes with its model.
            weakref.finalize(self, _give_back, weakref.ref(pool), tensors).atexit = False
        squares = np.empty((self.windows, self.frames), np.float32)
        filled = self.keys, self.values, copied, Buffer.from_numpy(squares)
        engine.execute("cross_kv", *filled, to_buffer(features), engine.threads, *weights)
        self.max_norm = sqrt(squares.max())


def _give_back(pool: weakref.ref[TensorPool], tensors: tuple[Tensor, ...]) -> None:
    kept = pool()
    if kept is not None:
        kept.give(tensors)


class DecoderState:
    """What one decode remembers: its self-attention cache, and who shares which part of it.

    A row is one sequence. The cache is append-only: when beam search continues one row as
    several, only `source` changes, the table of which cache row holds each earlier position.

    cross : the windows that are decoded; rows are grouped by window
    rows : how many sequences there is room for
    """

    def __init__(
        self, cross: CrossCache, layers: int, heads: int, n_text_ctx: int, rows: int
    ) -> None:
        self.cross = cross
        self.rows = rows
        self._identity = list(range(rows))
        self.n_text_ctx = n_text_ctx
        self.length = 0
        # Memory is touched, and so taken, only as positions are filled.
        shape = (layers, 2, rows, heads, n_text_ctx, HEAD_DIM)
        self.self_cache = to_buffer(torch.empty(shape, dtype=torch.float32, device="cpu"))
        # A position's keys and values stand in the row that appends it, until rows are reordered.
        self.source = np.repeat(np.arange(rows, dtype=np.int32)[:, None], n_text_ctx, axis=1)
        # MAX sees what is written to it: making a buffer takes longer than a step's Python may.
        self._source_buffer = Buffer.from_numpy(self.source)
        self._position = Tables((np.int32, (2,)))

    def take(self, rows: int, count: int) -> tuple[Buffer, Buffer]:
        """Makes room for `count` tokens of each row; the operands `position` and `source`.

        Raises UnsupportedByMax where they do not fit: the kernels would write past the cache.
        """
        end = self.length + count
        if rows > self.rows or end > self.n_text_ctx:
            raise UnsupportedByMax(
                f"{rows} rows of {end} tokens, where {self.rows} of {self.n_text_ctx} fit"
            )
        self._position.write(self.length, self.cross.frames)
        (position,) = self._position.buffers
        if rows == self.rows:
            return position, self._source_buffer
        return position, Buffer.from_numpy(self.source[:rows])

    def reorder(self, parents: list[int]) -> None:
        """Row i goes on as a copy of what row parents[i] was."""
        if parents != self._identity:
            self.source[:, : self.length] = self.source[parents, : self.length]


Ranked = tuple[Sequence[float], Sequence[int]]
"""What may follow: log probabilities, in float32, and tokens. As many of each row, row after row,
the most likely first."""


class Selection:
    """The choice of tokens: what does not change from step to step, and room for what does.

    suppressed : tokens that are never sampled
    n_vocab : size of the vocabulary
    count : how many tokens of each row are ranked
    rows : rows of a step
    """

    def __init__(self, suppressed: Sequence[int], n_vocab: int, count: int, rows: int) -> None:
        self.rows = rows
        self.every_row = int32(list(range(rows)))
        self._given = Tables((np.int32, (rows, 1)), (np.int32, (rows, len(Rule._fields))))
        self._chosen = Tables((np.float32, (rows, count)), (np.int32, (rows, count)))
        self.tokens, rules = self._given.buffers
        mask = Buffer.from_numpy(suppression(suppressed, n_vocab))
        self.choice = mask, rules, *self._chosen.buffers
        self.operands: tuple[Buffer, ...] | None = None  # of the step, once it has been made

    def at(self, tokens: list[int], rules: Sequence[Rule]) -> None:
        """The step's tokens, one of each row, and the rules for what may follow them."""
        self._given.write(*tokens, *chain.from_iterable(rules))

    def chosen(self) -> Ranked:
        """What the step has found."""
        numbers = self._chosen.read()
        half = len(numbers) // 2
        return numbers[:half], numbers[half:]


def suppression(suppressed: Sequence[int], n_vocab: int) -> np.ndarray:
    """What is added to the logits, shape = (n_vocab,), float32: some tokens are never sampled."""
    mask = np.zeros(n_vocab, np.float32)
    mask[list(suppressed)] = MASKED
    return mask


class Scores:
    """Which cross-attention heads' raw scores a step returns.

    slots : (layers, heads); the place in the result, or -1
    """

    def __init__(self, slots: list[list[int]]) -> None:
        self.slots = int32(slots)
        self.count = 1 + max(max(row) for row in slots)

    def buffer(self, positions: int, padded_frames: int) -> Buffer:
        """A tensor of the result's shape: graphs take sizes from their operands only."""
        if self.count == 0:
            return _no_room(positions, padded_frames)
        return _room(self.count, positions, padded_frames)

    @staticmethod
    @lru_cache(maxsize=8)
    def none(layers: int, heads: int) -> Scores:
        """No head's."""
        return Scores([[-1] * heads] * layers)


def _room(*shape: int) -> Buffer:
    return to_buffer(torch.empty(shape, dtype=torch.float32, device="cpu"))


@lru_cache(maxsize=64)  # every step of a loop that is not ours asks for it
def _no_room(positions: int, padded_frames: int) -> Buffer:
    return _room(0, positions, padded_frames)


def decoder_step(
    engine: Engine,
    weights: list[Buffer],
    state: DecoderState,
    tokens: Buffer,
    wanted: Buffer,
    scores: Scores,
    residuals: Buffer | None = None,
) -> tuple[Tensor, Buffer, Buffer]:
    """Decodes new tokens, shape = (rows, count), int32, at the end of the state.

    wanted : flat numbers (row * count + i) of the tokens whose logits are computed, int32
    residuals : of the shape (2 * layers + 1, rows * count, n_state), of which only that is read,
        for the residual stream before and after each cross attention and at the end

    Returns logits, shape = (wanted, n_vocab), float32; raw scores, shape = (slots, rows * count,
    padded frames); and the residuals: all in fresh memory. The state then ends behind the new
    tokens.
    """
    operands = _operands(engine, state, tokens, wanted, scores)
    if residuals is None:
        residuals = engine.no_residuals
    results = engine.execute("decoder_step", *operands, residuals, *weights)
    state.length += tokens.shape[1]
    logits, raw_scores, residuals = results
    return to_torch(logits).squeeze(1), raw_scores, residuals


def decoder_select(
    engine: Engine,
    weights: list[Buffer],
    state: DecoderState,
    scores: Scores,
    selection: Selection,
) -> Ranked:
    """Decodes one new token for each row and ranks what may follow, as `selection.at` says."""
    if selection.operands is None:
        operands = _operands(engine, state, selection.tokens, selection.every_row, scores)
        selection.operands = (*operands, *selection.choice, *weights)
    else:  # the same buffers, with other contents
        state.take(selection.rows, 1)
    engine.execute("decoder_select", *selection.operands)
    state.length += 1
    return selection.chosen()


def _operands(
    engine: Engine, state: DecoderState, tokens: Buffer, wanted: Buffer, scores: Scores
) -> tuple[Buffer, ...]:
    rows, count = tokens.shape
    position, source = state.take(rows, count)
    return (
        tokens,
        position,
        source,
        wanted,
        scores.slots,
        scores.buffer(rows * count, state.cross.padded_frames),
        state.self_cache,
        state.cross.keys,
        state.cross.values,
        engine.threads,
    )
