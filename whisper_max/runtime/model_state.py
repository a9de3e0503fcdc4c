"""What MAX keeps for one encoder or decoder: packed weights, and the last result.

It is no part of the module: not a submodule, not in its state_dict, not in copies or pickles. It
follows the module's weights: when those change, it is made anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from max.driver import Buffer
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .. import tensor_numbers
from ..changed_parts import named_parts
from ..conditions import UnsupportedByMax, float16_reasons, parameter_reasons, value_reasons
from ..dispatch import refuse
from ..settings import EXACT_PRECISIONS, Settings
from . import loading, weights
from .cross_cache import CrossCache, TensorPool
from .engine import Engine
from .storage import Arithmetic, arithmetic_of
from .watch import Watch


class Ready(NamedTuple):
    """An engine, and one module's weights packed for it.

    cross : dtype of the cross-attention keys and values
    reach : of a decoder with such keys and values in float16, see `weights.reach`
    """

    engine: Engine
    packed: tuple[list[Buffer], ...]
    cross: torch.dtype
    reach: tuple[float, float]

    def encode(self, mel: Tensor) -> Tensor:
        """mel, shape = (batch, n_mels, 2 * n_audio_ctx), -> (batch, n_audio_ctx, n_state)."""
        return self.engine.encode(self.packed[0], mel)


Kept = TypeVar("Kept")


class Memo(Generic[Kept]):
    """The last result, found again by the contents of what it was made from.

    Upstream encodes one window for language detection, for every temperature and for word
    timestamps, each time from another tensor with the same numbers.
    """

    def __init__(self) -> None:
        self._last: tuple[Ready, Tensor, Kept] | None = None

    def find(self, ready: Ready, source: Tensor) -> Kept | None:
        """The result for these weights and this input."""
        last = self._last
        if last is not None and last[0] is ready and tensor_numbers.equal(last[1], source):
            return last[2]
        return None

    def keep(self, ready: Ready, source: Tensor, result: Kept) -> None:
        """Remembers one result in place of the last.

        source : what it was made from, in memory that nobody changes
        """
        self._last = (ready, source, result)

    def drop(self) -> None:
        """Forgets, before a large result is made anew."""
        self._last = None


class Guard:
    """A lock of one thread at a time, in which a signal's handler may come by.

    The handler runs in the thread that has the lock, and must neither wait for it nor go on with
    what is half done: it is refused.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._is_taken = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Holds the lock. Raises UnsupportedByMax where this thread has it."""
        with self._lock:
            if self._is_taken:
                refuse(["a signal's handler decodes while the weights are being packed"])
            self._is_taken = True
            try:
                yield
            finally:
                self._is_taken = False


class ModelState:
    """Packed weights of one module, checked against its parameters at every use."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.features: Memo[Tensor] = Memo()
        self.cross: Memo[CrossCache] = Memo()
        self.pool = TensorPool()
        self._guard = Guard()
        self.watch = Watch()
        self._precision = ""
        self._exact: bool | None = None  # whether float16 holds every weight; None: not known yet
        self._reasons: list[str] = []
        self._ready: Ready | None = None
        self._settings: Settings | None = None  # by which that was made

    def ready(self, module: nn.Module, settings: Settings) -> Ready:
        """Engine and packed weights for the module as it is now.

        Raises UnsupportedByMax while there is no engine, or where the parameters are not such
        that the kernels could take them.
        """
        with self._guard.taken():
            tensors = tensors_of(module)
            if settings.precision != self._precision or not self.watch.unchanged(tensors):
                self._look_at(tensors, settings.precision)
            refuse(self._reasons)
            if self._ready is not None and settings is self._settings:
                return self._ready
            if self._exact is None:
                self._exact = self._pack_exactly(tensors, settings)
            arithmetic = arithmetic_of(settings.precision, self._exact)
            engine = loading.engine(arithmetic, settings)
            if self._ready is None or self._ready.engine is not engine:
                self._ready = self._pack(tensors, engine, arithmetic)
            self._settings = settings
            return self._ready

    def _look_at(self, tensors: Mapping[str, Tensor], precision: str) -> None:
        """Notes the parameters as they are, and what is against them."""
        self._ready, self._settings, self._precision = None, None, ""
        self.watch.forget()
        self.features.drop()
        self.cross.drop()
        refuse(parameter_reasons(tensors.values(), torch.device("cpu")))
        # Where weights are rounded anyway, float16 is what they are rounded to.
        self._exact = None if precision in EXACT_PRECISIONS else True
        self._reasons = value_reasons(tensors)
        if precision == "medium":
            self._reasons += float16_reasons(list(weights.matrices(tensors)))
        self.watch.note(tensors)
        self._precision = precision

    def _pack_exactly(self, tensors: Mapping[str, Tensor], settings: Settings) -> bool:
        """Whether float16 holds every weight, as it does for the official checkpoints.

        They are packed in the belief that it does, which packing shows. Only where there is no
        engine for that are they looked at first: the answer decides which one is compiled.
        """
        arithmetic = arithmetic_of(settings.precision, True)
        try:
            engine = loading.engine(arithmetic, replace(settings, compile="cached"))
        except UnsupportedByMax:
            return weights.exact_in_float16(weights.matrices(tensors))
        try:
            self._ready = self._pack(tensors, engine, arithmetic, exact=True)
        except weights.Inexact:
            return False
        return True

    def _pack(
        self,
        tensors: Mapping[str, Tensor],
        engine: Engine,
        arithmetic: Arithmetic,
        *,
        exact: bool = False,
    ) -> Ready:
        storage = getattr(torch, arithmetic.weight)
        cross = getattr(torch, arithmetic.cross)
        how = {"storage": storage, "engine": engine, "exact": exact}
        with torch.no_grad():
            if self.kind == "encoder":
                return Ready(engine, (weights.pack_encoder(tensors, **how),), cross, (0.0, 0.0))
            packed = weights.pack_cross_kv(tensors, **how), weights.pack_decoder(tensors, **how)
            reach = weights.reach(tensors) if cross is torch.float16 else (0.0, 0.0)
            return Ready(engine, packed, cross, reach)


