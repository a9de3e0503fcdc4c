"""The engine of a precision, as soon as its artifact is there."""

from __future__ import annotations

import logging
import os
import threading

from .. import report
from ..conditions import UnsupportedByMax
from ..settings import Settings
from . import artifacts, compilation, hardware
from .cache_folder import CacheRefused
from .engine import Engine
from .storage import Arithmetic, keys_of

logger = logging.getLogger("whisper_max")

_engines: dict[str, Engine] = {}
_guard = threading.Lock()
_process = os.getpid()


def refuse_after_fork() -> None:
    """Raises UnsupportedByMax in a process forked from the one that imported this."""
    if os.getpid() != _process:
        raise UnsupportedByMax("this process was forked: MAX does not survive a fork")


def engine(arithmetic: Arithmetic, settings: Settings) -> Engine:
    """The loaded engine of an arithmetic. Compiles, waits or does neither, as the settings say.

    Raises UnsupportedByMax with the reason while there is none.
    """
    refuse_after_fork()
    keys = keys_of(arithmetic, settings.cpu_level)
    wanted = keys[0].digest
    found = _engines.get(wanted)
    if found is not None:
        return found
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
                _engines[wanted] = Engine(compiled)
                report.set_device(f"cpu ({key.cpu_level}, {hardware.cpu_model()})")
            return _engines[wanted]
    except CacheRefused as refused:
        raise UnsupportedByMax(str(refused)) from refused

