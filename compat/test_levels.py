"""The parity tests once more, with the kernels for older CPUs than this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from whisper_max import settings
from whisper_max.runtime import hardware

HERE = Path(__file__).parent
LEVEL = hardware.cpu_level(settings.active().cpu_level)
LOWER = settings.CPU_LEVELS[: settings.CPU_LEVELS.index(LEVEL)]
TESTS = [
    "test_kernels.py",
    "test_parity_encoder.py",
    "test_parity_decoder.py",
    "test_parity_scores.py",
    "test_transcription.py",
]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("level", LOWER or [pytest.param("none", marks=pytest.mark.skip)])
def test_parity_at_a_lower_level(level):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS],
        cwd=HERE,
        env={**os.environ, "WHISPER_MAX_CPU": level},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
