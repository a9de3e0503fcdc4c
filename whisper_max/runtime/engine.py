"""One artifact, loaded: its graphs as functions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from max.driver import CPU, Buffer
from max.engine import CompiledModel, InferenceSession, Model
from torch import Tensor

from .. import on_one_thread, report
from . import limits
from .load_max import without_signal_handler
from .tensors import int32, to_buffer, to_torch
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
