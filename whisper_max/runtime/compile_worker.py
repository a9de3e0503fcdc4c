"""The processes that compile one artifact, and leave either the artifact or a record of a failure.

MAX may abort the process that it compiles in, and keeps gigabytes. So there are two processes: the
supervisor, which the user's program starts and which survives that program's end, holds the
artifact's lock and writes down how it ended; and the compiler, its child, which does the work and
may crash, hang or be killed without harm. Neither is forked: MAX does not survive a fork.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from . import limits
from .artifact_key import ArtifactKey
from .artifacts import ENGINE_CACHE, failure, failure_path, find, store
from .cache_folder import lock, open_cache, size_of, write_json
from .fingerprint import fingerprint, kernels_digest
from .storage import BUILDER

ENGINE_CACHE_LIMIT = 1 << 30  # bytes
AUTOGROUP_NICENESS = 19  # less than 2% of a busy CPU
LOOK_SECONDS = 0.1
"""So long a compile runs in a container with a quota before it is seen whether that is used up."""
PAUSE_SECONDS = 0.9
KEPT_OF_LOG = 64 << 10  # bytes, the last ones
_PR_SET_PDEATHSIG = 1

# Isolated (-I), so that neither the working folder nor PYTHON* decide what is imported; then the
# path of the process that asked, so that the child imports the same whisper_max and builders.
_BOOT = (
    "import json, sys; job = json.loads(sys.argv[2]); sys.path[:] = job['sys_path']; "
    "from whisper_max.runtime.compile_worker import main; sys.exit(main(sys.argv[1], job))"
)


class ArtifactRefused(Exception):
    """A compiled artifact that must not be used, for the reason given."""


@dataclass(frozen=True)
class CompileJob:
    """One compile, in a form that travels as JSON on a command line.

    key : `ArtifactKey.to_dict()`
    compiler : "package.module:function", called as `function(key, path)` to write the MEF
    fingerprint : that of the asking process; compiling anything else under this key's name fails
    niceness : as in os.nice, 0 to 19
    patience_seconds : how long it takes no more than the program leaves, if niceness is positive
    force : compile although it failed not long ago
    """

    key: dict
    cache_dir: str
    compiler: str
    fingerprint: dict
    sys_path: list[str]
    limit_seconds: float
    niceness: int
    patience_seconds: float
    force: bool

    def command(self, role: str) -> list[str]:
        """The command line of "supervise" or "compile"."""
        return [sys.executable, "-I", "-c", _BOOT, role, json.dumps(asdict(self))]


def main(role: str, content: dict) -> int:
    """What the started processes run; the exit status, 0 when the artifact is there."""
    job = CompileJob(**content)
    return {"supervise": supervise, "compile": compile_in_this_process}[role](job)


def compile_to_mef(key: ArtifactKey, path: Path) -> None:
    """Build the graphs of `key` and write what MAX compiles them to: half a minute, and gigabytes.

    Raises ArtifactRefused where the artifact computes something else than it should, and whatever
    the builder or MAX raise; MAX may also end the process.
    """
    from max import driver, engine

    if key.device == "cpu":
        device = driver.CPU()
    else:
        # Virtual also where there are GPUs: the first may be of another kind than the model's, and
        # the memory of any is the program's that waits for this.
        driver.set_virtual_device_api("cuda")
        driver.set_virtual_device_target_arch(key.device.partition(":")[2])
        driver.set_virtual_device_count(1)
        device = driver.Accelerator()
    build = _function(key.builder)
    graph = build(device=key.device, cpu_level=key.cpu_level, **dict(key.options))
    engine.InferenceSession(devices=[device]).compile(graph).export_mef(path)
    if key.cpu_level == "amx" and key.builder == BUILDER:
        from .tile_check import check_tiles

        print("checking the tile kernels", flush=True)  # a crash there leaves no other trace
        check_tiles(path, dict(key.options))


def compile_in_this_process(job: CompileJob) -> int:
    """The compiler's side: write the MEF into the supervisor's scratch folder."""
    _die_with_parent()
    _be_first_to_go()
    _step_back(job.niceness)
    key = ArtifactKey.from_dict(job.key)
    if fingerprint() != job.fingerprint:
        raise RuntimeError("the sources or the engine changed since this compile was asked for")
    scratch = _scratch(key, Path(job.cache_dir))
    try:
        _function(job.compiler)(key, _mef(scratch))
    except ArtifactRefused as refused:
        _refusal(scratch).write_text(str(refused))
        raise
    _leave()
    return 0


def supervise(job: CompileJob) -> int:
    """The supervisor's side: one compile under the lock, unless it has been done meanwhile."""
    _step_back(job.niceness)
    key = ArtifactKey.from_dict(job.key)
    folder = open_cache(job.cache_dir, create=True)
    with lock(folder / f"{key.stem}.lock"):
        if find(key, folder):
            return 0
        if failure(key, folder) and not job.force:
            return 1
        os.ftruncate(sys.stderr.fileno(), 0)  # the log, which may hold an earlier attempt
        scratch = _scratch(key, folder)
        shutil.rmtree(scratch, ignore_errors=True)  # of a supervisor that was killed
        try:
            reason = _compile_and_store(job, key, folder, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        log = log_path(key, folder)
        if reason is None:
            log.unlink(missing_ok=True)
            return 0
        _shorten(log)
        record = {"key": key.to_dict(), "time": time.time(), "reason": reason, "log": str(log)}
        write_json(failure_path(key, folder), record)
        return 1


def log_path(key: ArtifactKey, folder: Path) -> Path:
    """Where both processes write; kept when the compile failed."""
    return folder / f"{key.stem}.log"


def _compile_and_store(
    job: CompileJob, key: ArtifactKey, folder: Path, scratch: Path
) -> str | None:
    """None, or why there is no artifact."""
    start = time.monotonic()
    try:
        scratch.mkdir(mode=0o700)
        reason = _run(job, folder, scratch)
        if _refusal(scratch).exists():
            return _refusal(scratch).read_text()
        if reason is not None:
            return reason
        if size_of(_mef(scratch)) == 0:
            return "the compiler ended without writing an artifact"
        # Kilobytes in Linux, bytes on macOS; the supervisor has no other children.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
        store(key, folder, _mef(scratch), time.monotonic() - start, peak)
    except OSError as error:  # a full disk above all
        traceback.print_exc()
        return f"the artifact could not be written: {error.strerror or error}"
    return None


def _run(job: CompileJob, folder: Path, scratch: Path) -> str | None:
    """Run the compiler; None, or how it failed."""
    child = subprocess.Popen(
        job.command("compile"),
        cwd=scratch,
        env=_environment(folder),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        if _pauses(job.niceness):
            status = _wait_with_pauses(child, job.limit_seconds)
        else:
            status = _wait_with_patience(child, job)
    except subprocess.TimeoutExpired:
        return f"it took longer than {job.limit_seconds:g} s and was stopped"
    finally:
        # The session, not the child alone: MAX starts the Mojo compiler as a process of its own.
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if status == -signal.SIGKILL:
        return "it was killed (signal 9), as the system does when memory runs out"
    if status < 0:
        return f"it crashed (signal {-status}: {signal.strsignal(-status)})"
    return f"it ended with status {status}" if status else None


def _wait_with_patience(child: subprocess.Popen, job: CompileJob) -> int:
    """Wait for the compiler; beside a program that never pauses it gets a share after a while.

    It slows the program down then, for less than a minute on 2 CPUs. A program that has run for
    so long makes up for that with what MAX saves; a shorter one has only been slowed down a little.
    """
    patience = min(job.patience_seconds, job.limit_seconds)
    with suppress(subprocess.TimeoutExpired):
        return child.wait(patience)
    if job.niceness > 0:
        with suppress(OSError):  # it has ended meanwhile, or Linux has no autogroups
            Path(f"/proc/{child.pid}/autogroup").write_text("0")
    return child.wait(job.limit_seconds - patience)


def _pauses(niceness: int) -> bool:
    """Whether a compile pauses for the user's program instead of giving way to it on the CPU.

    It has a tenth of its time then; idle scheduling would take that as well.
    """
    return niceness > 0 and limits.cpu_quota() is not None


def _wait_with_pauses(child: subprocess.Popen, limit_seconds: float) -> int:
    """Wait for the compiler, and stop it for a while whenever the container's quota is used up.

    A quota counts what all processes take, however nice they are: the compile would take its part
    from the user's program, and both would stand still until the next period.
    """
    end = time.monotonic() + limit_seconds
    while True:
        throttled = limits.times_throttled()
        try:
            return child.wait(max(0.0, min(LOOK_SECONDS, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= end:
                raise
        if limits.times_throttled() > throttled:
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.killpg(child.pid, signal.SIGSTOP)
                time.sleep(PAUSE_SECONDS)
                os.killpg(child.pid, signal.SIGCONT)


def _environment(folder: Path) -> dict[str, str]:
    """The compiler's environment: MAX's cache and scratch files in our folder, which is private.

    MAX puts compiled kernels into the temporary folder, under a name made of the source's path
    alone, and takes what it finds there. With a folder for each state of the kernels, two versions
    never mix; and MAX's cache, which goes by that path too, still helps the next compile.
    """
    engine_cache = folder / ENGINE_CACHE
    if size_of(engine_cache) > ENGINE_CACHE_LIMIT:
        shutil.rmtree(engine_cache, ignore_errors=True)
    temporary = engine_cache / f"kernels-{kernels_digest()}"
    temporary.mkdir(mode=0o700, parents=True, exist_ok=True)
    return {
        **os.environ,
        "MODULAR_CACHE_DIR": str(engine_cache),
        "TMPDIR": str(temporary),
        "MODULAR_TELEMETRY_ENABLED": "0",
    }


def _scratch(key: ArtifactKey, folder: Path) -> Path:
    return folder / f"{key.stem}.work"


def _mef(scratch: Path) -> Path:
    return scratch / "artifact.mef"


def _refusal(scratch: Path) -> Path:
    """Where the compiler says why its artifact must not be used."""
    return scratch / "refusal.txt"


def _function(dotted: str) -> Callable:
    module, _, name = dotted.partition(":")
    return getattr(importlib.import_module(module), name)


def _die_with_parent() -> None:
    """End with the supervisor, which holds the lock (Linux; elsewhere the compile runs on)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _leave() -> None:
    """End at once, now that the artifact is written.

    Taking MAX down in order sometimes aborts ("terminate called without an active exception": a
    thread of its compiler outlives its owner), above all on a busy machine.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _step_back(niceness: int) -> None:
    """Leave the CPU to the user's program, if `niceness` is positive.

    Linux weighs sessions against each other (autogroups), and niceness only within one: ours would
    take half of the CPU, and slow PyTorch down many times over, whose threads wait for each other.
    Idle scheduling makes it also wait for its share, where it would interrupt PyTorch for it, and
    halves what PyTorch loses. Beside a program that never pauses a compile then takes longer than
    most programs; so it gets more after `patience_seconds`.
    """
    if niceness <= 0 or _pauses(niceness):
        return
    os.nice(max(0, niceness - os.nice(0)))
    with suppress(AttributeError, OSError):  # not Linux
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with suppress(OSError):  # not Linux, or built without
        Path("/proc/self/autogroup").write_text(str(AUTOGROUP_NICENESS))


def _be_first_to_go() -> None:
    """When memory runs out, Linux shall end this process, not the user's; and dump no core."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with suppress(OSError):  # not Linux, or a sandbox that does not let us
        Path("/proc/self/oom_score_adj").write_text("1000")


def _shorten(log: Path) -> None:
    if size_of(log) > KEPT_OF_LOG:
        log.write_bytes(log.read_bytes()[-KEPT_OF_LOG:])
