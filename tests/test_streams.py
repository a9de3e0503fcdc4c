"""benchmarks/streams.mojo, which times the kernels of a decoding step alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOJO = Path(sys.executable).with_name("mojo")


@pytest.mark.skipif(not MOJO.exists(), reason="there is no Mojo compiler beside Python")
def test_it_runs_with_the_kernels_as_they_are():
    defined = ["-D", "megabytes=8", "-D", "passes=1"]
    command = [MOJO, "run", *defined, "-I", "whisper_max", "benchmarks/streams.mojo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[2] for line in lines[:6]] == ["1", "2", "3", "4", "5", "10"]
    for line in lines:
        rates = [float(rate) for rate in re.findall(r"([\d.]+) GB/s", line)]
        assert len(rates) == 3 and min(rates) > 0
