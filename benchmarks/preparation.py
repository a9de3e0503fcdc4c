"""What is made once, before anything is measured: inputs, weights, conversions, compiled graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import whisper_max

from . import inputs, weights
from .inputs import Inputs
from .models import WITH_WORDS, Model
from .peers import Entry
from .worker_process import PeerFailed, WorkerProcess


def prepare(
    models: Iterable[str],
    entries: Iterable[Entry],
    threads: int,
    work: Path,
    say: Callable[[str], None],
) -> None:
    """Makes what is missing.

    models : sizes; those that transcribe are prepared in any case
    entries : the peers that take part
    work : folder for all but whisper_max's graphs, which go into its own cache
    say : is told what is being made
    """
    sized = [Model(name, work) for name in models]
    for model in (*sized, *(Model(name, work) for name in WITH_WORDS)):
        weights.prepare(model, say)
        inputs.prepare(Inputs(work), model.n_mels, say)
    for entry in entries:
        if entry.ours:
            _compile_ours(entry, say)
        if entry.compiles_long:
            for model in sized:
                _compile_peer(entry, model, threads, say)


def _compile_ours(entry: Entry, say: Callable[[str], None]) -> None:
    try:
        whisper_max.compile(precision=entry.variant)
    except whisper_max.UnsupportedByMax as why:
        say(f"{entry.label} will run on PyTorch: {why}")


def _compile_peer(
    entry: Entry, model: Model, threads: int, say: Callable[[str], None]
) -> None:
    """Such a peer compiles when it is loaded."""
    if model.compile_note.exists():
        return
    say(f"{entry.label} compiles {model.name}, for minutes")
    try:
        WorkerProcess(entry, model.name, threads, model.work).close()
    except PeerFailed as failed:
        say(f"{entry.label} failed: {failed}")
