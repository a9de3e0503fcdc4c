"""Modules in which nothing was changed: to see that they are as they were takes less time."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Size, nn

_known: dict[tuple[int, bool], tuple[weakref.ref[nn.Module], Description]] = {}
"""By identity, since a class may give its modules another equality, and by what it was seen as."""

_PLAIN = (bool, float, int, str, type(None))
"""Whose values do not change; what else equals them, such as an array, may."""


class Description(NamedTuple):
    """All of a module that tells whether something was changed, but for hooks and what it calls.

    names, classes, attributes : of its parts, in the order of `modules()`
    places : the names of the parameters, buffers and parts of each
    shapes : of all parameters and buffers
    settings : values of attributes
    """

    names: Sequence[str]
    classes: list[weakref.ref[type]]  # which may refer to a model
    attributes: list[tuple[str, ...]]
    places: list[list[tuple[str, ...]]]
    shapes: list[Size | None]
    settings: list[object]


def describe(
    names: Sequence[str], parts: Sequence[nn.Module], settings: Mapping[str, Sequence[str]]
) -> Description | None:
    """Describes a module by its parts; None where they are such that they do not let it.

    settings : by the name of a class, of which attributes values are part of the description
    """
    try:
        return _described(names, parts, settings)
    except Exception:
        try:
            _described(names, parts, settings)
        except Exception:  # of somebody else's part, which is looked at then
            return None
        raise  # of a signal's handler


def _described(
    names: Sequence[str], parts: Sequence[nn.Module], settings: Mapping[str, Sequence[str]]
) -> Description:
    owns = list(map(vars, parts))
    kinds = [[own[kind] for own in owns] for kind in ("_parameters", "_buffers", "_modules")]
    tensors = chain.from_iterable(own.values() for own in chain(*kinds[:2]))
    classes = list(map(type, parts))
    return Description(
        names,
        list(map(weakref.ref, classes)),
        list(map(tuple, owns)),
        [list(map(tuple, kind)) for kind in kinds],
        [None if tensor is None else tensor.shape for tensor in tensors],
        [
            getattr(part, name, None)
            for part, cls in zip(parts, classes)
            for name in settings.get(cls.__name__, ())
        ],
    )


def is_known(module: nn.Module, decoder: bool, description: Description | None) -> bool:
    """Whether this is what was kept of a module."""
    of, known = _known.get((id(module), decoder), (None, None))
    return of is not None and of() is module and description is not None and known == description


def keep(module: nn.Module, decoder: bool, description: Description) -> None:
    """Nothing was found in a module like this, seen as a decoder or an encoder. Gone with it."""
    values = chain.from_iterable(v if type(v) is tuple else (v,) for v in description.settings)
    if all(type(value) in _PLAIN for value in values):
        key = id(module), decoder
        _known[key] = weakref.ref(module, lambda _: _known.pop(key, None)), description
