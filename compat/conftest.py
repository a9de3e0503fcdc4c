"""Hypothesis profiles, and what every parity test stands on: graphs compiled once, two models.

Choose a profile with the environment variable HYPOTHESIS_PROFILE:
    dev         a few examples, other ones each time
    ci          the default: the same examples each time
    thorough    as many as a night allows
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck

from isolation import no_silent_fallback, unpatched  # noqa: F401

# Before settings are read: without the Makefile, artifacts are kept in the working tree as well.
os.environ.setdefault(
    "WHISPER_MAX_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "whisper_max")
)

_COMMON = {
    "deadline": None,  # the machine may be busy
    # Fixtures here restore the process; an example need not begin as the first one did.
    "suppress_health_check": [
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
}
hypothesis.settings.register_profile("dev", max_examples=10, **_COMMON)
hypothesis.settings.register_profile(
    "ci", max_examples=40, stateful_step_count=20, derandomize=True, database=None, **_COMMON
)
hypothesis.settings.register_profile("thorough", max_examples=2000, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda", "rehearsal"),
        default="cpu",
        help="where tests with the bundled checkpoint run; rehearsal: on the CPU, with the graphs "
        "and the session for GPUs (see docs/gpu.md for the files that it is meant for)",
    )


@pytest.fixture(scope="session", autouse=True)
def compiled(request) -> Iterator[Path | None]:
    """The graphs for both storages of the exact precisions, compiled side by side: their folder.

    Those for GPUs are compiled when they are asked for.
    """
    import harness

    device = request.config.getoption("--device")
    if device == "cpu":
        yield harness.compile_all("high")
    elif device == "rehearsal":
        with harness.rehearsal():
            yield None
    else:
        harness.device = device
        yield None


@pytest.fixture
def strict():
    """whisper patched so that everything runs on MAX, or raises."""
    from harness import on_max

    with on_max():
        yield


@pytest.fixture(params=["high", "highest"])
def precision(request):
    """The same, in each of the precisions that promise unpatched whisper's tokens."""
    from harness import on_max

    with on_max(request.param):
        yield request.param


@pytest.fixture(scope="session")
def plain():
    """The bundled checkpoint on PyTorch; never decode with it while whisper is patched."""
    from harness import load_checkpoint

    return load_checkpoint()


@pytest.fixture(scope="session")
def checkpoint():
    """The bundled checkpoint once more, for the tests to patch, hook and accelerate.

    A test that changes its weights takes a copy.
    """
    from harness import load_checkpoint

    return load_checkpoint()
