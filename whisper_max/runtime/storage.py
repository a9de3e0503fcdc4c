"""How a precision holds and multiplies numbers, and which artifact does. No MAX, no torch here."""

from __future__ import annotations

from typing import NamedTuple

from . import hardware
from .artifact_key import ArtifactKey


class Arithmetic(NamedTuple):
    """Names of dtypes.

    weight : that the weights are held in
    cross : that the cross-attention keys and values are held in
    product : that the linear layers multiply many rows in, where the CPU has instructions for it
    attention : that the encoder's attention multiplies in, likewise
    """

    weight: str
    cross: str
    product: str
    attention: str


def arithmetic_of(precision: str, exact: bool) -> Arithmetic:
    """What a precision means.

    exact : whether float16 holds every weight exactly, as those of the official models
    """
    if precision == "int8":
        return Arithmetic("int8", "float16", "int8", "bfloat16")
    if precision == "medium":
        return Arithmetic("float16", "float16", "bfloat16", "bfloat16")
    return Arithmetic("float16" if exact else "float32", "float32", "float32", "float32")


def key_of(arithmetic: Arithmetic, cpu_level: str | None = None) -> ArtifactKey:
    """The artifact for this arithmetic on this machine: one for all model sizes.

    cpu_level : not to be exceeded, see `hardware.cpu_level`
    """
    # The kernels for AVX-512 serve CPUs with tiles too: there are none for tiles yet.
    level = hardware.cpu_level("avx512" if cpu_level in (None, "amx") else cpu_level)
    weight, cross, product, attention = arithmetic
    options = {
        "weight": weight,
        "cross": cross,
        "product": _at_hand(product, level),
        "attention": _at_hand(attention, level),
    }
    return ArtifactKey(
        label=f"whisper-{weight}-{cross}-{level}",
        builder="whisper_max.graphs.build:build",
        options=tuple(sorted(options.items())),
        device="cpu",
        cpu_level=level,
    )


def _at_hand(product: str, level: str) -> str:
    """The dtype to multiply in: float32 where there are no instructions for the one wanted."""
    instructions = {"int8": hardware.has_vnni, "bfloat16": hardware.has_bf16}
    if product == "float32" or (level != "baseline" and instructions[product]()):
        return product
    return "float32"
