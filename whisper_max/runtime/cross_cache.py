"""Cross-attention keys and values of a decode's windows, and the memory that they are in."""

from __future__ import annotations

import weakref
from collections import deque
from math import sqrt

import numpy as np
import torch
from max.driver import Buffer
from torch import Tensor

from ..graphs.specification import HEAD_DIM, PANEL
from . import memory
from .engine import Engine
from .tensors import to_buffer


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
