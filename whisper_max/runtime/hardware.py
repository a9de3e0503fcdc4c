"""What this CPU can do: the feature level that kernels are chosen by, and its description."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

from ..report import is_of_the_system
from ..settings import CPU_LEVELS
from .limits import affinity, available_memory, threads

AVX512_FLAGS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})
AMX_FLAGS = frozenset({"amx_tile", "amx_bf16", "amx_int8"})
CPUINFO = Path("/proc/cpuinfo")

# arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA): Linux hands out the 8 KiB of tile registers on
# request only, and a process that touches them without asking is killed by SIGILL.
_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


def cpu_level(limit: str | None = None) -> str:
    """The feature level to build kernels for: "baseline", "avx512" or "amx".

    limit : a level not to exceed, as in WHISPER_MAX_CPU; it lowers what the CPU has, and never
        raises it

    Raises ValueError when `limit` is no level.
    """
    detected = _detected_level()
    if limit is None:
        return detected
    if limit not in CPU_LEVELS:
        allowed = ", ".join(repr(level) for level in CPU_LEVELS)
        raise ValueError(f"cpu_level is {limit!r}; it must be one of {allowed}")
    return min(detected, limit, key=CPU_LEVELS.index)


def level_of(flags: Collection[str], tiles_granted: bool) -> str:
    """The level of an x86-64 CPU with these /proc/cpuinfo `flags`.

    tiles_granted : whether the kernel lets this process use the AMX tile registers
    """
    if not AVX512_FLAGS.issubset(flags):
        return "baseline"
    return "amx" if tiles_granted and AMX_FLAGS.issubset(flags) else "avx512"


def has_vnni() -> bool:
    """Whether the CPU multiplies int8 in AVX-512 registers (VNNI) and is at "avx512" or above."""
    return _detected_level() != "baseline" and "avx512_vnni" in cpu_flags()


def has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in AVX-512 registers and is at "avx512" or above."""
    return _detected_level() != "baseline" and "avx512_bf16" in cpu_flags()


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """The CPU's features as Linux spells them; empty on other systems."""
    return parse_flags(_cpuinfo())


def parse_flags(cpuinfo: str) -> frozenset[str]:
    """The features that every CPU of a /proc/cpuinfo text has (x86: flags, aarch64: Features)."""
    lines = re.findall(r"^(?:flags|Features)[ \t]*:(.*)$", cpuinfo, flags=re.MULTILINE)
    cores = [frozenset(line.split()) for line in lines] or [frozenset()]
    # Cores of one machine may differ (big.LITTLE): code must run on each of them.
    return frozenset.intersection(*cores)


@lru_cache(maxsize=1)
def cpu_model() -> str:
    """The CPU's name as its maker gives it, or the architecture where there is none."""
    name = re.search(r"^model name[ \t]*:[ \t]*(.+)$", _cpuinfo(), flags=re.MULTILINE)
    return name.group(1).strip() if name else platform.processor() or platform.machine()


def describe() -> dict[str, str | int | bool | None]:
    """The machine, for benchmark results and for `whisper-max doctor`; json-able."""
    memory = available_memory()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu_model": cpu_model(),
        "cpu_level": cpu_level(),
        "vnni": has_vnni(),
        "bf16": has_bf16(),
        "cpus": os.cpu_count(),
        "affinity": affinity(),
        "threads": threads(),
        "memory_available_mib": None if memory is None else memory >> 20,
    }


@lru_cache(maxsize=1)
def _detected_level() -> str:
    if not (sys.platform == "linux" and platform.machine() == "x86_64"):
        return "baseline"
    flags = cpu_flags()
    return level_of(flags, tiles_granted=AMX_FLAGS.issubset(flags) and _request_tiles())


def _request_tiles() -> bool:
    """Ask Linux for the AMX tile registers, for this process and those forked from it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    arguments = (_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
    return libc.syscall(*(ctypes.c_long(argument) for argument in arguments)) == 0


@lru_cache(maxsize=1)
def _cpuinfo() -> str:
    try:
        return CPUINFO.read_text(errors="replace")
    except OSError as error:  # not Linux, or /proc is not mounted
        if not is_of_the_system(error):
            raise
        return ""
