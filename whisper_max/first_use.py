"""The import of what runs on MAX, which a program waits for at its first call and not before."""

from __future__ import annotations

import os
import threading
from types import ModuleType

from .conditions import UnsupportedByMax


def runtime() -> ModuleType:
    """`runtime.by_device`.

    A fork waits for the import: in the child, the thread that imports would not be there to end it,
    and others would wait for it for ever.

    Raises UnsupportedByMax where MAX cannot be imported: another module may have its name.
    """
    global _failure
    if _failure is not None:  # once is enough: each call would try anew
        raise UnsupportedByMax(_failure)
    try:
        with _importing:
            from .runtime import by_device
    except (ImportError, OSError) as error:
        if (getattr(error, "name", None) or "").startswith(__package__):  # a fault of ours
            raise
        _failure = f"MAX cannot be imported: {error}"
        raise UnsupportedByMax(_failure) from error

    return by_device


def _renew_lock() -> None:
    global _importing
    _importing = threading.RLock()


_failure: str | None = None
_importing = threading.RLock()
os.register_at_fork(
    before=lambda: _importing.acquire(),
    after_in_parent=lambda: _importing.release(),
    after_in_child=_renew_lock,
)
