"""Modules in which nothing was changed: to see that they are as they were takes less time."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Size, nn

_known: dict[int, tuple[weakref.ref[nn.Module], Description]] = {}
"""By identity: a class may give its modules another equality."""


class Description(NamedTuple):
    """All of a module that tells whether something was changed, but for hooks and what it calls.

    names, classes, attributes : of its parts, in the order of `modules()`
    places : the names of the parameters, buffers and parts of each
    shapes : of all parameters and buffers
    settings : values of attributes
    """

    names: Sequence[str]
    classes: list[type]
    attributes: list[tuple[str, ...]]
    places: list[list[tuple[str, ...]]]
    shapes: list[Size | None]
    settings: list[object]


def describe(
    names: Sequence[str], parts: Sequence[nn.Module], settings: Mapping[str, Sequence[str]]
) -> Description | None:
    """Describes a module by its parts; None where one is no module, or a tensor has no shape yet.

    settings : by the name of a class, of which attributes values are part of the description
    """
    try:
        owns = list(map(vars, parts))
        kinds = [[own[kind] for own in owns] for kind in ("_parameters", "_buffers", "_modules")]
        tensors = chain.from_iterable(own.values() for own in chain(*kinds[:2]))
        shapes = [None if tensor is None else tensor.shape for tensor in tensors]
    except (AttributeError, KeyError, RuntimeError, TypeError):
        return None
    classes = list(map(type, parts))
    return Description(
        names,
        classes,
        list(map(tuple, owns)),
        [list(map(tuple, kind)) for kind in kinds],
        shapes,
        [
            getattr(part, name, None)
            for part, cls in zip(parts, classes)
            for name in settings.get(cls.__name__, ())
        ],
    )


def is_known(module: nn.Module, description: Description | None) -> bool:
    """Whether this is what was kept of a module."""
    of, known = _known.get(id(module), (None, None))
    return description is not None and of is not None and of() is module and known == description


def keep(module: nn.Module, description: Description) -> None:
    """Nothing was found in a module like this. Gone with the module."""
    key = id(module)
    _known[key] = weakref.ref(module, lambda _: _known.pop(key, None)), description
