"""compile(): prepare the compiled graphs ahead of the first run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import report, settings, versions
from .changed_parts import head_reasons
from .conditions import UnsupportedByMax
from .dimensions_of import OFFICIAL, dimensions_of
from .dispatch import refuse
from .settings import EXACT_PRECISIONS, Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .runtime.artifact_key import ArtifactKey

    Source = nn.Module | str | os.PathLike[str]


logger = logging.getLogger("whisper_max")


def compile(
    model_or_name: Source | None = None,
    *,
    precision: str | None = None,
    device: str | None = None,
    progress: bool = True,
) -> list[Path]:
    """Compile what a model needs to run on MAX, or find that it is there, and wait for it.

    The graphs have no fixed sizes, so what serves one model serves all of them. Only the weights'
    form makes a difference: in the precisions "high" and "highest" they are held in float16 where
    that is exact, as for all official models, and in float32 where it is not. Graphs for a GPU do
    have a model's sizes, and are for that GPU.

    model_or_name : an official name ("tiny.en" … "turbo"), which needs no download; a checkpoint
        file or a loaded model, whose weights are then looked at; None stands for any official model
    precision, device : as for patch(); default: those in force. "cuda" is PyTorch's current one,
        in float16, which whisper decodes in there if it is not told otherwise
    progress : show a progress bar on stderr

    Returns the compiled files. Raises UnsupportedByMax when MAX cannot run the model or the
    compile fails, with the reasons; ValueError for an unknown name or setting, and TypeError for
    an object that is no model.
    """
    changed = {"precision": precision, "device": device}
    wanted = replace(settings.active(), **{k: v for k, v in changed.items() if v is not None})
    wanted_keys = artifact_keys(model_or_name, wanted)

    from .runtime import artifacts, compilation
    from .runtime.cache_folder import CacheRefused

    files = []
    for keys in wanted_keys:
        try:
            key, state = compilation.ensure_first(
                keys, wanted.cache_dir, "blocking", progress=progress, force=True
            )
        except CacheRefused as refused:
            raise UnsupportedByMax(str(refused)) from refused
        file = artifacts.find(key, wanted.cache_dir) if state.ready else None
        if file is None:
            raise UnsupportedByMax(state.reason)
        files.append(file)
    return files


def start(wanted: Settings) -> None:
    """Begin to compile what the official models need, in the background, and return at once.

    Nothing is raised: where it cannot be done, a call that would need it says why. On a GPU a
    model's first call begins, since only then its sizes are known.
    """
    if wanted.device == "cuda":
        return
    from .runtime import compilation
    from .runtime.cache_folder import CacheRefused

    try:
        for keys in artifact_keys(None, wanted):
            _, state = compilation.ensure_first(keys, wanted.cache_dir, "background")
            report.set_artifact(state.name)
    except (CacheRefused, UnsupportedByMax) as refused:
        logger.warning("nothing can be compiled, PyTorch does the work: %s", refused)


def artifact_keys(
    model_or_name: Source | None, wanted: Settings
) -> list[tuple[ArtifactKey, ...]]:
    """What has to be compiled for a model (see `compile`), without compiling it.

    Each with what is to be compiled where that fails.

    Raises as `compile` does.
    """
    if model_or_name is not None:
        dims = dimensions_of(model_or_name)
        for part in ("audio", "text"):
            refuse(head_reasons(dims[f"n_{part}_head"], dims[f"n_{part}_state"]))
    refuse(versions.environment_reasons())
    if wanted.device == "cuda":
        if model_or_name is None:
            refuse(["graphs for a GPU have the sizes of one model, which has to be named"])
        return _gpu_keys(dims, wanted)

    from .runtime.storage import arithmetic_of, keys_of

    wanted_of_parts = dict.fromkeys(
        arithmetic_of(wanted.precision, exact) for exact in _exact_parts(model_or_name, wanted)
    )
    return [keys_of(arithmetic, wanted.cpu_level) for arithmetic in wanted_of_parts]


def _gpu_keys(dims: Mapping[str, int], wanted: Settings) -> list[tuple[ArtifactKey, ...]]:
    import torch

    if not torch.cuda.is_available():
        refuse(["PyTorch finds no NVIDIA GPU"])

    from .runtime.gpu.devices import cuda_device
    from .runtime.gpu.state import keys_of

    max_device = cuda_device(torch.device("cuda", torch.cuda.current_device()))
    keys = keys_of(dims, "float16", max_device.architecture, wanted.cpu_level)
    return [(key,) for key in keys.values()]


def _exact_parts(model_or_name: Source | None, wanted: Settings) -> Iterator[bool]:
    """Whether float16 holds the encoder's weights exactly, and whether the decoder's."""
    if wanted.precision not in EXACT_PRECISIONS:  # float16 or int8 in any case
        yield True
        return
    if model_or_name is None or model_or_name in OFFICIAL:
        yield True  # published in float16
        return

    from .runtime.weights import exact_in_float16, matrices

    state = _state_of(model_or_name)
    for part in ("encoder", "decoder"):
        named = {name: tensor for name, tensor in state.items() if name.startswith(f"{part}.")}
        yield exact_in_float16(matrices(named))


def _state_of(model_or_file: Source) -> Mapping[str, Tensor]:
    if not isinstance(model_or_file, (str, os.PathLike)):
        return model_or_file.state_dict()
    import torch

    return torch.load(model_or_file, map_location="cpu", weights_only=True)["model_state_dict"]
