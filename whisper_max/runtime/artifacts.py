"""Compiled graphs on disk: how they are found, checked and stored.

An artifact is two files in the cache folder: `<label>-<digest>.mef`, which MAX reads, and
`<label>-<digest>.json`, its record: the key in readable form, the size and the sha256 of the MEF.
A MEF that does not agree with its record is removed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from .. import report
from .artifact_key import ArtifactKey
from .cache_folder import lock, open_cache, publish, read_json, read_private
from .cache_folder import size_of, write_json
from .fingerprint import fingerprint

if TYPE_CHECKING:
    from max.engine import CompiledModel

logger = logging.getLogger("whisper_max")

ENGINE_CACHE = "modular"  # MAX's own cache and scratch files, inside our folder
RETRY_AFTER_SECONDS = 24 * 60 * 60  # a failed compile is not tried again before that


def find(key: ArtifactKey, cache_dir: str | os.PathLike[str]) -> Path | None:
    """The artifact's MEF, or None. A damaged one is removed, with a warning.

    Cheap (no file is read but the record); `read` checks the contents.
    Raises CacheRefused when the folder may not be trusted.
    """
    folder = open_cache(cache_dir)
    if folder is None:
        return None
    path = folder / f"{key.stem}.mef"
    if not os.path.lexists(path):
        return None
    record = read_json(path.with_suffix(".json"))
    if record is None or record.get("digest") != key.digest:
        return _discard(path, "its record is missing or damaged")
    if size_of(path) != record.get("size"):
        return _discard(path, "its size is not the recorded one")
    return path


def read(key: ArtifactKey, cache_dir: str | os.PathLike[str]) -> CompiledModel | None:
    """The artifact as MAX has it, to be given weights; None when there is none that can be used.

    A damaged or foreign file is removed, with a warning, so that it is compiled again.
    Raises CacheRefused when the folder may not be trusted.
    """
    path = find(key, cache_dir)
    if path is None:
        return None
    record = read_json(path.with_suffix(".json")) or {}
    try:
        content = read_private(path)
    except OSError as error:
        if not report.is_of_the_system(error):
            raise
        return _discard(path, f"it cannot be read ({error.strerror})")
    if hashlib.sha256(content).hexdigest() != record.get("sha256"):
        return _discard(path, "its bytes are not those that were written")

    from max import engine

    try:
        # The bytes that were checked, not the path: the file may be exchanged in between.
        return engine.read(BytesIO(content))
    except RuntimeError as error:  # what MAX raises for every file that it does not understand
        if not report.is_of_max(error):
            raise
        return _discard(path, f"MAX cannot read it ({error})")


def store(
    key: ArtifactKey, folder: Path, mef: Path, seconds: float, peak_memory_bytes: int
) -> Path:
    """Move a finished MEF into the cache folder; the caller holds the artifact's lock.

    mef : the file, on the same disk as `folder`
    Raises OSError, such as on a full disk; the artifact is then not there.
    """
    content = mef.read_bytes()
    path = folder / f"{key.stem}.mef"
    record = {
        "key": key.to_dict(),
        "digest": key.digest,
        "fingerprint": fingerprint(),
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "created": time.time(),
        "compile_seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory_bytes,
    }
    # The MEF last: it is the one that is looked for.
    write_json(path.with_suffix(".json"), record)
    publish(mef, path)
    failure_path(key, folder).unlink(missing_ok=True)
    return path


def failure_path(key: ArtifactKey, folder: Path) -> Path:
    """Where the failure of this artifact's last compile is recorded."""
    return folder / f"{key.stem}.failed.json"


def failure(key: ArtifactKey, folder: Path) -> dict | None:
    """The record of a compile that failed not long ago (`RETRY_AFTER_SECONDS`), or None."""
    record = read_json(failure_path(key, folder))
    if record is None or not 0 <= time.time() - record.get("time", 0) < RETRY_AFTER_SECONDS:
        return None
    return record


def compile_seconds(key: ArtifactKey, folder: Path) -> float | None:
    """How long the last compile of a graph like this one took in this cache, None if unknown."""
    kind = (key.builder, key.device)
    best = (0.0, None)
    for path in folder.glob("*.json"):
        record = read_json(path) or {}
        made = record.get("key", {})
        if "compile_seconds" in record and (made.get("builder"), made.get("device")) == kind:
            best = max(best, (record["created"], record["compile_seconds"]))
    return best[1]


def _discard(path: Path, why: str) -> None:
    try:
        with lock(path.with_suffix(".lock"), wait=False) as held:
            # Otherwise it is just being written anew, or another process has removed it.
            if held and os.path.lexists(path):
                logger.warning("removed the compiled graph %s: %s", path, why)
                path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot use the compiled graph %s: %s; remove it (%s)", path, why, error)