State = TypeVar("State")

_states: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()
_states_guard = threading.RLock()  # a signal's handler may decode, too


def state_of(
    module: nn.Module, kind: str, make: Callable[[str], State] = ModelState
) -> State:
    """The state of an "encoder" or "decoder"; made at first use, gone with the module.

    make : the class of the state; one of another class is of a device where the module was before

    Raises UnsupportedByMax in a forked process.
    """
    loading.refuse_after_fork()  # before any lock: a thread that is not here may hold it
    with _states_guard:
        state = _states.get(module)
        if type(state) is not make:
            state = _states[module] = make(kind)
        return state


def _after_optimizer_step(optimizer: Optimizer, *_: object) -> None:
    if torch.compiler.is_compiling() or not _states:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    with _states_guard:
        states = list(_states.values())
    for state in states:
        state.watch.after_step_of(stepped)


register_optimizer_step_post_hook(_after_optimizer_step)


def is_kept(module: nn.Module) -> bool:
    """Whether MAX keeps anything for the module."""
    with _states_guard:
        return module in _states


def drop(module: nn.Module) -> None:
    """Frees what MAX keeps for the module."""
    with _states_guard:
        _states.pop(module, None)


def drop_all(keep: Container[nn.Module]) -> None:
    """Frees what MAX keeps for every module but those in `keep`."""
    with _states_guard:
        for module in [module for module in _states if module not in keep]:
            del _states[module]


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name: what a state_dict is made of, without its hooks."""
    parts = named_parts(module)
    return {
        f"{part_name}.{name}" if part_name else name: tensor
        for kind in ("_parameters", "_buffers")
        for part_name, part in parts
        for name, tensor in part.__dict__[kind].items()
        if tensor is not None
    }
