"""One frozen `Settings`, and the only place that reads the environment.

| setting   | values (default first)                   | environment           |
|-----------|------------------------------------------|-----------------------|
| mode      | auto · strict · shadow · off             | WHISPER_MAX_MODE      |
| precision | high · highest · medium · int8           | WHISPER_MAX_PRECISION |
| compile   | background · blocking · cached           | WHISPER_MAX_COMPILE   |
| cache_dir | the user's cache folder / whisper_max    | WHISPER_MAX_CACHE_DIR |
| cpu_level | as the CPU can · baseline · avx512 · amx | WHISPER_MAX_CPU       |
| device    | the CPU · cpu · cuda                     |                       |
| targets   | all, or a sequence of `TARGETS`          |                       |

An explicit argument wins over the environment, the environment over the default.
An environment variable set to the empty string counts as unset.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path

TARGETS = ("encoder", "decoder", "inference", "decoding_loop", "alignment")
MODES = ("auto", "strict", "shadow", "off")
PRECISIONS = ("high", "highest", "medium", "int8")
EXACT_PRECISIONS = ("high", "highest")
"""Those that promise PyTorch's tokens; the others round weights."""
COMPILE_POLICIES = ("background", "blocking", "cached")
DEVICES = ("cpu", "cuda")
CPU_LEVELS = ("baseline", "avx512", "amx")

ENVIRONMENT = {
    "mode": "WHISPER_MAX_MODE",
    "precision": "WHISPER_MAX_PRECISION",
    "compile": "WHISPER_MAX_COMPILE",
    "cache_dir": "WHISPER_MAX_CACHE_DIR",
    "cpu_level": "WHISPER_MAX_CPU",
}
_ALLOWED = {
    "mode": MODES,
    "precision": PRECISIONS,
    "compile": COMPILE_POLICIES,
    "device": (None, *DEVICES),
    "cpu_level": (None, *CPU_LEVELS),
}


@dataclass(frozen=True)
class Settings:
    """How whisper_max works, fixed at one moment.

    mode : what happens when a call cannot run on MAX (`MODES`)
    precision : the arithmetic of the matrix products (`PRECISIONS`)
    compile : when graphs are compiled (`COMPILE_POLICIES`)
    device : only models on this device are accelerated; None for those on the CPU
    targets : the rows of the patch table to apply, in the table's order; None for all of them
    cache_dir : absolute path of the folder for compiled graphs
    cpu_level : the highest CPU feature level to use (`CPU_LEVELS`); None for what the CPU has

    Raises ValueError, naming setting, value and allowed values, when a value is not allowed.
    """

    mode: str = "auto"
    precision: str = "high"
    compile: str = "background"
    device: str | None = None
    targets: tuple[str, ...] | None = None
    cache_dir: Path = field(default_factory=lambda: default_cache_dir(os.environ))
    cpu_level: str | None = None

    def __post_init__(self) -> None:
        for name in _ALLOWED:
            _check(name, getattr(self, name), f"the argument {name}=")
        if self.targets is not None:
            object.__setattr__(self, "targets", _in_table_order(self.targets))
        object.__setattr__(self, "cache_dir", _absolute(self.cache_dir))

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str] | None = None, **overrides: object
    ) -> Settings:
        """The settings of `environ` (default `os.environ`), overridden by arguments not None.

        Raises ValueError for a value that is not allowed, naming where it came from, and
        TypeError for an override that is no setting.
        """
        if environ is None:
            environ = os.environ
        unknown = sorted(set(overrides) - {field.name for field in fields(cls)})
        if unknown:
            raise TypeError(f"no such setting: {', '.join(unknown)}")

        values = {name: value for name, value in overrides.items() if value is not None}
        for name, variable in ENVIRONMENT.items():
            value = environ.get(variable)
            if not value or name in values:
                continue
            if name in _ALLOWED:
                _check(name, value, f"the environment variable {variable}")
            values[name] = value
        if "cache_dir" not in values:
            values["cache_dir"] = default_cache_dir(environ)
        return cls(**values)


def default_cache_dir(environ: Mapping[str, str]) -> Path:
    """The user's cache folder / whisper_max, as the platform has it (on Linux, XDG's rules).

    Raises ValueError when the user has no home folder, as happens in containers.
    """
    xdg = environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # XDG: a relative path is to be ignored
        return Path(xdg) / "whisper_max"
    home = environ.get("HOME") or os.path.expanduser("~")
    if not os.path.isabs(home):
        raise ValueError(
            "whisper_max has no cache folder, because this user has no home folder: "
            f"set {ENVIRONMENT['cache_dir']} to a folder that only this user can write to"
        )
    caches = "Library/Caches" if sys.platform == "darwin" else ".cache"
    return Path(home) / caches / "whisper_max"


def _check(name: str, value: object, source: str) -> None:
    if value not in _ALLOWED[name]:
        allowed = ", ".join(repr(word) for word in _ALLOWED[name] if word is not None)
        raise ValueError(f"{name} is {value!r} (from {source}); it must be one of {allowed}")


def _in_table_order(targets: Iterable[str]) -> tuple[str, ...]:
    if isinstance(targets, str):
        raise ValueError(f"targets is {targets!r}; it must be a sequence, such as ({targets!r},)")
    targets = tuple(targets)
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        allowed = ", ".join(repr(target) for target in TARGETS)
        raise ValueError(f"targets has {unknown[0]!r}; each must be one of {allowed}")
    return tuple(target for target in TARGETS if target in targets)


def _absolute(path: str | os.PathLike[str]) -> Path:
    # Absolute now: a script may change its working folder later, the cache must not move.
    if not os.fspath(path):
        raise ValueError(
            "cache_dir is empty; give a folder, or leave it out for the user's cache folder"
        )
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:  # pathlib's word for a "~" that leads to no home folder
        raise ValueError(
            f"cache_dir is {os.fspath(path)!r}, but there is no such home folder; "
            "give an absolute path"
        ) from error


_activated: Settings | None = None
_disabled: ContextVar[bool] = ContextVar("whisper_max_disabled", default=False)


def active() -> Settings:
    """The settings last activated, else those of the environment."""
    return _activated if _activated is not None else Settings.from_environment()


def activate(settings: Settings | None) -> None:
    """Make `settings` the active ones for the whole process; None goes back to the environment."""
    global _activated
    _activated = settings


@contextmanager
def disabled() -> Iterator[None]:
    """Run upstream's own code inside the block, in this thread (or asyncio task) only.

    Nothing is unpatched: every replacement passes the call on, with the reason "disabled".
    """
    before = _disabled.get()
    _disabled.set(True)
    try:
        yield
    finally:
        _disabled.set(before)


def is_disabled() -> bool:
    """Whether this thread (or asyncio task) is inside `disabled()`."""
    return _disabled.get()
