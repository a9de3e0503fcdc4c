"""The dimensions of a model, from its name, its checkpoint file, or the model itself."""

from __future__ import annotations

import dataclasses
import os
import pickle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# By size: width, heads and layers, the same in encoder and decoder (openai/whisper, README.md).
_SIZES = {
    "tiny": (384, 6, 4),
    "base": (512, 8, 6),
    "small": (768, 12, 12),
    "medium": (1024, 16, 24),
    "large": (1280, 20, 32),
}
_ENGLISH_VOCABULARY = 51864
_MULTILINGUAL_VOCABULARY = 51865
_LARGE_V3_VOCABULARY = 51866  # one language more: Cantonese
_TURBO_TEXT_LAYERS = 4

# What torch's reader of safe pickles ends with on files of other kinds.
_UNREADABLE = (
    AssertionError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def _dimensions(
    size: str, n_vocab: int, n_mels: int = 80, n_text_layer: int | None = None
) -> dict[str, int]:
    width, heads, layers = _SIZES[size]
    return {
        "n_mels": n_mels,
        "n_audio_ctx": 1500,
        "n_audio_state": width,
        "n_audio_head": heads,
        "n_audio_layer": layers,
        "n_vocab": n_vocab,
        "n_text_ctx": 448,
        "n_text_state": width,
        "n_text_head": heads,
        "n_text_layer": layers if n_text_layer is None else n_text_layer,
    }


_LARGE_V2 = _dimensions("large", _MULTILINGUAL_VOCABULARY)
_LARGE_V3 = _dimensions("large", _LARGE_V3_VOCABULARY, n_mels=128)
_TURBO = _dimensions("large", _LARGE_V3_VOCABULARY, n_mels=128, n_text_layer=_TURBO_TEXT_LAYERS)

# By official name, as in `whisper.available_models()`: the fields of whisper.model.ModelDimensions.
OFFICIAL: dict[str, dict[str, int]] = {
    **{
        f"{size}.en": _dimensions(size, _ENGLISH_VOCABULARY)
        for size in ("tiny", "base", "small", "medium")
    },
    **{
        size: _dimensions(size, _MULTILINGUAL_VOCABULARY)
        for size in ("tiny", "base", "small", "medium")
    },
    "large-v1": _LARGE_V2,
    "large-v2": _LARGE_V2,
    "large-v3": _LARGE_V3,
    "large": _LARGE_V3,
    "large-v3-turbo": _TURBO,
    "turbo": _TURBO,
}


def dimensions_of(model_or_name: nn.Module | str | os.PathLike[str]) -> dict[str, int]:
    """The fields of `whisper.model.ModelDimensions`, for a model to come or one at hand.

    model_or_name : an official name ("tiny.en" … "large-v3", "turbo"), which needs no download;
        the path of a checkpoint, of which only the dimensions are read; or a loaded model

    Raises ValueError for a name that is neither official nor a file, and for a file that is no
    checkpoint of openai-whisper; TypeError for an object without dimensions.
    """
    if isinstance(model_or_name, str) and model_or_name in OFFICIAL:
        return dict(OFFICIAL[model_or_name])
    if isinstance(model_or_name, (str, os.PathLike)):
        return _of_checkpoint(os.fspath(model_or_name))
    dims = getattr(model_or_name, "dims", None)
    if not dataclasses.is_dataclass(dims):
        raise TypeError(
            "expected the name, checkpoint file or model of openai-whisper, "
            f"not {type(model_or_name).__name__}"
        )
    return dataclasses.asdict(dims)


def _of_checkpoint(path: str) -> dict[str, int]:
    if not os.path.isfile(path):
        raise ValueError(
            f"{path!r} is neither an official model nor a file; "
            f"official models are {', '.join(OFFICIAL)}"
        )
    import torch

    try:
        # On the meta device the weights are not read.
        checkpoint = torch.load(path, map_location="meta", weights_only=True)
        return dict(checkpoint["dims"])
    except _UNREADABLE as error:
        # Not torch's own text: it advises to load the file without its safeguards.
        raise ValueError(f"{path!r} is not a whole checkpoint of openai-whisper") from error
