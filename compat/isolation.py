"""For both suites: each test begins unpatched, and none falls back to PyTorch unseen.

    from isolation import no_silent_fallback, unpatched  # noqa: F401
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import pytest
import torch

from whisper_max import activation, live_models, patching, report, settings


@contextmanager
def pytorch_threads(count: int) -> Iterator[None]:
    """PyTorch computes with so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def busy_cpus(call: Callable[[], object]) -> float:
    """How many CPUs this process keeps busy during a call, on average of some."""
    call()
    time.sleep(0.2)  # threads still wait for more of what was done before, without sleeping
    elapsed, computed = time.perf_counter(), time.process_time()
    while time.perf_counter() < elapsed + 0.5:
        call()
    return (time.process_time() - computed) / (time.perf_counter() - elapsed)


@pytest.fixture(autouse=True)
def unpatched():
    """Nothing patched or accelerated, settings of the environment, counters at zero."""
    report.reset()
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the test itself has put into upstream's place
        patching.unpatch()
    settings.activate(None)
    live_models.restore_all()
    activation.released.clear()
    report.reset()


@pytest.fixture(autouse=True)
def no_silent_fallback(request, unpatched):
    """A call that PyTorch served fails the test, unless it is marked with `allow_fallback`."""
    yield
    if request.node.get_closest_marker("allow_fallback") is None:
        fallen = {
            target: counted.reasons
            for target, counted in report.status().targets.items()
            if counted.torch_calls
        }
        assert not fallen, f"PyTorch served calls that MAX should have: {fallen}"


def raise_in(module: str, error: Exception) -> NoReturn:
    """Raises it as code of a module of this name does, as MAX's own: "max.engine.api"."""
    exec("raise error", {"__name__": module, "error": error})
