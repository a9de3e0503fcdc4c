"""The graphs of one artifact on one GPU, and the memory that decodes there work in."""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import torch
from max.driver import Buffer, Device
from max.dtype import DType
from max.engine import CompiledModel, InferenceSession
from torch import Tensor

from ... import report, tensor_numbers
from ...conditions import UnsupportedByMax
from ...graphs.gpu.specification import TextSizes
from ...graphs.specification import HEAD_DIM
from ..load_max import without_signal_handler
from ..tensors import to_buffer
from .devices import MaxDevice

logger = logging.getLogger("whisper_max")

RANKED = 6
"""Tokens of each row that a step with beams ranks: enough for five. A greedy step needs one."""

MOST_BEAMS = 8
"""As in gpu_kernels/cache.mojo."""

_MOST_FAILED_CAPTURES = 3
"""Of a step; another thread's work, or a moment's lack of memory, may be why one fails."""

_IDLE_WORKSPACES = 2
"""How many are kept for the next decode: one for a greedy decode and one for beams."""

_capture_keys = itertools.count()


class GpuEngine:
    """Loaded graphs, without weights.

    failed_captures : of each step, by name; after some it runs as it is
    abandoned : steps captured for workspaces that are gone, with their keys
    """

    def __init__(self, compiled: CompiledModel, max_device: MaxDevice) -> None:
        self.max_device = max_device
        with max_device.lock:
            with without_signal_handler():
                session = InferenceSession(devices=[max_device.device])
            self.graphs = session.init_all(compiled, weights_registry={})
        self.workspaces = WorkspacePool()
        self.failed_captures: Counter[str] = Counter()
        self.abandoned: deque[tuple[str, int]] = deque()

    def release_abandoned(self) -> None:
        """Frees what was captured for workspaces that are gone. Where no other thread captures."""
        with suppress(IndexError):
            while True:
                graph, key = self.abandoned.popleft()
                self.graphs[graph].release_captured_graph(key)

    def execute(self, graph: str, *operands: Buffer) -> list[Buffer]:
        """Runs one graph, in order with PyTorch's current stream.

        Raises as `failing` does.
        """
        with self.failing(graph), self.max_device.in_order():
            return self.graphs[graph].execute(*operands)

    @contextmanager
    def failing(self, what: str) -> Iterator[None]:
        """Raises UnsupportedByMax where MAX fails inside, as where memory runs out.

        PyTorch can take over, and gets what idle workspaces held.
        """
        try:
            yield
        except UnsupportedByMax:
            raise
        except (RuntimeError, ValueError, MemoryError) as error:
            self.workspaces.clear()
            raise report.as_unsupported(what, error) from error


class Weights(dict[str, list[Buffer]]):
    """One module's weights in the order of each graph's operands, by graph."""


