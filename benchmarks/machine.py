"""What the figures were measured on: the machine, the versions, the sources."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re

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
BUSY = 0.5  # of the load average: more than this beside us, and times are not to be trusted


def describe() -> dict[str, object]:
    """The machine as `whisper_max.runtime.hardware` has it, and how busy it was before."""
    return {**hardware.describe(), "load_average": round(os.getloadavg()[0], 2)}


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


def _version_of_sources() -> str:
    import whisper_max

    digest = hashlib.sha256()
    for path in sorted((ROOT / "whisper_max").rglob("*")):
        if path.suffix in (".py", ".mojo"):
            digest.update(path.read_bytes())
    return f"{whisper_max.__version__} ({digest.hexdigest()[:12]})"
