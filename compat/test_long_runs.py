"""What only long runs and whole processes show: memory, compiles side by side, a read-only home."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import pytest

import whisper_max
from harness import note
from recordings import FOLDER
from whisper_max import settings

PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(whisper_max.__file__).parents[1]
WINDOWS = 500
WARM_UP = 100
EVERY = 20
FEW = 5
"""Samples at either end, of which the median counts: their middles are WINDOWS apart."""

pytestmark = pytest.mark.long


def start(program: str, *arguments: str, launcher: Sequence[str] = (), **environment: str) -> dict:
    """What a program of `programs` prints. Variables given as "" are taken away."""
    known = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [*launcher, sys.executable, str(PROGRAMS / program), *arguments],
        env={name: value for name, value in known.items() if value},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_many_windows_in_one_process(request):
    paths = [str(FOLDER / f"{name}.flac") for name in ("en01", "en02", "es01", "de01", "oov01")]
    count = WARM_UP + WINDOWS + (FEW - 1) * EVERY
    told = start("many_windows.py", str(count), str(EVERY), *paths)
    assert not any(counted["torch_calls"] for counted in told["targets"].values())
    settled = told["seen"][WARM_UP // EVERY - 1 :]
    first, last = (median(one["memory"] for one in few) for few in (settled[:FEW], settled[-FEW:]))
    growth = last / first - 1
    counts = {name: [one[name] for one in settled] for name in ("files", "threads")}
    note(
        request,
        f"{WINDOWS} windows in one process",
        f"memory {first / 1024:.0f} MiB, then {last / 1024:.0f} MiB ({growth:+.2%}); "
        + ", ".join(f"{name} {seen[0]}, then {seen[-1]}" for name, seen in counts.items()),
    )
    assert growth < 0.02, [one["memory"] for one in settled]
    for name, seen in counts.items():
        assert seen[-1] <= seen[0], (name, seen)


def test_two_processes_that_compile_the_same_graphs(request, tmp_path):
    """Both wait for one compile, and both run on what it made."""
    cache = str(tmp_path / "cache")
    with ThreadPoolExecutor() as pool:
        both = [
            pool.submit(
                start, "transcribe.py", WHISPER_MAX_CACHE_DIR=cache, WHISPER_MAX_MODE="strict"
            )
            for _ in range(2)
        ]
        told = [one.result() for one in both]
    assert told[0]["text"] == told[1]["text"]
    files = sorted(path.name for path in Path(cache).iterdir() if path.is_file())
    compiled = [name for name in files if name.endswith(".mef")]
    assert len(compiled) == 1, files
    assert not [name for name in files if "lock" in name or "unfinished" in name], files
    note(request, "two processes compiling at once", "one compile, the same text twice")


@pytest.fixture
def read_only_home(tmp_path) -> tuple[tuple[str, ...], str]:
    """How to start a process with a home that cannot be written to, and that home."""
    home = tmp_path / "home"
    home.mkdir()
    if os.getuid() != 0:
        home.chmod(0o555)
        return (), str(home)
    # Modes do not stop root: a read-only file system does, in a name space of its own.
    mount = f"mount -t tmpfs -o ro,mode=755 none {home} && exec \"$@\""
    launcher = ("unshare", "--mount", "sh", "-c", mount, "sh")
    if shutil.which("unshare") is None or subprocess.run([*launcher, "true"]).returncode:
        pytest.skip("as root this needs unshare and mount")
    return launcher, str(home)


def test_read_only_home(request, read_only_home, plain):
    """PyTorch serves, and the status tells where graphs could be kept instead."""
    launcher, home = read_only_home
    alone = {"HOME": home, "XDG_CACHE_HOME": "", "WHISPER_MAX_CACHE_DIR": "", "MODULAR_HOME": ""}
    told = start("transcribe.py", launcher=launcher, **alone)
    encoder = told["status"]["targets"]["encoder"]
    assert encoder["max_calls"] == 0
    (reason,) = encoder["reasons"]
    assert "cannot be used" in reason
    assert "WHISPER_MAX_CACHE_DIR" in reason
    elsewhere = {**alone, "WHISPER_MAX_CACHE_DIR": str(settings.active().cache_dir)}
    again = start("transcribe.py", launcher=launcher, WHISPER_MAX_MODE="strict", **elsewhere)
    assert again["text"] == told["text"]
    assert again["status"]["targets"]["encoder"]["max_calls"] > 0
    note(request, "a read-only home", "PyTorch, with the reason; MAX with a cache folder elsewhere")
