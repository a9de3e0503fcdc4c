"""Imports MAX, which everything here is about to do, in half of the time and without side effects.

The import makes so many objects that Python's garbage collector looks through all there are, those
of PyTorch and openai-whisper among them: 0.12 s of 0.24, and nothing of it is garbage. It is kept
from that meanwhile, and then told that all of this has been there for long.

The import also sets variables of the environment by which transformers says less. They are for
whoever imports that, now or in a child process.

It enters a context of the thread that imports, to be left when the main thread ends the process:
where that is another thread, it has to be entered there first.

A session of MAX's lets SIGUSR2 print all threads' stacks, in place of a handler that the program
may have for that signal. `without_signal_handler` keeps it from that.
"""

import atexit
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace

_QUIET = ("TRANSFORMERS_VERBOSITY", "TRANSFORMERS_NO_ADVISORY_WARNINGS")
_unset = [name for name in _QUIET if name not in os.environ]
_was_enabled = gc.isenabled()
gc.disable()
try:
    import max.driver
    import max.engine.api
finally:
    for _name in _unset:
        os.environ.pop(_name, None)
    if not gc.get_freeze_count():  # or somebody keeps objects from it for good
        gc.freeze()
        gc.unfreeze()
    if _was_enabled:
        gc.enable()

if threading.current_thread() is not threading.main_thread():
    with suppress(ImportError):  # without that name, MAX has no such context to leave
        from max._mlir_context import _DEFAULT_MLIR_CONTEXT

        # What is registered last runs first.
        atexit.register(_DEFAULT_MLIR_CONTEXT.__enter__)


@contextmanager
def without_signal_handler() -> Iterator[None]:
    """For making a session of MAX's. One thread at a time."""
    faulthandler = max.engine.api.faulthandler
    max.engine.api.faulthandler = SimpleNamespace(register=lambda *_, **__: None)
    try:
        yield
    finally:
        max.engine.api.faulthandler = faulthandler