class Workspace:
    """The memory of one decode, where a captured step finds it again.

    A step's operands stay in the same places: what changes is written into them. Beams are rows of
    a window, side by side. A workspace outlives decodes, and must not keep the weights of a model
    that is gone.
    """

    def __init__(
        self, engine: GpuEngine, sizes: TextSizes, dtype: DType, windows: int, beams: int
    ) -> None:
        self.shape = (windows, beams)
        self.rows = windows * beams
        self.generation = engine.workspaces.generation
        self._engine = engine
        self._held: tuple[weakref.ref[Weights], Tensor] | None = None
        self._captured: _Captured | None = None
        self._capture_key = next(_capture_keys)
        self._uncaptured: set[str] = set()  # steps of which that failed
        device = engine.max_device.device
        heads, layers = sizes.n_text_head, sizes.n_text_layer
        with engine.failing("making a decode's workspace"), engine.max_device.in_order():
            self.cache = [
                Buffer(dtype, (*self.shape, heads, sizes.n_text_ctx, HEAD_DIM), device)
                for _ in range(2 * layers)
            ]
            self.cross = [
                Buffer(dtype, (windows, heads, sizes.n_audio_ctx, HEAD_DIM), device)
                for _ in range(2 * layers)
            ]
            self._tokens = _Operand(np.int32, (*self.shape, 1), device)
            self._position = _Operand(np.int32, (1,), device)
            self._parents = _Operand(np.int32, self.shape, device)
            self._mask = _Operand(np.float32, (sizes.n_vocab,), device)
            self._rules = _Operand(np.int32, (*self.shape, 5), device)

    def __del__(self) -> None:
        # The garbage collector may be anywhere, in a thread that must not wait for another one.
        self._abandon()

    def is_for(self, weights: Weights, features: Tensor) -> bool:
        """Whether the keys and values of cross attention are those of these weights and features.

        features : shape = (windows, n_audio_ctx, n_state)
        """
        if self._held is None or self._held[0]() is not weights:
            return False
        return tensor_numbers.equal(self._held[1], features)

    def fill(self, weights: Weights, features: Tensor) -> None:
        """Makes the keys and values of cross attention, unless they are there."""
        if self.is_for(weights, features):
            return
        self._held = None
        operands = (*self.cross, to_buffer(features), *weights["cross_kv"])
        self._engine.execute("cross_kv", *operands)
        with self._engine.failing("keeping audio features"):
            self._held = weakref.ref(weights), features.clone()

    def suppress(self, mask: np.ndarray) -> None:
        """What is added to the logits of each token, shape = (n_vocab,), float32."""
        with self._engine.failing("writing a mask"), self._engine.max_device.lock:
            self._mask.write(mask)

    def step(
        self,
        tokens: Sequence[int],
        position: int,
        parents: Sequence[int],
        rules: Sequence[Sequence[int]],
        weights: Weights,
        graph: str = "decoder_step",
    ) -> tuple[np.ndarray, np.ndarray]:
        """One token for each row at a position of the cache; see `decoder_step` of the graphs.

        parents : flat number of the row that each row continues
        graph : "decoder_step", or "decoder_greedy_step" where one ranked token is enough

        Returns log probabilities, float32, and tokens, int32, both (rows, RANKED) or (rows, 1).
        Raises as `GpuEngine.failing` does.
        """
        self._tokens.set(tokens)
        self._position.set([position])
        self._rules.set(rules)
        # All the rest: what fails on the device may be told at whatever waits for it next.
        with self._engine.failing("a step"), self._engine.max_device.lock:
            self._engine.release_abandoned()
            return self._step(parents, weights, graph)

    def _step(
        self, parents: Sequence[int], weights: Weights, graph: str
    ) -> tuple[np.ndarray, np.ndarray]:
        for operand in (self._tokens, self._position, self._rules):
            operand.send()
        small = (self._tokens, self._position, self._parents, self._mask, self._rules)
        operands = [operand.buffer for operand in small]
        operands += [*self.cache, *self.cross, *weights["decoder"]]
        # A recorded step reads the weights that it was recorded with, whatever it is given.
        if self._may_capture(graph) and not self._has_captured(graph, weights):
            self._capture(graph, operands, weights)
        self._parents.write(parents)
        logprobs, best = self._replay(graph, operands)
        return logprobs.to_numpy(), best.to_numpy()

    def _may_capture(self, graph: str) -> bool:
        failed = self._engine.failed_captures[graph]
        return (
            self._engine.max_device.captures
            and graph not in self._uncaptured
            and failed < _MOST_FAILED_CAPTURES
        )

    def _has_captured(self, graph: str, weights: Weights) -> bool:
        captured = self._captured
        return (
            captured is not None and captured.graph == graph and captured.weights() is weights
        )

    def _capture(self, graph: str, operands: list[Buffer], weights: Weights) -> None:
        """Records the step, after one that loads its kernels: loading cannot be recorded.

        Both may write this position's keys and values, which the step that follows writes again.
        So that they change nothing else, each row continues itself in them.
        """
        self._release()
        self._parents.write(range(self.rows))
        model = self._engine.graphs[graph]
        self._engine.execute(graph, *operands)[1].to_numpy()  # waits: see `_Operand`
        try:
            with self._engine.max_device.in_order():
                results = model.capture(self._capture_key, *operands)
            self._captured = _Captured(graph, weakref.ref(weights), results)
            # MAX instantiates it on threads of its own, and would tell of failures at a replay.
            model._await_device_graphs()
        except (RuntimeError, ValueError) as error:
            self._uncaptured.add(graph)
            self._engine.failed_captures[graph] += 1
            self._release()
            logger.warning("a decoding step could not be captured, and runs as it is: %s", error)

    def _replay(self, graph: str, operands: list[Buffer]) -> list[Buffer]:
        if self._captured is None or self._captured.graph != graph:
            return self._engine.execute(graph, *operands)
        with self._engine.failing("a replayed step"), self._engine.max_device.in_order():
            self._engine.graphs[graph].replay(self._capture_key, *operands)
        return self._captured.results

    def _release(self) -> None:
        self._abandon()
        self._engine.release_abandoned()

    def _abandon(self) -> None:
        if self._captured is not None:
            self._engine.abandoned.append((self._captured.graph, self._capture_key))
            self._captured = None  # with the results, which are in the captured graph's memory


