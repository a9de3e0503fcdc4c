"""The parity tests once more, with the kernels for older CPUs than this one."""

from __future__ import annotations

import pytest

from harness import run_tests
from whisper_max import settings
from whisper_max.runtime import hardware

LEVEL = hardware.cpu_level(settings.active().cpu_level)
NONE = pytest.param("none", marks=pytest.mark.skip(reason="this CPU has no lower level"))
LOWER = settings.CPU_LEVELS[: settings.CPU_LEVELS.index(LEVEL)]
TESTS = [
    "test_kernels.py",
    "test_parity_encoder.py",
    "test_parity_decoder.py",
    "test_parity_scores.py",
    "test_transcription.py",
]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("level", LOWER or [NONE])
def test_parity_at_a_lower_level(level):
    run_tests(*TESTS, WHISPER_MAX_CPU=level)
