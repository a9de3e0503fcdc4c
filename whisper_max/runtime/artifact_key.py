"""What identifies a compiled graph, and the name of its files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from .fingerprint import fingerprint

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class ArtifactKey:
    """Everything that decides what one compile produces, apart from versions, sources and CPU.

    label : a short name for people, such as "whisper-int8-float16-amx"; letters, digits, ".", "_"
        and "-"
    builder : "package.module:function"; the function is called in the compiling process as
        `function(device=…, cpu_level=…, **options)` and returns the `max.graph.Graph` or
        `max.graph.Module` to compile. A Graph stands for all graphs of its module, and brings
        its custom operations along; a Module does not.
    options : the builder's further arguments, as sorted (name, value) pairs of JSON scalars
    device : "cpu", or "cuda:" and the architecture, such as "cuda:sm_90a"
    cpu_level : the feature level that kernels are chosen by, see `hardware.cpu_level`
    """

    label: str
    builder: str
    options: tuple[tuple[str, Scalar], ...]
    device: str
    cpu_level: str

    def __post_init__(self) -> None:
        _check_form("label", self.label, r"\w[\w.-]*", "letters, digits, '.', '_' and '-'")
        _check_form("builder", self.builder, r"[\w.]+:\w+", "'package.module:function'")
        _check_form("device", self.device, r"cpu|cuda:sm_\w+", "'cpu' or 'cuda:sm_…'")
        pairs = dict(self.options)
        for name, value in pairs.items():
            if not isinstance(value, (str, int, float, bool, type(None))):
                raise TypeError(f"option {name} is {value!r}; artifact options are JSON scalars")
        object.__setattr__(self, "options", tuple(sorted(pairs.items())))

    @cached_property
    def digest(self) -> str:
        """sha256 of the key together with `fingerprint()`; the label is not part of it."""
        content = {**self.to_dict(), "fingerprint": fingerprint()}
        del content["label"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def stem(self) -> str:
        """The name that all files of this artifact begin with."""
        return f"{self.label}-{self.digest[:16]}"

    def to_dict(self) -> dict:
        """The fields as JSON has them."""
        return {
            "label": self.label,
            "builder": self.builder,
            "options": dict(self.options),
            "device": self.device,
            "cpu_level": self.cpu_level,
        }

    @classmethod
    def from_dict(cls, content: Mapping) -> ArtifactKey:
        """The key of `to_dict`."""
        return cls(**{**content, "options": tuple(content["options"].items())})


def _check_form(name: str, value: str, pattern: str, form: str) -> None:
    if not re.fullmatch(pattern, value, flags=re.ASCII):
        raise ValueError(f"artifact {name} is {value!r}; it must have the form {form}")
