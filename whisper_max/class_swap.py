"""What both replaced modules share: copies, pickles without whisper_max, and what MAX keeps."""

from __future__ import annotations

import copy
from abc import ABCMeta
from collections.abc import Callable

# What `conditions` looks at is imported now, not in the first call: a fork in the middle of that
# leaves a child that waits for its end for ever.
import torch.fx._symbolic_trace
import torch.utils._device  # noqa: F401
from torch import nn

from . import activation
from .conditions import wants_gradients
from .pickling import New


class _NamedAsUpstream(ABCMeta):
    """Instances of upstream's class are instances of ours, which has its name while patched.

    From ABCMeta, so that subclasses may be abstract, as those of upstream's class may.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        return any(type.__instancecheck__(one, instance) for one in _with_upstream(cls))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return any(type.__subclasscheck__(one, subclass) for one in _with_upstream(cls))


def _with_upstream(cls: type) -> list[type]:
    """A class, and the one that it replaces if it is ours."""
    upstream = vars(cls).get("_upstream")
    return [cls, *(base for base in cls.__mro__ if base.__name__ == upstream)]


class SwappedModule(nn.Module, metaclass=_NamedAsUpstream):
    """A module whose class was swapped for ours.

    Copies keep our class. Pickles name upstream's: they load where whisper_max is not installed,
    and where it is patched in they come back on MAX.
    """

    _upstream: str
    """Name of the class in whisper.model that ours replaces."""

    def __new__(cls, *arguments: object, **named: object) -> SwappedModule:
        module = super().__new__(cls)
        activation.made.add(module)
        return module

    def __setstate__(self, state: dict) -> None:
        activation.made.add(self)  # from a pickle, which does without __new__
        super().__setstate__(state)

    def _get_name(self) -> str:
        """For `print(model)`."""
        return vars(type(self)).get("_upstream", type(self).__name__)

    def __deepcopy__(self, memo: dict) -> SwappedModule:
        if not _is_exactly_ours(self):  # a subclass may say itself how it is copied
            return copy._reconstruct(self, memo, *self.__reduce_ex__(4))  # as without this method
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return _on_the_same_path(self, twin)

    def __copy__(self) -> SwappedModule:
        if not _is_exactly_ours(self):
            return copy._reconstruct(self, None, *self.__reduce_ex__(4))
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return _on_the_same_path(self, twin)

    def drop_max_state(self) -> None:
        """Frees packed weights and remembered results, if there are any."""
        if (model_state := activation.model_state()) is not None:
            model_state.drop(self)

    def __reduce_ex__(self, protocol: int) -> tuple:
        if not _is_exactly_ours(self):
            return super().__reduce_ex__(protocol)  # a subclass of ours pickles as itself
        return New(type(self), self._upstream, "whisper.model"), (), self.__dict__


# Not methods: another thread's unpatch() may take our class from a module in the middle of a call.


def note_pytorch(module: nn.Module, changes: Callable[..., list[str]]) -> None:
    """PyTorch computes with this module, and weights may change afterwards without its count.

    In training, as by `.data`; or while parts are replaced, as by an adapter that is merged
    later. What MAX keeps is dropped then. Hooks are no such sign: upstream's caches are made of
    them, in each decode on PyTorch.

    changes : finds those in a module's parts
    """
    model_state = activation.model_state()
    if model_state is None or not model_state.is_kept(module):
        return
    if wants_gradients(module) or changes(module, hooks=False):
        model_state.drop(module)


def _is_exactly_ours(module: nn.Module) -> bool:
    """Whether this is no instance of a user's subclass."""
    return "_upstream" in vars(type(module))


def _on_the_same_path(module: nn.Module, twin: nn.Module) -> nn.Module:
    """A copy of a module that was taken up is taken up as well, and given back with it."""
    for taken_up in (activation.accelerated, activation.adopted):
        if module in taken_up:
            taken_up.add(twin)
    return twin
