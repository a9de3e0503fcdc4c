"""Pickles that name upstream's classes, whatever stands under those names meanwhile.

Pickle writes a class as its name, and refuses where another one has that name: as upstream's has
while whisper is patched, and ours always. Here the name alone counts. So models load where
whisper_max is not installed, and come back on MAX where whisper is patched.
"""

from __future__ import annotations

import copyreg
import functools
import importlib


class New:
    """Makes an empty instance of a class; pickles as a function that does so by the class's name.

    cls : the class, for copies
    name : its name in its module, where that is not its own
    """

    def __init__(self, cls: type, name: str | None = None, module: str | None = None) -> None:
        self.cls = cls
        self.name = name or cls.__name__
        self.module = module or cls.__module__

    def __call__(self) -> object:
        return object.__new__(self.cls)

    def __reduce__(self) -> tuple:
        return functools.partial, (object.__new__, _Attribute(self.module, self.name))


class _Attribute:
    """Pickles as an attribute of a module that is looked up when the pickle is loaded."""

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    def __reduce__(self) -> tuple:
        return getattr, (_Module(self.module), self.name)


class _Module:
    """Pickles as the import of a module."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple:
        return importlib.import_module, (self.name,)


def by_name(cls: type) -> None:
    """Pickle instances of `cls` by its name, which stands for another class from now on."""
    copyreg.dispatch_table.setdefault(cls, _reduce)


def as_usual(cls: type) -> None:
    """Undo `by_name`."""
    if copyreg.dispatch_table.get(cls) is _reduce:
        del copyreg.dispatch_table[cls]


def _reduce(thing: object) -> tuple:
    _, _, *state = thing.__reduce_ex__(2)
    return New(type(thing)), (), *state
