"""One decode: a decoder's packed weights, its windows' cross-attention cache, and its own cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from max.driver import Buffer
from torch import Tensor, nn

from ..conditions import norm_reasons
from ..dispatch import refuse
from ..graphs.specification import HEAD_DIM
from ..rule import Rule
from ..settings import Settings
from . import weights
from .cross_cache import CrossCache
from .decoder_state import DecoderState, Ranked, Selection
from .decoder_steps import Scores, decoder_select, decoder_step
from .memory import huge_pages
from .model_state import Ready, state_of
from .tensors import int32, to_buffer, to_torch


class Observed(NamedTuple):
    """What a step saw on its way: the residual stream around cross attention, and at the end.

    before, after : shape = (layers, rows, count, n_state), float32
    end : shape = (rows, count, n_state), after the last block
    scores : of the layers asked for, shape = (rows, heads, count, n_audio_ctx): cross attention's
        products of queries and keys
    """

    before: Tensor
    after: Tensor
    end: Tensor
    scores: dict[int, Tensor]


class DecoderSession:
    """The state of one decode. It belongs to the call: sessions of one model do not meet.

    decoder : a TextDecoder
    features : shape = (windows, n_audio_ctx, n_state), float32
    rows : sequences to decode, a multiple of the windows

    Raises UnsupportedByMax while there is no engine, where MAX fails, and where the weights or the
    features hold what the kernels do not take.
    """

    def __init__(
        self, decoder: nn.Module, features: Tensor, rows: int, settings: Settings
    ) -> None:
        state = state_of(decoder, "decoder")
        self._ready: Ready = state.ready(decoder, settings)
        self.layers = len(decoder.blocks)
        self.heads = decoder.blocks[0].attn.n_head
        self.rows = rows
        self._frames = features.shape[1]
        features = distinct(features)
        cross = state.cross.find(self._ready, features)
        if cross is None:
            state.cross.drop()
            huge_pages.begin_window()
            cross = CrossCache(
                self._ready.engine,
                self._ready.packed[0],
                features,
                self.layers,
                self._ready.cross,
                state.pool,
            )
            if len(features) == 1:  # 490 MB a window for the largest models
                state.cross.keep(self._ready, cross.copied, cross)
        refuse(self._features_reasons(cross))
        self.windows = cross.windows
        self._no_scores = Scores.none(self.layers, self.heads)
        self._state = DecoderState(
            cross, self.layers, self.heads, len(decoder.positional_embedding), rows
        )

    def _features_reasons(self, cross: CrossCache) -> list[str]:
        """Reasons that lie in the features' numbers, which the kernel has measured."""
        reasons = norm_reasons(cross.max_norm)
        if self._ready.cross is torch.float16 and weights.may_overflow(
            self._ready.reach, cross.max_norm
        ):
            reasons.append("cross-attention keys or values may be beyond float16")
        return reasons

    @property
    def length(self) -> int:
        """Positions decoded up to now."""
        return self._state.length

    def step(self, tokens: Tensor, wanted: Iterable[int]) -> Tensor:
        """Decodes tokens, shape = (rows, count), behind what is there.

        wanted : flat numbers (row * count + i) of the tokens whose logits are computed

        Returns logits, shape = (wanted, n_vocab), float32, in fresh memory. Raises
        UnsupportedByMax where MAX fails.
        """
        return self._step(tokens, wanted, self._no_scores)[0]

    def observed_step(
        self, tokens: Tensor, wanted: Iterable[int], layers: Sequence[int]
    ) -> tuple[Tensor, Observed]:
        """As `step`; also what it saw on its way, with the scores of these layers."""
        rows, count = tokens.shape
        slots = [[-1] * self.heads for _ in range(self.layers)]
        for i, layer in enumerate(layers):
            slots[layer] = list(range(i * self.heads, (i + 1) * self.heads))
        shape = (2 * self.layers + 1, rows * count, self.heads * HEAD_DIM)
        residuals_buffer = to_buffer(torch.empty(shape, dtype=torch.float32, device="cpu"))
        logits, *seen = self._step(tokens, wanted, Scores(slots), residuals_buffer)
        scores, residuals = map(to_torch, seen)
        residuals = residuals.view(-1, rows, count, shape[2])
        scores = scores[:, :, : self._frames].unflatten(1, (rows, count))
        by_layer = scores.unflatten(0, (len(layers), self.heads)).transpose(1, 2)
        return logits, Observed(
            residuals[:-1:2],
            residuals[1::2],
            residuals[-1].clone(),  # hooks may keep it, but not the others for it
            {
                layer: by_layer[i].clone(memory_format=torch.contiguous_format)
                for i, layer in enumerate(layers)
            },
        )

    def align(
        self, tokens: Tensor, heads: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """A whole text, shape = (1, count), and what chosen heads of cross attention look at.

        heads : (layer, head) each

        Returns logits, shape = (count, n_vocab), and raw scores, shape = (heads, count,
        n_audio_ctx).
        """
        slots = [[-1] * self.heads for _ in range(self.layers)]
        for slot, (layer, head) in enumerate(heads):
            slots[layer][head] = slot
        logits, scores, _ = self._step(tokens, range(tokens.shape[1]), Scores(slots))
        return logits, to_torch(scores)[:, :, : self._frames]

    def selection(self, suppressed: Sequence[int], n_vocab: int, count: int) -> Selection:
        """What `select` chooses by, see `Selection`."""
        return Selection(suppressed, n_vocab, count, self.rows)

    def select(
        self, tokens: list[int], selection: Selection, rules: Sequence[Rule]
    ) -> Ranked:
        """Decodes one token for each row and ranks what may follow."""
        selection.at(tokens, rules)
        return decoder_select(
            self._ready.engine, self._ready.packed[1], self._state, self._no_scores, selection
        )

    def prefill(self, tokens: Tensor, wanted: Iterable[int]) -> Tensor:
        """The first tokens of all rows, decoded once for rows that begin alike.

        tokens : shape = (rows, count); nothing has been decoded before them

        wanted : positions in each row whose logits are computed

        Returns logits, shape = (rows, wanted, n_vocab), in fresh memory.
        """
        rows, count = tokens.shape
        group = rows // self.windows
        grouped = tokens.view(self.windows, group, count)
        wanted = list(wanted)
        assert self.length == 0
        alike = group > 1 and bool((grouped == grouped[:, :1]).all())
        first = grouped[:, 0] if alike else tokens
        flat = [row * count + i for row in range(len(first)) for i in wanted]
        logits = self.step(first, flat).view(len(first), len(wanted), -1)
        if alike:
            parents = np.arange(rows) // group
            self._state.source[:, :count] = parents[:, None]
            logits = logits[parents]
        return logits

    def reorder(self, parents: list[int]) -> None:
        """Row i goes on as a copy of what row parents[i] was."""
        self._state.reorder(parents)

    def _step(
        self,
        tokens: Tensor,
        wanted: Iterable[int],
        scores: Scores,
        residuals: Buffer | None = None,
    ) -> tuple[Tensor, Buffer, Buffer]:
        """As `step`; also the scores and residuals of `decoder_step`."""
        return decoder_step(
            self._ready.engine,
            self._ready.packed[1],
            self._state,
            to_buffer(tokens.to(torch.int32)),
            int32(list(wanted)),
            scores,
            residuals,
        )


def distinct(features: Tensor) -> Tensor:
    """One window where all are the same, as upstream repeats them for beams; else all of them."""
    if len(features) > 1 and bool((features[1:] == features[:1]).all()):
        return features[:1]
    return features
