"""The steps of a decode: what the graphs take, and what they give."""

from __future__ import annotations

from functools import lru_cache

import torch
from max.driver import Buffer
from torch import Tensor

from .decoder_state import DecoderState, Ranked, Selection
from .engine import Engine
from .tensors import int32, to_buffer, to_torch


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
