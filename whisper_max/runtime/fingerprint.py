"""What an artifact is valid for, apart from the model: the engine, our sources and the CPU.

A MEF is machine code that calls into one engine build and was compiled for one CPU. When any of
this changes, artifacts get other names, and those of before are no longer found.
"""

from __future__ import annotations

import hashlib
import platform
import re
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from .hardware import cpu_flags

PACKAGE = Path(__file__).resolve().parents[1]
ENGINE_DISTRIBUTIONS = ("max", "max-core", "max-mojo-libs", "mojo-compiler")
# The features that code generation looks at; cpuinfo also lists mitigations of the running Linux.
INSTRUCTION_SETS = re.compile(
    "sse|ssse|pni|avx|amx|fma|f16c|bmi|abm|popcnt|movbe|movdir|adx|aes|vaes|pclmul|vpclmul|gfni|sha"
    "|fp|asimd|sve|i8mm|bf16|atomics|crc32"
)


@lru_cache(maxsize=1)
def fingerprint() -> dict[str, str]:
    """Names and values of everything outside the key that an artifact depends on; json-able."""
    return {
        "whisper_max": _version("whisper_max"),
        "sources": f"{graphs_digest()}-{kernels_digest()}",
        "engine": engine_build(),
        "cpu": cpu_target(),
    }


def graphs_digest() -> str:
    """A digest of the Python sources that build the graphs."""
    return _digest_of_files(PACKAGE / "graphs", "*.py")


def kernels_digest() -> str:
    """A digest of the Mojo sources of the kernels, for CPUs and for GPUs."""
    return _digest_of_files(PACKAGE, "*.mojo")


def engine_build() -> str:
    """The versions of MAX and Mojo, and the build of the engine's library.

    Raises importlib.metadata.PackageNotFoundError when MAX is not installed.
    """
    versions = [f"{name}={_version(name)}" for name in ENGINE_DISTRIBUTIONS]
    library = metadata.distribution("max").locate_file("modular/lib/libmax.so")
    try:
        with open(library, "rb") as file:
            # The linker's build id is in the first page, whatever the object format.
            versions.append("libmax=" + hashlib.sha256(file.read(4096)).hexdigest()[:16])
    except OSError:  # laid out otherwise, as by conda: the versions have to do
        pass
    return " ".join(versions)


def cpu_target() -> str:
    """The architecture, and a digest of the instruction sets that compiled code may use."""
    flags = sorted(flag for flag in cpu_flags() if INSTRUCTION_SETS.match(flag))
    return f"{platform.machine()}-{hashlib.sha256(' '.join(flags).encode()).hexdigest()[:16]}"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        if distribution == "max":
            raise
        return "none"


def _digest_of_files(folder: Path, pattern: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob(pattern)):
        for part in (path.relative_to(folder).as_posix().encode(), path.read_bytes()):
            # Lengths first, so that no two sets of files run together to the same bytes.
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]
