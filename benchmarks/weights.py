"""Weights, made once: random ones of the real sizes, grown ones, the conversions for each peer.

Official checkpoints hold float16 numbers, which openai-whisper widens to float32. The random ones
do too, so that every peer gets the same numbers.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from whisper.model import ModelDimensions, Whisper

from whisper_max.dimensions_of import dimensions_of

from .grown import grow
from .models import GROWN, GROWN_SIZE, Model
from .places import BUNDLED_CHECKPOINT

SEED = 2022


def prepare(model: Model, say: Callable[[str], None]) -> None:
    """Makes what is missing of a model's files, as far as the packages for it are installed.

    say : is told what is being made
    """
    if not model.checkpoint.exists():
        if model.name == GROWN:
            say(f"growing the bundled checkpoint to the size of {GROWN_SIZE}")
            _complete(model.checkpoint, save_grown)
        else:
            say(f"making random weights of the size of {model.name}")
            _complete(model.checkpoint, lambda path: save_random(model, path))
    if importlib.util.find_spec("transformers") is None:
        return
    from . import conversion

    if not model.transformers.exists():
        say(f"converting {model.name} for transformers")
        _complete(model.transformers, lambda path: conversion.to_transformers(model, path))
    if importlib.util.find_spec("ctranslate2") and not model.ctranslate2.exists():
        say(f"converting {model.name} for CTranslate2")
        _complete(model.ctranslate2, lambda path: conversion.to_ctranslate2(model, path))


def save_random(model: Model, path: Path) -> None:
    """Writes a checkpoint in openai-whisper's format, the same at every call."""
    dims = model.dimensions()
    torch.save({"dims": dims, "model_state_dict": random_state(dims)}, path)


def save_grown(path: Path, size: str = GROWN_SIZE) -> None:
    """Writes a checkpoint that transcribes, of a real size, the same at every call."""
    small = torch.load(BUNDLED_CHECKPOINT, map_location="cpu", weights_only=True)
    dims = dict(dimensions_of(size))
    state = grow(small["dims"], small["model_state_dict"], dims)
    torch.save({"dims": dims, "model_state_dict": state}, path)


def random_state(dims: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """A state_dict in float16 of a model of these dimensions, the same at every call."""
    whisper = Whisper(ModelDimensions(**dims))
    generator = torch.Generator().manual_seed(SEED)
    return {
        name: _random(name, tensor, generator).half()
        for name, tensor in whisper.state_dict().items()
    }


def _random(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Numbers of a size that keeps activations near one, as trained ones do."""
    if name == "encoder.positional_embedding":
        return tensor  # sinusoids, and no parameter
    values = torch.randn(tensor.shape, generator=generator)
    if "embedding" in name:
        return 0.02 * values
    if tensor.ndim > 1:
        return values / tensor[0].numel() ** 0.5
    is_scale = name.endswith("weight")
    return (1.0 if is_scale else 0.0) + 0.02 * values


def _complete(path: Path, make: Callable[[Path], None]) -> None:
    """Makes a file or folder under another name first, so that it is whole where it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    make(unfinished)
    unfinished.replace(path)
