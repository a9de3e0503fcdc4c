"""What ran where, and why: counters per target, `PatchReport` and `Status`.

Every replacement calls `record` once per call. The counters are the truth behind
`whisper_max.status()`; the log tells each new path and reason once at INFO, every call at DEBUG.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from . import settings, versions
from .conditions import ASK_FOR_GPUS, UnsupportedByMax
from .settings import TARGETS, Settings

logger = logging.getLogger("whisper_max")

PATHS = {"max": "MAX", "torch": "PyTorch"}

# Reasons may carry shapes and names, and a service runs for months: beyond so many distinct
# ones per target, the rest are counted together.
MAX_REASONS = 64
FURTHER_REASONS = "further reasons"


@dataclass
class TargetStatus:
    """The counters of one target.

    patched : whether upstream's name is replaced now
    max_calls, torch_calls : calls that MAX and that PyTorch ran
    max_seconds, torch_seconds : wall-clock time in them. Calls contain others (word timestamps
        encode, a decoding loop on PyTorch infers), so targets do not add up.
    reasons : calls that went to PyTorch, by reason; one counted 0 times is a reason why the
        target was not patched at all
    """

    patched: bool = False
    max_calls: int = 0
    torch_calls: int = 0
    max_seconds: float = 0.0
    torch_seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Status:
    """What `whisper_max.status()` returns: a copy, not changed by later calls. Prints as a table.

    targets : the counters of each target in `TARGETS`
    versions : installed version by package, "not installed" where there is none
    device : where the MAX path runs
    mode, precision, compile, cache_dir : the settings in force
    artifact : the state of the compiled graphs: none (not asked for yet), ready, compiling, failed
        or missing, with why
    """

    targets: dict[str, TargetStatus]
    versions: dict[str, str]
    device: str
    mode: str
    precision: str
    compile: str
    cache_dir: str
    artifact: str

    def to_dict(self) -> dict[str, object]:
        """The same as plain dictionaries, strings and numbers, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        row = "{:<14} {:<8} {:>10} {:>14} {:>10} {:>10}".format
        lines = [row("target", "patched", "MAX calls", "PyTorch calls", "MAX s", "PyTorch s")]
        for target, counted in self.targets.items():
            lines.append(
                row(
                    target,
                    "yes" if counted.patched else "no",
                    counted.max_calls,
                    counted.torch_calls,
                    f"{counted.max_seconds:.3f}",
                    f"{counted.torch_seconds:.3f}",
                )
            )
        for target, counted in self.targets.items():
            for reason, calls in counted.reasons.items():
                lines.append(f"{target}: {f'{calls} × ' if calls else 'not patched: '}{reason}")
        lines.append(f"device: {self.device}")
        lines.append(f"mode: {self.mode}, precision: {self.precision}, compile: {self.compile}")
        lines.append(f"cache: {self.cache_dir}")
        lines.append(f"artifact: {self.artifact}")
        lines.append(", ".join(f"{name} {version}" for name, version in self.versions.items()))
        return "\n".join(lines)


@dataclass(frozen=True)
class PatchReport:
    """What `patch()` did.

    patched : the targets now replaced
    refused : the targets left to upstream, each with every reason
    settings : the settings in force
    """

    patched: tuple[str, ...]
    refused: Mapping[str, tuple[str, ...]]
    settings: Settings

    def __str__(self) -> str:
        patched = f"patched: {', '.join(self.patched) or 'nothing'}"
        return "\n".join([patched, *refusal_lines(self.refused)])


def refusal_lines(refused: Mapping[str, Sequence[str]]) -> list[str]:
    """One line for each refused target, with all its reasons."""
    return [f"{target} stays on PyTorch: {'; '.join(why)}" for target, why in refused.items()]


