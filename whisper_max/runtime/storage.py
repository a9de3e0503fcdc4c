"""How a precision holds and multiplies numbers, and which artifact does. No MAX, no torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..settings import PRECISIONS
from . import hardware
from .artifact_key import ArtifactKey

BUILDER = "whisper_max.graphs.build:build"


class Arithmetic(NamedTuple):
    """Names of dtypes, and whether products may be made in matrix tiles.

    weight : that the weights are held in
    cross : that the cross-attention keys and values are held in
    product : that the linear layers multiply many rows in, where the CPU has instructions for it
    attention : that the encoder's attention multiplies in, likewise
    tiles : whether matrix tiles may multiply many rows, where the CPU has them: float32 is then
        made of three products of bfloat16, which loses 2^-16
    """

    weight: str
    cross: str
    product: str
    attention: str
    tiles: bool


def arithmetic_of(precision: str, exact: bool) -> Arithmetic:
    """What a precision means.

    exact : whether float16 holds every weight exactly, as those of the official models
    """
    if precision == "int8":
        return Arithmetic("int8", "float16", "int8", "bfloat16", True)
    if precision == "medium":
        return Arithmetic("float16", "float16", "bfloat16", "bfloat16", True)
    weight = "float16" if exact else "float32"
    return Arithmetic(weight, "float32", "float32", "float32", precision == "high")


def precisions_of(options: Mapping[str, str], cpu_level: str) -> list[str]:
    """The precisions that an artifact serves.

    options, cpu_level : of its key
    """
    served = (options.get("weight"), options.get("cross"))
    return [
        precision
        for precision in PRECISIONS
        if any(arithmetic_of(precision, exact)[:2] == served for exact in (True, False))
        and not (precision == "highest" and cpu_level == "amx")  # which does without tiles
    ]


def keys_of(arithmetic: Arithmetic, cpu_level: str | None = None) -> tuple[ArtifactKey, ...]:
    """The artifact for this arithmetic on this machine, and what to use where that one fails.

    cpu_level : not to be exceeded, see `hardware.cpu_level`. An artifact of level "amx" needs the
        tile registers, which Linux has then granted to this process.
    """
    level = hardware.cpu_level(cpu_level)
    if level != "amx":
        levels = (level,)
    else:
        levels = ("amx", "avx512") if arithmetic.tiles else ("avx512",)
    return tuple(_key_at(level, arithmetic) for level in levels)


def _key_at(level: str, arithmetic: Arithmetic) -> ArtifactKey:
    weight, cross, product, attention, _ = arithmetic
    options = {
        "weight": weight,
        "cross": cross,
        "product": _at_hand(product, level),
        "attention": _at_hand(attention, level),
    }
    return ArtifactKey(
        label=f"whisper-{weight}-{cross}-{level}",
        builder=BUILDER,
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
