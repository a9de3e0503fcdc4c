"""The kernels for AMX, their machine code run by amx_emulator.c where the CPU has none.

Each test runs others of this folder in a process of its own, which takes the CPU for one with AMX.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness import run_python, run_tests
from whisper_max.runtime import hardware

HERE = Path(__file__).parent
HAS_AVX512 = hardware.cpu_level() != "baseline" and hardware.has_bf16() and hardware.has_vnni()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (sys.platform == "linux" and platform.machine() == "x86_64" and HAS_AVX512),
        reason="the emulator needs Linux on a CPU with AVX-512, VNNI and bfloat16",
    ),
    pytest.mark.skipif(hardware.cpu_level() == "amx", reason="the other tests use the tiles here"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler, cc"),
]

# No shapes that take long: an emulated instruction takes microseconds.
SELECTIONS = {
    "kernels": ["test_kernels.py"],
    "transcription": [
        "test_transcription.py::test_recording[en02-greedy]",
        "test_transcription.py::test_recording[en03-word timestamps]",
    ],
}
LONG_SELECTIONS = {
    "encoder": [
        "test_parity_encoder.py::test_any_shape",
        "test_parity_encoder.py::test_official_widths[512]",
        "test_parity_encoder.py::test_whole_window_of_the_checkpoint[1.0]",
    ],
    "logits": ["test_parity_decoder.py"],
    "further transcription": [
        "test_transcription.py::test_recording[de01-greedy]",
        "test_transcription.py::test_recording[en_long01-greedy]",
    ],
    "reduced precision": ["test_reduced_precision.py::test_encoder"],
}

CHECK = """
from whisper_max import settings
from whisper_max.runtime import artifacts, storage
from whisper_max.runtime.tile_check import check_tiles
key = storage.keys_of(storage.arithmetic_of("high", exact=True))[0]
assert key.cpu_level == "amx"
check_tiles(artifacts.find(key, settings.active().cache_dir), dict(key.options))
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Variables that make the CPU one with emulated AMX."""
    library = tmp_path_factory.mktemp("amx") / "libamx_emulator.so"
    flags = ["-O2", "-Wall", "-Werror", "-mavx512f", "-shared", "-fPIC"]
    command = ["cc", *flags, "-o", str(library), str(HERE / "amx_emulator.c"), "-ldl"]
    subprocess.run(command, check=True)

    return {"LD_PRELOAD": str(library), "AMX_EMULATOR": "", "WHISPER_MAX_CPU": None}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_emulated(emulated, selection):
    check_emulated(emulated, SELECTIONS[selection])


@pytest.mark.long
@pytest.mark.parametrize("selection", LONG_SELECTIONS)
def test_more_emulated(emulated, selection):
    check_emulated(emulated, LONG_SELECTIONS[selection])


def check_emulated(emulated, tests):
    """Run tests of this folder on tiles; fail unless they pass, and used tiles."""
    told = run_tests(*tests, **emulated)
    assert "amx_emulator: executed" in told, told


def test_wrong_sums_are_found_by_the_check(emulated):
    done = run_python("-c", CHECK, **emulated)
    assert done.returncode == 0, done.stdout
    done = run_python("-c", CHECK, **{**emulated, "AMX_EMULATOR": "wrong"})
    assert done.returncode == 1 and "its tile kernels are off by" in done.stdout, done.stdout


def test_no_tiles_where_linux_refuses_them(emulated):
    program = (
        "from whisper_max.runtime import hardware, storage; print(hardware.cpu_level(), "
        "[key.cpu_level for key in storage.keys_of(storage.arithmetic_of('high', True))])"
    )
    assert run_python("-c", program, **emulated).stdout == "amx ['amx', 'avx512']\n"
    refusing = {**emulated, "AMX_EMULATOR": "refuse"}
    assert run_python("-c", program, **refusing).stdout == "avx512 ['avx512']\n"
