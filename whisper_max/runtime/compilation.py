"""Getting artifacts made: when a compile starts, who waits for it, and what became of it."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..report import is_of_the_system
from ..settings import COMPILE_POLICIES
from .artifact_key import ArtifactKey
from .artifacts import compile_seconds, failure, find
from .cache_folder import is_locked, open_cache
from .compile_worker import CompileJob, log_path
from .fingerprint import PACKAGE, fingerprint
from .limits import available_memory

logger = logging.getLogger("whisper_max")

LIMIT_SECONDS = 60 * 60.0  # in the background, on a busy machine, a compile gets little of the CPU
PATIENCE_SECONDS = 180.0  # for so long a compile in the background only takes what is left over
EXPECTED_SECONDS = 40.0  # what the progress bar goes by before the first compile
NEEDED_MEMORY = 3 << 30  # bytes
NEEDED_DISK = 256 << 20  # bytes
MAX_COMPILER = "whisper_max.runtime.compile_worker:compile_to_mef"
_PROGRESS_SECONDS = 0.25
_BACKGROUND_NICENESS = 19

_guard = threading.RLock()  # so that two threads start one child
# The supervisors that this process started, by digest and cache folder.
_children: dict[tuple[str, Path], subprocess.Popen] = {}
_warned: set[tuple[str, Path]] = set()  # those whose failure has been told
# After a fork they are somebody else's children; the locks in the cache folder still tell.
os.register_at_fork(after_in_child=_children.clear)


@dataclass(frozen=True)
class ArtifactState:
    """Whether an artifact can be used, and if not, why.

    name : "ready", "compiling", "failed" or "missing"
    reason : for the report, with the remedy where there is one; when ready, why it is not an
        artifact that would be better, or empty
    """

    name: str
    reason: str = ""

    @property
    def ready(self) -> bool:
        """Whether `artifacts.read` will find it."""
        return self.name == "ready"


def state(key: ArtifactKey, cache_dir: str | os.PathLike[str]) -> ArtifactState:
    """What there is now. Starts nothing, waits for nothing, and is cheap enough for each window.

    A failure is told once, as a warning with the path of the log.
    Raises CacheRefused when the folder may not be trusted.
    """
    folder = open_cache(cache_dir)
    if folder is not None:
        child = _children.get((key.digest, folder))
        # The child first: had it ended between the two looks, its result would be missed.
        status = child.poll() if child else None
        running = child is not None and status is None
        if find(key, folder):
            return ArtifactState("ready")
        if running or is_locked(folder / f"{key.stem}.lock"):
            return ArtifactState("compiling", f"the graphs of {key.label} are being compiled")
        failed = failure(key, folder)
        if failed is not None:
            return _failed(key, failed["reason"], folder)
        if status:  # and no record: the disk was full, or somebody ended the supervisor
            return _failed(key, f"the compile process ended with status {status}", folder)
    return ArtifactState("missing", f"the graphs of {key.label} are not compiled")


def ensure(
    key: ArtifactKey,
    cache_dir: str | os.PathLike[str],
    policy: str,
    *,
    progress: bool = True,
    force: bool = False,
    limit_seconds: float = LIMIT_SECONDS,
    compiler: str = MAX_COMPILER,
) -> ArtifactState:
    """See to it that the artifact is there, as far as `policy` allows, and say what there is.

    policy : "cached" never compiles; "background" starts a compile, once per process and key, and
        returns at once; "blocking" waits until it is done
    progress : show a progress bar while waiting
    force : compile again after a failure that is less than a day old
    limit_seconds : a compile that takes longer is stopped, and has failed
    compiler : "package.module:function" to compile with, `compile_worker.compile_to_mef` or alike

    Interrupting the wait does not stop the compile, which the next run will find done.
    Raises ValueError for an unknown policy, and CacheRefused when the folder may not be trusted or
    cannot be written to.
    """
    if policy not in COMPILE_POLICIES:
        raise ValueError(f"compile is {policy!r}; it must be one of {COMPILE_POLICIES}")
    found = state(key, cache_dir)
    if found.ready or policy == "cached" or (found.name == "failed" and not force):
        return found
    folder = open_cache(cache_dir, create=True)
    obstacle = _obstacle(folder)
    if obstacle and found.name != "compiling":
        return ArtifactState("missing", f"{found.reason}: {obstacle}")
    try:
        child = _start(key, folder, policy, force, limit_seconds, compiler)
    except OSError as error:  # no process to be had, or no file: a quota, a limit
        if not is_of_the_system(error):
            raise
        return ArtifactState("missing", f"{found.reason}: the compile cannot start ({error})")
    if policy == "blocking":
        _wait(child, key, folder, progress)
    return state(key, folder)


def ensure_first(
    keys: Sequence[ArtifactKey],
    cache_dir: str | os.PathLike[str],
    policy: str,
    **options: bool | str,
) -> tuple[ArtifactKey, ArtifactState]:
    """`ensure` for the first of `keys` that has not failed; and which one that is.

    options : of `ensure`

    Raises as `ensure` does.
    """
    reasons = []
    for key in keys:
        found = ensure(key, cache_dir, policy, **options)
        if found.name != "failed":
            break
        reasons.append(found.reason)
    if found.ready:
        found = replace(found, reason="; ".join(reasons))
    return key, found


def _start(
    key: ArtifactKey,
    folder: Path,
    policy: str,
    force: bool,
    limit_seconds: float,
    compiler: str,
) -> subprocess.Popen:
    """The supervisor of this key, started unless this process has done so."""
    with _guard:
        child = _children.get((key.digest, folder))
        if child is not None and (child.poll() is None or not (force or policy == "blocking")):
            return child
        _warned.discard((key.digest, folder))
        job = CompileJob(
            key=key.to_dict(),
            cache_dir=str(folder),
            compiler=compiler,
            fingerprint=fingerprint(),
            sys_path=[os.path.abspath(entry) for entry in (*sys.path, str(PACKAGE.parent))],
            limit_seconds=limit_seconds,
            niceness=_BACKGROUND_NICENESS if policy == "background" else 0,
            patience_seconds=PATIENCE_SECONDS,
            force=force,
        )
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        log = os.open(log_path(key, folder), flags, 0o600)
        try:
            # A session of its own: neither Ctrl-C nor the end of this process stops it.
            child = subprocess.Popen(
                job.command("supervise"),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        finally:
            os.close(log)
        logger.info("compiling the graphs of %s (process %d)", key.label, child.pid)
        _children[key.digest, folder] = child
        return child


def _wait(child: subprocess.Popen, key: ArtifactKey, folder: Path, progress: bool) -> None:
    expected = compile_seconds(key, folder) or EXPECTED_SECONDS
    if not progress:
        child.wait()
    elif sys.stderr.isatty():
        _show_bar(child, key.label, expected)
    else:  # a log would keep every refresh of a bar
        start = time.monotonic()
        print(f"compiling {key.label}, once: about {expected:.0f} s", file=sys.stderr, flush=True)
        child.wait()
        seconds = time.monotonic() - start
        print(f"compiling {key.label} took {seconds:.0f} s", file=sys.stderr, flush=True)


def _show_bar(child: subprocess.Popen, label: str, expected: float) -> None:
    from tqdm import tqdm

    start = time.monotonic()
    with tqdm(
        desc=f"compiling {label}, once",
        total=expected,
        bar_format="{desc}: |{bar}| {elapsed} of about " + f"{expected:.0f} s",
    ) as bar:
        while True:
            try:
                child.wait(_PROGRESS_SECONDS)
                return
            except subprocess.TimeoutExpired:
                bar.n = min(time.monotonic() - start, expected)
                bar.refresh()


def _obstacle(folder: Path) -> str | None:
    """Why no compile can start now, with the remedy."""
    if getattr(sys, "frozen", False) or not sys.executable:
        # Starting sys.executable would start the application again.
        return "compiling needs a Python interpreter, which this bundled application does not have"
    memory, disk = available_memory(), shutil.disk_usage(folder).free
    if memory is not None and memory < NEEDED_MEMORY:
        return f"compiling needs {NEEDED_MEMORY >> 30} GiB of memory, {memory >> 20} MiB are free"
    if disk < NEEDED_DISK:
        return f"compiling needs {NEEDED_DISK >> 20} MiB in {folder}, {disk >> 20} MiB are free"
    return None


def _failed(key: ArtifactKey, reason: str, folder: Path) -> ArtifactState:
    told = f"compiling the graphs of {key.label} failed: {reason}"
    if (key.digest, folder) not in _warned:
        _warned.add((key.digest, folder))
        logger.warning(
            "%s; %s. The log is %s; `whisper-max compile` tries again at once",
            told,
            "kernels without tiles stand in" if key.cpu_level == "amx" else "PyTorch does the work",
            log_path(key, folder),
        )
    return ArtifactState("failed", told)
