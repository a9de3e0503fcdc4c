"""What both replaced modules share: copies and pickles that do not need whisper_max."""

from __future__ import annotations

import copy
import importlib

from torch import nn

from . import activation


class SwappedModule(nn.Module):
    """A module whose class was swapped for ours.

    Copies keep our class. Pickles name upstream's: they load where whisper_max is not installed,
    and where it is patched in they come back on MAX.
    """

    _upstream: str
    """Name of the class in whisper.model that ours replaces."""

    def __deepcopy__(self, memo: dict) -> SwappedModule:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return self._on_the_same_path(twin)

    def __copy__(self) -> SwappedModule:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return self._on_the_same_path(twin)

    def _on_the_same_path(self, twin: SwappedModule) -> SwappedModule:
        """A copy of a module that accelerate(model) took up is taken up as well."""
        if self in activation.accelerated:
            activation.accelerated.add(twin)
        return twin

    def __reduce_ex__(self, protocol: int) -> tuple:
        if type(self)._upstream not in vars(type(self)).values():
            return super().__reduce_ex__(protocol)  # a subclass of ours pickles as itself
        return object.__new__, (_ByName("whisper.model", self._upstream),), self.__dict__


class _ByName:
    """Pickles as an attribute of a module that is looked up when the pickle is loaded."""

    def __init__(self, module: str, attribute: str) -> None:
        self.module = module
        self.attribute = attribute

    def __reduce__(self) -> tuple:
        return getattr, (_Module(self.module), self.attribute)


class _Module:
    """Pickles as the import of a module."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple:
        return importlib.import_module, (self.name,)
