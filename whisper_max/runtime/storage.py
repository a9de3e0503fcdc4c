"""How a precision holds numbers, and which artifact computes with them. Imports neither MAX nor torch."""

from __future__ import annotations

from . import hardware
from .artifact_key import ArtifactKey


def storage_of(precision: str, exact: bool) -> tuple[str, str]:
    """Names of the dtypes of the weights, and of the cross-attention keys and values.

    exact : whether float16 holds every weight exactly, as those of the official models
    """
    if precision == "int8":
        return "int8", "float16"
    if precision == "medium":
        return "float16", "float16"
    return ("float16" if exact else "float32"), "float32"


def key_of(weight: str, cross: str, cpu_level: str | None = None) -> ArtifactKey:
    """The artifact for a storage on this machine: one for all model sizes.

    cpu_level : not to be exceeded, see `hardware.cpu_level`
    """
    # The kernels for AVX-512 serve CPUs with tiles too: there are none for tiles yet.
    level = hardware.cpu_level("avx512" if cpu_level in (None, "amx") else cpu_level)
    return ArtifactKey(
        label=f"whisper-{weight}-{cross}-{level}",
        builder="whisper_max.graphs.build:build",
        options=(("cross", cross), ("weight", weight)),
        device="cpu",
        cpu_level=level,
    )
