"""The engine of a precision, as soon as its artifact is there."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .. import report
from ..conditions import UnsupportedByMax
from ..settings import Settings
from . import artifacts, compilation, hardware
from .artifact_key import ArtifactKey
from .cache_folder import CacheRefused
from .engine import Engine
from .storage import Arithmetic, keys_of

if TYPE_CHECKING:
    from max.engine import CompiledModel

logger = logging.getLogger("whisper_max")

Loaded = TypeVar("Loaded")

_engines: dict[tuple[str, str], Any] = {}  # by artifact and device
_unloadable: dict[tuple[str, str], str] = {}  # and why
_guard = threading.RLock()
_process = os.getpid()
_libc = ctypes.CDLL(None)  # opened here: after a fork, the loader's lock may be held for ever


def _after_fork() -> None:
    """Keeps a forked child from waiting for threads that only its parent has.

    PyTorch goes on with one thread: GNU OpenMP would wait for the others forever, with upstream's
    own code as well, once the parent has computed anything. MAX waits for its own when a graph is
    freed, so none is; and in what it does last, so the child exits without it.
    """
    if not _engines:
        return
    torch.set_num_threads(1)
    if hasattr(_libc, "on_exit"):  # glibc
        _libc.on_exit(_libc._exit, None)  # after Python's own end, before MAX's; keeps the status
    for kept in _engines.values():  # with its graphs, and on a GPU memory that decodes wait with
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


os.register_at_fork(after_in_child=_after_fork)


def refuse_after_fork() -> None:
    """Raises UnsupportedByMax in a process forked from the one that imported this."""
    if os.getpid() != _process:
        raise UnsupportedByMax("this process was forked: MAX does not survive a fork")


def engine(arithmetic: Arithmetic, settings: Settings) -> Engine:
    """The loaded engine of an arithmetic. Compiles, waits or does neither, as the settings say.

    Raises UnsupportedByMax with the reason while there is none.
    """
    keys = keys_of(arithmetic, settings.cpu_level)
    return loaded(
        keys, settings, "cpu", Engine, lambda key: f"cpu ({key.cpu_level}, {hardware.cpu_model()})"
    )


def loaded(
    keys: Sequence[ArtifactKey],
    settings: Settings,
    device: str,
    load: Callable[[CompiledModel], Loaded],
    describe: Callable[[ArtifactKey], str],
) -> Loaded:
    """The first of some artifacts, loaded for a device; compiled or not, as the settings say.

    load : makes of the artifact what is kept; it has `graphs`, the loaded ones by name
    describe : the device, for the status

    Raises UnsupportedByMax with the reason while there is none.
    """
    refuse_after_fork()
    wanted = keys[0].digest, device
    found = _engines.get(wanted)
    if found is not None:
        return found
    if wanted in _unloadable:
        raise UnsupportedByMax(_unloadable[wanted])
    try:
        key, state = compilation.ensure_first(keys, settings.cache_dir, settings.compile)
        instead = f" in place of another: {state.reason}" if state.ready and state.reason else ""
        report.set_artifact(f"{state.name}{instead}")
        if not state.ready:
            raise UnsupportedByMax(state.reason)
        with _guard:
            if wanted not in _engines:
                compiled = artifacts.read(key, settings.cache_dir)
                if compiled is None:
                    raise UnsupportedByMax(f"the graphs of {key.label} could not be read")
                with _remembered(wanted, key):
                    _engines[wanted] = load(compiled)
                report.set_device(describe(key))
            return _engines[wanted]
    except CacheRefused as refused:
        raise UnsupportedByMax(str(refused)) from refused


@contextmanager
def _remembered(wanted: tuple[str, str], key: ArtifactKey) -> Iterator[None]:
    """What fails inside is not tried at every call: it takes time, and would end the same way."""
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as error:
        if not report.is_of_max(error):
            raise
        reason = f"MAX could not load {key.label}: {error}"
        if not report.tells_of_memory(error):  # there may be enough another time
            _unloadable[wanted] = reason
        raise UnsupportedByMax(reason) from error
