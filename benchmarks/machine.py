"""What the figures were measured on: the machine, the versions, the sources."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path

from whisper_max.runtime import hardware

from .places import ROOT

PACKAGES = (
    "openai-whisper",
    "torch",
    "max",
    "faster-whisper",
    "ctranslate2",
    "openvino",
    "transformers",
    "numpy",
)
BUSY = 0.3  # CPUs: when others keep more than this busy, times are not to be trusted
WARNING = "the machine was busy with something else: do not trust the figures"
STAT = Path("/proc/stat")


def describe() -> dict[str, object]:
    """The machine as `whisper_max.runtime.hardware` has it, and how busy it was before."""
    return {**hardware.describe(), "cpu_kind": _cpu_kind(), "busy_cpus": busy_cpus()}


def busy_cpus(seconds: float = 2.0) -> float | None:
    """How many CPUs are busy while this process waits; None where that is not told.

    The load average would count also what waits for something else than a CPU.
    """
    if not STAT.exists():  # not Linux
        return None
    before = _ticks()
    time.sleep(seconds)
    passed = [after - earlier for after, earlier in zip(_ticks(), before)]
    idle = passed[3] + passed[4]  # and waiting for disks
    return round((sum(passed) - idle) / sum(passed) * (os.cpu_count() or 1), 2)


def _ticks() -> list[int]:
    """Of all CPUs since the system started: user, nice, system, idle, iowait, irq, softirq, steal.

    Time of guests, further on, is part of the user's.
    """
    return [int(field) for field in STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]


def _cpu_kind() -> str | None:
    """What tells one generation from another where the name does not, as in a virtual machine."""
    if not hardware.CPUINFO.exists():  # not Linux
        return None
    text = hardware.CPUINFO.read_text(errors="replace")
    names = ("vendor_id", "cpu family", "model")
    found = [re.search(rf"^{name}\s*: (.+)$", text, re.MULTILINE) for name in names]
    return "{}, family {}, model {}".format(*(m[1] for m in found)) if all(found) else None


def versions() -> dict[str, str]:
    """Installed versions, of what is installed, and a digest of whisper_max's sources."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "whisper_max": _version_of_sources()}


def name_of(machine: dict[str, object]) -> str:
    """A file name for a machine: its CPU and the number of CPUs.

    >>> name_of({"cpu_model": "Intel(R) Xeon(R) CPU @ 2.50GHz", "cpus": 2})
    'intel-xeon-2.50ghz-2cpus'
    """
    words = re.sub(r"\(\w+\)|\bCPU\b|\bProcessor\b", " ", str(machine["cpu_model"]))
    return f"{slug(words)}-{machine['cpus']}cpus"


def slug(words: str) -> str:
    """Words as a part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")


def digest_of_sources() -> str:
    """Of whisper_max's Python and Mojo files: the beginning of a sha256."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "whisper_max").rglob("*")):
        if path.suffix in (".py", ".mojo"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _version_of_sources() -> str:
    import whisper_max

    return f"{whisper_max.__version__}, sources {digest_of_sources()} (sha256)"
