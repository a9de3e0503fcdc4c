"""The garbage collector, while MAX is imported and afterwards."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("max.engine")

PROGRAM = """
import gc, json
objects = [[] for _ in range(50_000)]
gc.collect()
{before}
passes = gc.get_stats()[2]["collections"]
import {imported}
more = [[] for _ in range(20_000)]
passes = gc.get_stats()[2]["collections"] - passes
print(json.dumps([passes, gc.isenabled(), gc.get_freeze_count()]))
"""


def after(imported, before=""):
    """Full passes of the collector, whether it is enabled, and what it leaves out for good."""
    program = PROGRAM.format(before=before, imported=imported)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_is_collected_while_max_is_imported():
    assert after("max.driver, max.engine")[0] > 0  # what this is about
    assert after("whisper_max.runtime.load_max") == [0, True, 0]


def test_what_max_tells_transformers_is_not_left_in_the_environment():
    program = """
import json, os
os.environ.pop("TRANSFORMERS_VERBOSITY", None)
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "0"
import whisper_max.runtime.load_max
print(json.dumps([v for k, v in os.environ.items() if k.startswith("TRANSFORMERS_")]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == ["0"]


def test_a_collector_that_is_switched_off_stays_so():
    assert after("whisper_max.runtime.load_max", "gc.disable()") == [0, False, 0]


def test_what_others_keep_from_the_collector_stays_kept():
    passes, enabled, frozen = after("whisper_max.runtime.load_max", "gc.freeze()")
    assert enabled and frozen > 50_000


def test_names_of_max_that_are_private_are_there():
    """In the release that setup.cfg asks for. Without them MAX goes on, with more to do."""
    import max.engine.api
    from max._mlir_context import _DEFAULT_MLIR_CONTEXT

    assert callable(max.engine.Model._execute_device_tensors)
    assert callable(_DEFAULT_MLIR_CONTEXT.__enter__)
    assert callable(max.engine.api.faulthandler.register)


def test_a_signal_handler_while_max_is_imported():
    """One that raises stops that import, not the next one; one that decodes has to do without."""
    program = """
import sys

class Alarm:
    handlers = []
    def find_spec(self, name, path=None, target=None):
        if name == "max" and self.handlers:
            self.handlers.pop(0)()

def decode():
    try:
        first_use.runtime()
    except UnsupportedByMax as refused:
        print(refused)

def stop():
    raise TimeoutError("time is over")

from whisper_max import first_use
from whisper_max.conditions import UnsupportedByMax

sys.meta_path.insert(0, Alarm())
Alarm.handlers += [stop, decode]
for _ in range(2):
    try:
        print(first_use.runtime().__name__)
    except TimeoutError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "time is over",
        "a signal's handler decodes while MAX is being imported",
        "whisper_max.runtime.by_device",
    ]
