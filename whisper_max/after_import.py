"""Do something as soon as a program has imported a certain package."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def call_after_import(package: str, action: Callable[[], None]) -> None:
    """Call `action` once, when `package` has been imported: now, if that is already so.

    What `action` raises comes out of the import statement that led to it.
    """
    if package in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watcher(package, action))


class _Watcher(importlib.abc.MetaPathFinder):
    """Stands before the real finders, and lets them find everything."""

    def __init__(self, package: str, action: Callable[[], None]) -> None:
        self.package = package
        self.action = action
        self.asking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.package or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(name)  # of the finders behind us
        finally:
            self.asking = False
        # Finding is not importing: the package may only be looked for. So act on execution.
        if spec is not None and spec.loader is not None:
            self._act_after_exec(spec.loader)
        return spec

    def _act_after_exec(self, loader: importlib.abc.Loader) -> None:
        exec_module = loader.exec_module

        def exec_then_act(module: ModuleType) -> None:
            exec_module(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.action()

        # On this one loader, not in a wrapper: others look at the loader's type and methods.
        loader.exec_module = exec_then_act
