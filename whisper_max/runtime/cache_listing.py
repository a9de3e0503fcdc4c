"""What `whisper-max cache` shows and clears."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from .artifacts import ENGINE_CACHE
from .cache_folder import is_locked, lock, open_cache, read_json, size_of
from .fingerprint import fingerprint

# All that one artifact may have in the folder: see `artifacts` and `compile_worker`.
_SUFFIXES = (".mef", ".json", ".failed.json", ".lock", ".log", ".work")


@dataclass(frozen=True)
class ArtifactRecord:
    """One line of `whisper-max cache list`.

    state : "ready"; "stale" (made by another version, or for another CPU); "compiling"; "failed";
        "damaged" (a MEF that does not agree with its record)
    size : bytes on disk
    created : seconds since the epoch, of the artifact or of the failure
    key : the fields of the `ArtifactKey`, empty where they cannot be read
    """

    label: str
    state: str
    size: int
    created: float
    compile_seconds: float | None
    peak_memory_bytes: int | None
    key: dict


def list_artifacts(cache_dir: str | os.PathLike[str]) -> list[ArtifactRecord]:
    """All artifacts of the folder, with those that are being compiled or that failed, by name.

    Raises CacheRefused when the folder may not be trusted.
    """
    folder = open_cache(cache_dir)
    return [_describe(folder, stem) for stem in _stems(folder)] if folder else []


def clear(cache_dir: str | os.PathLike[str], *, only_stale: bool = False) -> int:
    """Remove all artifacts, failures, logs and MAX's own cache; the bytes that were freed.

    What is being compiled at the moment stays. Files that are not ours stay.

    only_stale : what can still be used stays, too: artifacts that are ready

    Raises CacheRefused when the folder may not be trusted.
    """
    folder = open_cache(cache_dir)
    if folder is None:
        return 0
    freed, busy = 0, False
    for stem in _stems(folder):
        if only_stale and _describe(folder, stem).state == "ready":
            continue
        with lock(folder / f"{stem}.lock", wait=False) as held:
            busy = busy or not held
            if held:
                freed += sum(_remove(folder / f"{stem}{suffix}") for suffix in _SUFFIXES)
    return freed if busy else freed + _remove(folder / ENGINE_CACHE)


def _describe(folder: Path, stem: str) -> ArtifactRecord:
    record = read_json(folder / f"{stem}.json")
    failed = read_json(folder / f"{stem}.failed.json")
    mef = folder / f"{stem}.mef"
    if is_locked(folder / f"{stem}.lock"):
        state = "compiling"
    elif mef.exists():
        intact = record is not None and size_of(mef) == record.get("size")
        current = intact and record.get("fingerprint") == _fingerprint()
        state = "ready" if current else "stale" if intact else "damaged"
    else:
        state = "failed" if failed else "damaged"
    shown = failed if state == "failed" else record or {}
    return ArtifactRecord(
        label=stem.rpartition("-")[0],
        state=state,
        size=sum(size_of(folder / f"{stem}{suffix}") for suffix in _SUFFIXES),
        created=shown.get("created", shown.get("time", 0.0)),
        compile_seconds=shown.get("compile_seconds"),
        peak_memory_bytes=shown.get("peak_memory_bytes"),
        key=shown.get("key", {}),
    )


def _fingerprint() -> dict[str, str] | None:
    try:
        return fingerprint()
    except PackageNotFoundError:  # no artifact can be used without MAX
        return None


def _stems(folder: Path) -> list[str]:
    pattern = re.compile(r"(.+-[0-9a-f]{16})(?:" + "|".join(map(re.escape, _SUFFIXES)) + ")")
    matches = (pattern.fullmatch(name) for name in os.listdir(folder))
    return sorted({match.group(1) for match in matches if match})


def _remove(path: Path) -> int:
    size = size_of(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return size
