"""Compiles the graphs for GPUs that need not be there, and says how it went."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from whisper_max import settings
from whisper_max.dimensions_of import dimensions_of
from whisper_max.runtime import artifacts, compilation
from whisper_max.runtime.artifact_key import ArtifactKey

LIMIT_SECONDS = 60 * 60.0
COLUMNS = "{:<10} {:<9} {:<7} {:<9} {:>7}  {}"


@dataclass(frozen=True)
class Compiled:
    """How one compile ended.

    part : of the model, "encoder" or "decoder"
    seconds : how long it took, when it was made; None for a failure
    size : of the artifact in bytes; None for a failure
    """

    key: ArtifactKey
    model: str
    part: str
    seconds: float | None = None
    size: int | None = None
    error: str = ""

    def line(self) -> str:
        """Of the table."""
        where = self.key.device.partition(":")[2]
        dtype = dict(self.key.options)["dtype"]
        end = self.error or f"{self.size / 2**20:.1f} MiB"
        seconds = "-" if self.seconds is None else f"{self.seconds:.0f}"
        return COLUMNS.format(self.model, self.part, where, dtype, seconds, end)


def run(
    models: Sequence[str],
    architectures: Sequence[str],
    dtypes: Sequence[str],
    say: Callable[[str], None],
) -> int:
    """Compiles one after the other, each in a process of its own; the number of failures.

    models : official names; what is in the cache already is not compiled again
    say : takes one line of the table at a time
    """
    cache = settings.active().cache_dir
    say(COLUMNS.format("model", "graph", "arch", "dtype", "seconds", "artifact"))
    failures = 0
    for key, model, part in keys(models, architectures, dtypes):
        compiled = one(key, model, part, cache)
        failures += bool(compiled.error)
        say(compiled.line())
    return failures


def keys(
    models: Sequence[str], architectures: Sequence[str], dtypes: Sequence[str]
) -> Iterator[tuple[ArtifactKey, str, str]]:
    """The artifacts that models on such GPUs load, each with its model and part."""
    from whisper_max.runtime.gpu.state import keys_of

    level = settings.active().cpu_level
    for model in models:
        dimensions = dimensions_of(model)
        for dtype in dtypes:
            for architecture in architectures:
                found = keys_of(dimensions, dtype, f"cuda:{architecture}", level)
                for part, key in found.items():
                    yield key, model, part


def one(
    key: ArtifactKey, model: str, part: str, cache: str | os.PathLike[str]
) -> Compiled:
    """The artifact of a key, compiled if it is not there."""
    state = compilation.ensure(
        key, cache, "blocking", progress=False, force=True, limit_seconds=LIMIT_SECONDS
    )
    path = artifacts.find(key, cache) if state.ready else None
    if path is None:
        return Compiled(key, model, part, error=state.reason)
    record = json.loads(Path(path).with_suffix(".json").read_text(encoding="utf-8"))
    return Compiled(key, model, part, record["compile_seconds"], record["size"])
