"""Stand-ins for the replacements, and copies of openai-whisper changed in one place.

The stand-ins take the replacements' module names, so that the real patch table is what is tested.
They run upstream's code, note in `calls` whether they would have used MAX, and nothing else.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from whisper_max import activation, live_models, report, settings, versions

UPSTREAM = {
    "encoder": "whisper.model.AudioEncoder",
    "decoder": "whisper.model.TextDecoder",
    "inference": "whisper.decoding.PyTorchInference",
    "decoding_loop": "whisper.decoding.DecodingTask._main_loop",
    "alignment": "whisper.timing.find_alignment",
}


def upstream(target: str) -> object:
    """What stands at the place of `target` in openai-whisper now, or None."""
    package, module, *path = UPSTREAM[target].split(".")
    thing: object = importlib.import_module(f"{package}.{module}")
    for part in path:
        thing = getattr(thing, part, None)
    return thing


def pretend_max_is_installed(monkeypatch: pytest.MonkeyPatch, version: str = "26.7.0") -> None:
    found = versions.installed
    monkeypatch.setattr(versions, "installed", lambda: {**found(), "max": version})


def start_unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """An own set of saved originals and counters, and no settings from the environment."""
    for variable in settings.ENVIRONMENT.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(activation, "originals", {})
    monkeypatch.setattr(report, "_counters", report._Counters())


def install_replacements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put the stand-ins where the patch table finds its replacements; return their call log."""
    model = importlib.import_module("whisper.model")
    decoding = importlib.import_module("whisper.decoding")
    main_loop = upstream("decoding_loop")
    run = decoding.DecodingTask.run
    align = upstream("alignment")
    calls: list[str] = []

    def note(target: str, module: object = None) -> None:
        calls.append(f"{target}: {activation.why_off(target, module) or 'MAX'}")

    class MaxAudioEncoder(model.AudioEncoder):
        def forward(self, x):
            note("encoder", self)
            return super().forward(x)

        def drop_max_state(self):
            calls.append("encoder: state dropped")

    class MaxTextDecoder(model.TextDecoder):
        def forward(self, x, xa, kv_cache=None):
            note("decoder", self)
            return super().forward(x, xa, kv_cache=kv_cache)

        def drop_max_state(self):
            calls.append("decoder: state dropped")

    class MaxInference(decoding.PyTorchInference):
        def __init__(self, model, initial_token_length):
            note("inference", model.decoder)
            live_models.adopt(model)
            super().__init__(model, initial_token_length)

    def max_main_loop(self, audio_features, tokens):
        note("decoding_loop", self.model.decoder)
        return main_loop(self, audio_features, tokens)

    def max_run(self, mel):
        return run(self, mel)

    def find_alignment(model, *args, **options):
        note("alignment", getattr(model, "decoder", None))
        return align(model, *args, **options)

    for name, replacement in (
        ("audio_encoder", MaxAudioEncoder),
        ("text_decoder", MaxTextDecoder),
        ("inference", MaxInference),
        ("decoding_loop", max_main_loop),
        ("decoding_task", max_run),
        ("alignment", find_alignment),
    ):
        module = ModuleType(f"whisper_max.{name}")
        setattr(module, replacement.__name__, replacement)
        replacement.__module__ = module.__name__
        replacement.__qualname__ = replacement.__name__
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def import_changed_whisper(
    monkeypatch: pytest.MonkeyPatch, folder: Path, file: str, old: str, new: str
) -> None:
    """Import, as whisper, a copy of openai-whisper with `old` replaced by `new` in one file."""
    import whisper

    copy = folder / "whisper"
    shutil.copytree(
        Path(whisper.__file__).parent, copy, ignore=shutil.ignore_patterns("assets", "__pycache__")
    )
    source = (copy / file).read_text(encoding="utf-8")
    assert old in source, f"{file} of openai-whisper {whisper.__version__} has no {old!r}"
    (copy / file).write_text(source.replace(old, new), encoding="utf-8")
    for name in list(sys.modules):
        if name.partition(".")[0] == "whisper":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)
    assert Path(importlib.import_module("whisper").__file__).parent == copy
