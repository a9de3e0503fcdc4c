"""The peers as data: who takes part, what each needs, and why one does not."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from types import MappingProxyType

from .interface import Peer, Setup

BASELINE = "whisper"
OURS = "whisper_max"

# As Linux spells them: Intel and AMD, Intel's tiles, Arm.
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True)
class Entry:
    """One peer.

    name : in results and options
    label : in tables and plots
    home : "module:class" in this package, imported in the peer's own process only
    requires : modules that must be installed
    variant : handed to the class
    arithmetic : what it multiplies the encoder's matrices in: "float32", "bfloat16" or "int8"
    weight_bytes, cross_bytes : how it holds the decoder's weights, and keys and values of cross
        attention, per number; for the bytes that a step must read
    bfloat16 : whether it needs a CPU that multiplies bfloat16
    fresh : whether it takes part where every run is in a fresh process
    compiles_long : whether it compiles for minutes for each model; it then takes part only with
        random weights
    """

    name: str
    label: str
    home: str
    requires: tuple[str, ...]
    variant: str = ""
    arithmetic: str = "float32"
    weight_bytes: int = 4
    cross_bytes: int = 4
    bfloat16: bool = False
    fresh: bool = False
    compiles_long: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is whisper_max."""
        return self.name.startswith(OURS)

    def load(self, setup: Setup) -> Peer:
        """The peer, in this process."""
        module, _, name = self.home.partition(":")
        return getattr(importlib.import_module(f".{module}", __name__), name)(setup)

    def why_absent(self, cpu_flags: Collection[str]) -> str:
        """Why it cannot take part on this machine, "" when it can. Imports nothing.

        cpu_flags : the CPU's features
        """
        missing = [name for name in self.requires if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if self.bfloat16 and BFLOAT16_FLAGS.isdisjoint(cpu_flags):
            return "this CPU does not multiply bfloat16: it would be emulated"
        return ""


def _whisper_max(
    precision: str, arithmetic: str, weight_bytes: int, cross_bytes: int, fresh: bool
) -> Entry:
    return Entry(
        f"{OURS}-{precision}",
        f"whisper_max {precision}",
        "whisper_max:WhisperMax",
        ("max", "whisper"),
        precision,
        arithmetic,
        weight_bytes,
        cross_bytes,
        fresh=fresh,
    )


_CONVERTED = ("faster_whisper", "ctranslate2", "transformers")  # the last one converts for it

PEERS = (
    Entry(BASELINE, "openai-whisper", "openai_whisper:OpenAIWhisper", ("whisper",), fresh=True),
    _whisper_max("high", "float32", 2, 4, fresh=True),
    _whisper_max("medium", "bfloat16", 2, 2, fresh=False),
    _whisper_max("int8", "int8", 1, 2, fresh=True),
    Entry(
        "torch-compile",
        "torch.compile",
        "torch_compile:TorchCompile",
        ("whisper",),
        compiles_long=True,
    ),
    Entry(
        "torch-bf16",
        "torch bf16 autocast",
        "torch_autocast:TorchAutocast",
        ("whisper",),
        arithmetic="bfloat16",
        weight_bytes=2,
        cross_bytes=2,
        bfloat16=True,
    ),
    Entry(
        "faster-whisper-fp32",
        "faster-whisper fp32",
        "faster_whisper:FasterWhisper",
        _CONVERTED,
        "float32",
    ),
    Entry(
        "faster-whisper-int8",
        "faster-whisper int8",
        "faster_whisper:FasterWhisper",
        _CONVERTED,
        "int8",
        arithmetic="int8",
        weight_bytes=1,
        fresh=True,
    ),
    Entry("openvino-fp32", "OpenVINO fp32", "openvino:OpenVINO", ("openvino", "whisper"), "f32"),
    Entry(
        "openvino-bf16",
        "OpenVINO bf16",
        "openvino:OpenVINO",
        ("openvino", "whisper"),
        "bf16",
        arithmetic="bfloat16",
        bfloat16=True,
    ),
    Entry(
        "transformers",
        "transformers",
        "transformers:Transformers",
        ("transformers",),
        fresh=True,
    ),
)
PEER = MappingProxyType({entry.name: entry for entry in PEERS})
