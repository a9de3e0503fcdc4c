"""patch() and unpatch(): apply the patch table, undo it, roll it back; and the same for one model.

What is patched follows from two values, the settings in force (None: unpatched) and the models
that are accelerated: `_switch` changes the first, `_update_rows` follows the second. So the public
functions are a few lines each.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from . import activation, live_models, pickling, precompile, report, settings, versions
from .conditions import UnsupportedByMax
from .patch_table import TABLE, Row, import_upstream
from .report import PatchReport, refusal_lines
from .settings import TARGETS, Settings

if TYPE_CHECKING:
    from torch import nn

Model = TypeVar("Model", bound="nn.Module")

logger = logging.getLogger("whisper_max")

_OF_DECODES = ("inference", "decoding_loop", "alignment")
"""Targets that are no part of a model: replaced for all, they run on MAX for those accelerated."""

_lock = threading.RLock()
_in_force: PatchReport | None = None  # of the last patch(); None: unpatched
_of_models: Settings | None = None  # of accelerated models, where nothing is patched
_applied: dict[Row, object] = {}  # what we put in place of upstream's, row by row


def patch(
    *,
    precision: str | None = None,
    device: str | None = None,
    compile: str | None = None,
    mode: str | None = None,
    targets: Iterable[str] | None = None,
) -> PatchReport:
    """Make openai-whisper run on MAX, in this process, until unpatch().

    precision : "high", "highest", "medium" or "int8"
    device : accelerate only models on "cpu" or "cuda"; default: those on the CPU, since the
        graphs for GPUs have never run on one
    compile : "background", "blocking" or "cached"
    mode : "auto", "strict", "shadow" or "off"
    targets : which parts to patch, of `settings.TARGETS`; default: all

    An argument left out comes from the environment, else it is the default (`settings`). When
    whisper is patched already, nothing changes: the first settings stay, and a RuntimeWarning
    tells of arguments that differ from them.

    Returns what was patched, and what was refused and why: without MAX, or with an unknown
    openai-whisper, everything stays on PyTorch. Raises ImportError when openai-whisper or torch
    is missing, ValueError for a setting that is not allowed, and in mode "strict"
    UnsupportedByMax when a target is refused. When it raises, nothing is patched.
    """
    asked = {
        "precision": precision,
        "device": device,
        "compile": compile,
        "mode": mode,
        "targets": targets,
    }
    wanted = _prepare(asked)
    with _lock:
        if _in_force is None or not _in_force.patched:
            return _switch(wanted)
        in_force = _in_force
    # Only what was asked for by name: a bare patch() means "see to it that whisper is patched".
    named = [name for name, value in asked.items() if value is not None]
    _warn_of_differences(in_force.settings, wanted, named)
    return in_force


def unpatch() -> None:
    """Put upstream's own attributes back, and its classes back into all live models.

    What another package has replaced since patch() is left as it is, with a RuntimeWarning.
    Does nothing when nothing is patched.
    """
    with _lock:
        live_models.restore_all()
        _switch(None)


def is_patched(target: str | None = None) -> bool:
    """Whether `target` (default: any target) is patched, and nobody has replaced it since.

    For all models: what accelerate(model) puts in place for one does not count. Raises ValueError
    for an unknown target.
    """
    if target is not None and target not in TARGETS:
        raise ValueError(f"no target {target!r}; targets are {', '.join(TARGETS)}")
    with _lock:
        return any(
            activation.is_active(row.target) and row.current() is ours
            for row, ours in _applied.items()
            if target is None or row.target == target
        )


@contextmanager
def patched(
    *,
    precision: str | None = None,
    device: str | None = None,
    compile: str | None = None,
    mode: str | None = None,
    targets: Iterable[str] | None = None,
) -> Iterator[PatchReport]:
    """Patch inside the block, and restore the earlier state after it, patched or not.

    Takes patch()'s arguments and yields its report. Inside the block its own arguments hold,
    whatever was in force before. The state is that of the process, for all its threads.
    """
    wanted = _prepare(
        {
            "precision": precision,
            "device": device,
            "compile": compile,
            "mode": mode,
            "targets": targets,
        }
    )
    with _lock:
        earlier = _in_force.settings if _in_force is not None else None
        result = _switch(wanted)
    try:
        yield result
    finally:
        with _lock:
            _switch(earlier)


def accelerate(model: Model) -> Model:
    """Run a loaded model on MAX from the next call on: its encoder, its decoder, its decodes.

    Works with and without patch(), and again does nothing. Without it the decoding loop and the
    alignment of words are replaced in openai-whisper, too, but for such models only, on the CPU,
    with the settings of the environment. A module is taken only if its class is exactly upstream's:
    subclasses and forks stay on PyTorch. What is refused is in the log, with the reason.

    model : whisper.model.Whisper; it is changed in place and returned

    Raises TypeError when the model has no encoder and decoder, and in mode "strict"
    UnsupportedByMax, before anything is changed, when a part of it cannot be taken.
    """
    import_upstream()
    with _lock:
        if not activation.accelerated:
            _fix_settings()  # anew: models from before are gone
        refused = live_models.reasons_against(model)
        if settings.active().mode != "off":
            refused.update(_applicable(_targets_of_decodes(settings.active()))[1])
        lines = refusal_lines(refused)
        if refused and settings.active().mode == "strict":
            raise UnsupportedByMax("; ".join(lines))
        for line in lines:
            logger.info("accelerate(model): %s", line)
        live_models.take(model, except_for=refused)
        _update_rows()
    return model


def restore(model: Model) -> Model:
    """Give a model back to PyTorch, and keep it there until accelerate(model).

    The model is changed in place and returned. Raises TypeError as accelerate() does.
    """
    with _lock:
        live_models.give_back(model)
        _update_rows()
    return model


def _prepare(asked: dict[str, object]) -> Settings:
    """The settings asked for, with upstream imported unless they say "off".

    Not under the lock: another thread may be importing whisper and call patch() from there.
    """
    wanted = Settings.from_environment(**asked)
    if wanted.mode != "off":
        import_upstream()
    return wanted


def _switch(wanted: Settings | None) -> PatchReport | None:
    """Go from what is patched now to what `wanted` asks for, None for nothing: all of it, or none.

    Raises what importing or setting a replacement raises, after putting everything back.
    """
    global _in_force
    rows, refused = _rows_for(wanted)
    if refused and wanted.mode == "strict":
        raise UnsupportedByMax("; ".join(refusal_lines(refused)))
    left = _install(rows, wanted)

    patched = tuple(target for target in TARGETS if any(row.target == target for row in rows))
    activation.set_active_targets(frozenset(patched))
    settings.activate(wanted)
    for target in TARGETS:
        report.set_patched(target, target in patched, refused.get(target, ()))
    if wanted is None:
        live_models.release_adopted()
        _in_force = None
        _fix_settings()
    else:
        _in_force = PatchReport(patched, refused, wanted)
        logger.info("%s", _in_force)
        if patched and wanted.compile == "background":
            precompile.start(wanted)
    _warn(left)  # last: a warning may be an error here, and must not leave us half way
    return _in_force


def _update_rows() -> None:
    """Other models are accelerated now."""
    _fix_settings()
    rows = [row for row in _applied if activation.is_active(row.target)]
    _warn(_install(rows, settings.active()))


def _fix_settings() -> None:
    """Without patch(), those of the environment hold from the first accelerated model on."""
    global _of_models
    if not activation.accelerated:
        _of_models = None
    elif _in_force is None and _of_models is None:
        _of_models = Settings.from_environment()
    if _in_force is None:
        settings.activate(_of_models)


def _warn(messages: list[str]) -> None:
    """Tells of places that were left as they are."""
    for message in messages:
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _rows_for(wanted: Settings | None) -> tuple[list[Row], dict[str, tuple[str, ...]]]:
    """The rows that `wanted` asks for and that can be applied; the reasons against the others."""
    if wanted is None:
        return [], {}
    targets = TARGETS if wanted.targets is None else wanted.targets
    if wanted.mode == "off":
        return [], {target: ("mode is 'off'",) for target in targets}
    return _applicable(targets)


def _applicable(targets: Iterable[str]) -> tuple[list[Row], dict[str, tuple[str, ...]]]:
    """The rows of these targets that can be applied; the reasons against the others, by target."""
    rows: list[Row] = []
    refused: dict[str, tuple[str, ...]] = {}
    for target in targets:
        of_target = [row for row in TABLE if row.target == target]
        if reasons := versions.reasons_against(target) or _taken(of_target):
            refused[target] = tuple(reasons)
        else:
            rows += of_target
    return rows, refused


def _targets_of_decodes(wanted: Settings | None) -> list[str]:
    """What accelerated models decode with, as far as the settings have it."""
    targets = TARGETS if wanted is None or wanted.targets is None else wanted.targets
    return [target for target in _OF_DECODES if target in targets]


def _install(rows: list[Row], wanted: Settings | None) -> list[str]:
    """Have these rows applied, and what accelerated models decode with; no others.

    Returns a message for each place that somebody else has changed, and that is left as it is.
    """
    if activation.accelerated:
        targets = _targets_of_decodes(wanted)
        applicable, _ = _applicable(targets)
        applied = [row for row in _applied if row.target in targets]
        rows = list(dict.fromkeys([*rows, *applicable, *applied]))
    _apply([row for row in rows if row not in _applied])
    return _undo([row for row in _applied if row not in rows])


def _taken(rows: list[Row]) -> list[str]:
    """Which of these attributes hold somebody else's object: neither upstream's own nor ours."""
    reasons = []
    for row in rows:
        current = row.current()
        # Before the first patch(), the structure checks have seen that it is upstream's own.
        if current is not _applied.get(row, activation.originals.get(row.name, current)):
            reasons.append(f"{row.name} was replaced by {_describe(current)}")
    return reasons


def _apply(rows: list[Row]) -> None:
    # Import every replacement before the first row changes: they extend upstream's own classes.
    replacements = {row: row.load_replacement() for row in rows}
    try:
        for row, replacement in replacements.items():
            activation.originals.setdefault(row.name, row.current())  # the first one saved wins
            row.put(replacement)
            _applied[row] = replacement
            if isinstance(activation.originals[row.name], type):
                pickling.by_name(activation.originals[row.name])
    except BaseException:  # KeyboardInterrupt as well: never half patched
        for row, replacement in replacements.items():
            _applied.pop(row, None)
            if row.current() is replacement:
                _put_back(row)
        raise


def _undo(rows: list[Row]) -> list[str]:
    """Put upstream's own back where it is still ours; return a message for each other place."""
    left = []
    for row in rows:
        current = row.current()
        if current is _applied.pop(row):
            _put_back(row)
        else:
            left.append(
                f"{row.name} was replaced by {_describe(current)} after whisper_max.patch(), "
                "and is left as it is; undo patches in the reverse order of applying them"
            )
    return left


def _put_back(row: Row) -> None:
    original = activation.originals[row.name]
    row.put(original)
    if isinstance(original, type):
        pickling.as_usual(original)


def _describe(thing: object) -> str:
    module = getattr(thing, "__module__", type(thing).__module__)
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    return f"{module}.{name}"


def _warn_of_differences(in_force: Settings, wanted: Settings, named: list[str]) -> None:
    differing = [name for name in named if getattr(wanted, name) != getattr(in_force, name)]
    if differing:
        kept = ", ".join(f"{name}={getattr(in_force, name)!r}" for name in differing)
        asked = ", ".join(f"{name}={getattr(wanted, name)!r}" for name in differing)
        warnings.warn(
            f"whisper is already patched with {kept}, which stays; {asked} is ignored. "
            "To change it, call whisper_max.unpatch() first.",
            RuntimeWarning,
            stacklevel=3,
        )