class _Counters:
    """The counters of the process, and what has already been logged."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.refusals: dict[str, tuple[str, ...]] = {}
        self.device = ""
        self.artifact = "none"
        self.announced: set[tuple[str, str, str]] = set()
        self.failures: set[str] = set()
        self.warned_of: set[str] = set()
        self.targets = {target: TargetStatus() for target in TARGETS}

    def renew_lock(self) -> None:
        # A fork may happen while another thread holds the lock; that thread is not in the child.
        self.lock = threading.RLock()


_counters = _Counters()
os.register_at_fork(after_in_child=lambda: _counters.renew_lock())


def record(target: str, path: str, seconds: float, reasons: Sequence[str] = ()) -> None:
    """Count one call of `target` that took `seconds` on `path` ("max" or "torch").

    reasons : why it ran on PyTorch, all of them; each is counted once for the call
    """
    if target not in TARGETS or path not in PATHS:
        raise ValueError(
            f"no such counter: target {target!r}, path {path!r}; "
            f"targets are {', '.join(TARGETS)}, paths are {', '.join(PATHS)}"
        )
    with _counters.lock:
        counted = _counters.targets[target]
        if path == "max":
            counted.max_calls += 1
            counted.max_seconds += seconds
        else:
            counted.torch_calls += 1
            counted.torch_seconds += seconds
        told = [_count(counted, reason) for reason in reasons]
        keys = [(target, path, reason) for reason in told or [""]]
        new = [key for key in keys if key not in _counters.announced]
        _counters.announced.update(new)
        of_gpus = {reason for _, _, reason in new if ASK_FOR_GPUS in reason} - _counters.warned_of
        _counters.warned_of.update(of_gpus)
    for _, _, reason in new:
        logger.info("%s runs on %s%s", target, PATHS[path], f": {reason}" if reason else "")
    for reason in of_gpus:
        logger.warning("PyTorch does all the work: %s", reason)
    logger.debug("%s on %s in %.3f ms %s", target, PATHS[path], seconds * 1e3, list(reasons))


def _count(counted: TargetStatus, reason: str) -> str:
    if reason not in counted.reasons and len(counted.reasons) >= MAX_REASONS:
        reason = FURTHER_REASONS
    counted.reasons[reason] = counted.reasons.get(reason, 0) + 1
    return reason


def as_unsupported(what: str, error: Exception) -> UnsupportedByMax:
    """The reason that an error of MAX's own is, logged as a warning where it is new.

    Raises the error itself where it is not: a signal's handler may have raised it, as Python runs
    those behind a call of native code.
    """
    if not is_of_max(error):
        raise error
    reason = f"MAX failed in {what}: {error}"
    with _counters.lock:
        new = reason not in _counters.failures
        if new and len(_counters.failures) < MAX_REASONS:
            _counters.failures.add(reason)
    if new:
        logger.warning("%s; PyTorch takes over", reason)
    return UnsupportedByMax(reason)


_NATIVE = ("max", "torch", "numpy", __package__)
"""Packages of native code, and ours, which calls it."""


def is_of_the_system(error: OSError) -> bool:
    """Whether the system refused something, which it does by a number.

    A handler of a signal may raise such an error as well: `TimeoutError` is one.
    """
    return error.errno is not None


def is_of_max(error: Exception, *others: str) -> bool:
    """Whether an error was raised by MAX, or by native code that we or PyTorch called.

    others : packages that may have raised it as well

    What else raises while native code runs is a handler of a signal: the user's, or PyTorch's own
    for the workers of a DataLoader. Or another thread has raised it in this one, which leaves no
    trace of where it is from: such an error has no message, or a class of the user's.
    """
    of_known_class = type(error).__module__.partition(".")[0] in ("builtins", *_NATIVE)
    traceback = error.__traceback__
    if traceback is None or not of_known_class or not error.args:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = str(traceback.tb_frame.f_globals.get("__name__"))
    package = module.partition(".")[0]
    return package in (*_NATIVE, *others) and not module.startswith("torch.utils.data.")


def tells_of_memory(error: Exception) -> bool:
    """Whether memory has run out: MAX says so of a GPU's in a RuntimeError's message."""
    text = str(error).lower().replace("_", " ")
    told = "out of memory" in text or "allocate memory" in text
    return told or isinstance(error, MemoryError)


def set_patched(target: str, patched: bool, refusals: Sequence[str] = ()) -> None:
    """Say whether `target` is patched now, and if not, why it was refused."""
    with _counters.lock:
        _counters.targets[target].patched = patched
        _counters.refusals[target] = tuple(refusals)


def set_artifact(text: str) -> None:
    """Say in a few words what state the compiled graphs are in."""
    with _counters.lock:
        _counters.artifact = text


def set_device(text: str) -> None:
    """Say in a few words where the MAX path runs, with the CPU features it uses."""
    with _counters.lock:
        _counters.device = text


def status() -> Status:
    """What ran where up to now, and with which versions and settings."""
    active = settings.active()
    installed = versions.installed()
    with _counters.lock:
        targets = {}
        for target, counted in _counters.targets.items():
            refused = dict.fromkeys(_counters.refusals.get(target, ()), 0)
            targets[target] = replace(counted, reasons={**refused, **counted.reasons})
        return Status(
            targets=targets,
            versions=installed,
            device=_counters.device or active.device or "not in use yet",
            mode=active.mode,
            precision=active.precision,
            compile=active.compile,
            cache_dir=str(active.cache_dir),
            artifact=_counters.artifact,
        )


def reset() -> None:
    """Set the counters and what has been logged back to nothing; what is patched stays known."""
    with _counters.lock:
        for target, counted in _counters.targets.items():
            _counters.targets[target] = TargetStatus(patched=counted.patched)
        _counters.announced.clear()
        _counters.failures.clear()
        _counters.warned_of.clear()
