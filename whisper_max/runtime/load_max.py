"""Imports MAX, which everything here is about to do, in half of the time.

The import makes so many objects that Python's garbage collector looks through all there are, those
of PyTorch and openai-whisper among them: 0.12 s of 0.24, and nothing of it is garbage. It is kept
from that meanwhile, and then told that all of this has been there for long.

The import also sets variables of the environment by which transformers says less. They are for
whoever imports that, now or in a child process.
"""

import gc
import os

_QUIET = ("TRANSFORMERS_VERBOSITY", "TRANSFORMERS_NO_ADVISORY_WARNINGS")
_unset = [name for name in _QUIET if name not in os.environ]
_was_enabled = gc.isenabled()
gc.disable()
try:
    import max.driver
    import max.engine  # noqa: F401
finally:
    for _name in _unset:
        os.environ.pop(_name, None)
    if not gc.get_freeze_count():  # or somebody keeps objects from it for good
        gc.freeze()
        gc.unfreeze()
    if _was_enabled:
        gc.enable()
