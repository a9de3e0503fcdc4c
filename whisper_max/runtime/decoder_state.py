"""What a decode remembers, and what it chooses tokens by."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from max.driver import Buffer

from ..conditions import UnsupportedByMax
from ..graphs.specification import HEAD_DIM, MASKED
from ..rule import Rule
from . import memory
from .cross_cache import CrossCache
from .tensors import Tables, int32, to_buffer


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
        self.self_cache = to_buffer(memory.untouched(shape, torch.float32))
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