class _Captured(NamedTuple):
    """A recorded step: its graph, the weights that it reads, and where its results appear."""

    graph: str
    weights: weakref.ref[Weights]
    results: list[Buffer]


class WorkspacePool:
    """Workspaces that no decode uses now.

    generation : how many times they were cleared
    """

    def __init__(self) -> None:
        self.generation = 0
        # The garbage collector may give one back in the middle of anything, of `take` too: so that
        # takes no lock, and the guard is for takers.
        self._idle: deque[Workspace] = deque(maxlen=_IDLE_WORKSPACES)
        self._guard = threading.RLock()

    def take(self, shape: tuple[int, int], weights: Weights, features: Tensor) -> Workspace | None:
        """One for so many (windows, beams), if possible one that is for these features."""
        with self._guard:
            idle = []
            with suppress(IndexError):
                while True:
                    idle.append(self._idle.popleft())
            fitting = [workspace for workspace in idle if workspace.shape == shape]
            same = (workspace for workspace in fitting if workspace.is_for(weights, features))
            taken = next(itertools.chain(same, fitting), None)
            self._idle.extendleft(one for one in reversed(idle) if one is not taken)
            return taken

    def give(self, workspace: Workspace) -> None:
        """A decode is over; the workspace that waited longest makes way."""
        if workspace.generation == self.generation:
            self._idle.append(workspace)

    def clear(self) -> None:
        """Frees them all, and those in use as soon as they are given back."""
        self.generation += 1
        self._idle.clear()


class _Operand:
    """Small numbers that the host writes for each step.

    MAX copies them later than it is told to, and does not keep the memory that they come from: so
    that stays, and holds other numbers only when a result of the step before has been read. On a
    CPU nothing is copied: a copy there is not even in order with what is executed next.
    """

    def __init__(self, dtype: type[np.generic], shape: Sequence[int], device: Device) -> None:
        self._host = np.zeros(shape, dtype)
        self._source = Buffer.from_numpy(self._host)
        self.buffer = self._source.to(device)

    def write(self, values: Sequence | np.ndarray) -> None:
        """For all work that MAX begins later."""
        self.set(values)
        self.send()

    def set(self, values: Sequence | np.ndarray) -> None:
        """What `send` sends."""
        self._host[...] = np.reshape(values, self._host.shape)

    def send(self) -> None:
        if self.buffer is not self._source:
            self.buffer.inplace_copy_from(self._source)


def to_dtype(dtype: torch.dtype) -> DType:
    """MAX's name for a dtype of PyTorch's."""
    return DType[str(dtype).removeprefix("torch.")]
