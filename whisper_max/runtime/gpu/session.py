"""One decode on a GPU, as `DecoderSession` is one on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from max.driver import Buffer
from torch import Tensor, nn

from ...conditions import UnsupportedByMax
from ...rule import Rule
from ...settings import Settings
from ..decoder_session import distinct
from ..decoder_state import Ranked, suppression
from ..model_state import state_of
from ..tensors import to_buffer, to_torch
from .engine import MOST_BEAMS, RANKED, Workspace, to_dtype
from .devices import MaxDevice
from .state import GpuReady, GpuState, text_sizes


class GpuSession:
    """The state of one decode. It belongs to the call: sessions of one model do not meet.

    decoder : a TextDecoder whose parameters are on `max_device`
    features : shape = (windows, n_audio_ctx, n_state); the graphs compute in its dtype
    rows : sequences to decode, a multiple of the windows

    Raises UnsupportedByMax while there is no engine, or no memory.
    """

    def __init__(
        self,
        decoder: nn.Module,
        features: Tensor,
        rows: int,
        settings: Settings,
        max_device: MaxDevice,
    ) -> None:
        state = state_of(decoder, "decoder", GpuState)
        sizes = text_sizes(decoder, features.shape[1])
        self._ready: GpuReady = state.ready(decoder, settings, max_device, sizes, features.dtype)
        features = distinct(features)
        self.windows, self.rows = len(features), rows
        self.length = 0
        self._n_text_ctx = sizes.n_text_ctx
        self._layers = sizes.n_text_layer
        self._identity = list(range(rows))
        self._parents = self._identity
        workspaces, shape = self._ready.engine.workspaces, (self.windows, rows // self.windows)
        workspace = workspaces.take(shape, self._ready.weights, features)
        if workspace is None:
            workspace = Workspace(self._ready.engine, sizes, to_dtype(features.dtype), *shape)
        self._workspace = workspace
        # An abandoned decode gives its workspace back as well.
        weakref.finalize(self, workspaces.give, workspace).atexit = False
        workspace.fill(self._ready.weights, features)

    def step(self, tokens: Tensor, wanted: Iterable[int]) -> Tensor:
        """Decodes tokens, shape = (rows, count), behind what is there.

        wanted : flat numbers (row * count + i) of the tokens whose logits are computed

        Returns logits, shape = (wanted, n_vocab), float32, in fresh memory. Raises
        UnsupportedByMax where MAX fails.
        """
        count = tokens.shape[1]
        operands = (
            self._int32(tokens.view(*self._workspace.shape, count)),
            self._int32(range(self.length, self._end(count))),
            self._int32(np.reshape(self._checked_parents(), self._workspace.shape)),
            self._int32(list(wanted)),
        )
        memory = *self._workspace.cache, *self._workspace.cross
        logits = self._execute("decoder_prefill", *operands, *memory)
        self.length += count
        self._parents = self._identity
        return to_torch(logits[0])

    def prefill(self, tokens: Tensor, wanted: Iterable[int]) -> Tensor:
        """The first tokens of all rows, shape = (rows, count).

        wanted : positions in each row whose logits are computed

        Returns logits, shape = (rows, wanted, n_vocab), in fresh memory.
        """
        rows, count = tokens.shape
        wanted = list(wanted)
        assert self.length == 0
        flat = [row * count + i for row in range(rows) for i in wanted]
        return self.step(tokens, flat).view(rows, len(wanted), -1)

    def align(
        self, tokens: Tensor, heads: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """A whole text, shape = (1, count), and what chosen heads of cross attention look at.

        heads : (layer, head) each

        Returns logits, shape = (count, n_vocab), and raw scores, shape = (heads, count,
        n_audio_ctx), both float32.
        """
        count = tokens.shape[1]
        chosen = np.full((self._layers, len(heads)), -1)
        for slot, (layer, head) in enumerate(heads):
            chosen[layer, slot] = head
        operands = (
            self._int32(tokens.view(*self._workspace.shape, count)),
            self._int32(range(self._end(count))),
            self._int32(chosen),
        )
        logits, scores = self._execute("decoder_alignment", *operands, *self._workspace.cross)
        return to_torch(logits), to_torch(scores)[0]

    def selection(self, suppressed: Sequence[int], n_vocab: int, count: int) -> GpuSelection:
        """What `select` chooses by, see `GpuSelection`."""
        if count > RANKED:
            raise UnsupportedByMax(f"a step on the GPU ranks {RANKED} tokens, not {count}")
        return GpuSelection(self._workspace, suppressed, n_vocab, count)

    def select(
        self, tokens: list[int], selection: GpuSelection, rules: Sequence[Rule]
    ) -> Ranked:
        """Decodes one token for each row and ranks what may follow."""
        position, parents = self._end(1) - 1, self._checked_parents()
        graph = "decoder_greedy_step" if selection.count == 1 else "decoder_step"
        found = self._workspace.step(tokens, position, parents, rules, self._ready.weights, graph)
        self.length += 1
        self._parents = self._identity
        logprobs, best = (ranked[:, : selection.count].ravel().tolist() for ranked in found)
        return logprobs, best

    def reorder(self, parents: list[int]) -> None:
        """Row i goes on as a copy of what row parents[i] was."""
        self._parents = [self._parents[parent] for parent in parents]

    def _checked_parents(self) -> list[int]:
        """Raises UnsupportedByMax where the kernel cannot put the caches in this order."""
        beams = self._workspace.shape[1]
        if self._parents != self._identity:
            if beams > MOST_BEAMS:
                raise UnsupportedByMax(f"{beams} beams, where {MOST_BEAMS} change places")
            if any(row // beams != parent // beams for row, parent in enumerate(self._parents)):
                raise UnsupportedByMax("a row goes on as one of another window")
        return self._parents

    def _end(self, count: int) -> int:
        """Raises UnsupportedByMax where so many more tokens do not fit."""
        end = self.length + count
        if end > self._n_text_ctx:
            raise UnsupportedByMax(f"{end} tokens, where {self._n_text_ctx} fit")
        return end

    def _execute(self, graph: str, *operands: Buffer) -> list[Buffer]:
        ready = self._ready
        return ready.engine.execute(graph, *operands, *ready.weights["decoder"])

    def _int32(self, values: Tensor | Iterable[int]) -> Buffer:
        if not isinstance(values, Tensor):
            values = torch.from_numpy(np.array(values))
        return to_buffer(values.to(self._ready.engine.max_device.torch_device, torch.int32))


class GpuSelection:
    """The choice of tokens of one decode: what does not change from step to step.

    suppressed : tokens that are never sampled
    count : how many tokens of each row are ranked
    """

    def __init__(
        self, workspace: Workspace, suppressed: Sequence[int], n_vocab: int, count: int
    ) -> None:
        self.count = count
        workspace.suppress(suppression(suppressed, n_vocab))
