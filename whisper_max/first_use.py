"""The import of what runs on MAX, which a program waits for at its first call and not before."""

from __future__ import annotations

import os
import threading
from types import ModuleType

from . import report
from .conditions import UnsupportedByMax


def runtime() -> ModuleType:
    """`runtime.by_device`.

    A fork waits for the import: in the child, the thread that imports would not be there to end it,
    and others would wait for it for ever.

    Raises UnsupportedByMax where MAX cannot be imported: another module may have its name.
    """
    global _failure, _imports
    if _failure is not None:  # once is enough: each call would try anew
        raise UnsupportedByMax(_failure)
    try:
        with _importing:
            if _imports:  # the lock is this thread's
                raise UnsupportedByMax("a signal's handler decodes while MAX is being imported")
            _imports = True
            try:
                from .runtime import by_device
            finally:
                _imports = False
    except (ImportError, OSError) as error:
        if (getattr(error, "name", None) or "").startswith(__package__):  # a fault of ours
            raise
        if isinstance(error, OSError) and not (
            report.is_of_the_system(error) or report.is_of_max(error, *_IMPORT)
        ):
            raise  # of a signal's handler
        _failure = f"MAX cannot be imported: {error}"
        raise UnsupportedByMax(_failure) from error

    return by_device


def _renew_lock() -> None:
    global _importing
    _importing = threading.RLock()


_IMPORT = ("_frozen_importlib", "_frozen_importlib_external", "importlib", "ctypes")
"""What raises where a file or a library cannot be read."""

_failure: str | None = None
_imports = False
_importing = threading.RLock()
os.register_at_fork(
    before=lambda: _importing.acquire(),
    after_in_parent=lambda: _importing.release(),
    after_in_child=_renew_lock,
)
