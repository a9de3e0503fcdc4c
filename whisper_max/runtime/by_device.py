"""On the CPU or on a GPU: what computes for a module, by where its tensors are."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor, nn

from .. import tensor_numbers
from ..settings import Settings
from . import load_max  # noqa: F401 - before the others, which import MAX, too
from .decoder_session import DecoderSession
from .model_state import state_of

if TYPE_CHECKING:
    from .gpu.devices import MaxDevice
    from .gpu.session import GpuSession

    Session = Union[DecoderSession, GpuSession]


def encode(encoder: nn.Module, mel: Tensor, settings: Settings) -> Tensor:
    """Audio features of an AudioEncoder, shape = (batch, n_audio_ctx, n_state), in fresh memory.

    mel : shape = (batch, n_mels, 2 * n_audio_ctx)

    Raises UnsupportedByMax while there is no engine, or where MAX fails.
    """
    max_device = _gpu_of(mel.device)
    if max_device is None:
        state = state_of(encoder, "encoder")
        ready = state.ready(encoder, settings)
    else:
        from .gpu.state import GpuState, audio_sizes

        state = state_of(encoder, "encoder", GpuState)
        ready = state.ready(encoder, settings, max_device, audio_sizes(encoder), mel.dtype)
    with nullcontext() if max_device is None else max_device.reading():
        features = state.features.find(ready, mel)
        if features is None:
            single = len(mel) == 1  # upstream encodes single windows again; batches are large
            if single:
                mel = tensor_numbers.copy(mel)  # before it is read: another thread may write there
            features = ready.encode(mel)
            if single:
                state.features.keep(ready, mel, features)
        return tensor_numbers.copy(features)  # the caller's own, to change as it likes


def ready_to_decode(decoder: nn.Module, mel: Tensor, settings: Settings) -> None:
    """Packs a TextDecoder's weights, if they are not, before the audio is encoded.

    mel : shape = (batch, n_mels, 2 * n_audio_ctx), on the decoder's device

    Raises UnsupportedByMax while there is no engine, or where the weights cannot be taken.
    """
    max_device = _gpu_of(mel.device)
    if max_device is None:
        state_of(decoder, "decoder").ready(decoder, settings)
        return
    from .gpu.state import GpuState, text_sizes

    sizes = text_sizes(decoder, mel.shape[-1] // 2)
    state_of(decoder, "decoder", GpuState).ready(decoder, settings, max_device, sizes, mel.dtype)


def open_session(
    decoder: nn.Module, features: Tensor, rows: int, settings: Settings
) -> Session:
    """A decode of a TextDecoder, where the features are.

    features : shape = (windows, n_audio_ctx, n_state)
    rows : sequences to decode, a multiple of the windows

    Raises UnsupportedByMax while there is no engine, or no memory.
    """
    max_device = _gpu_of(features.device)
    if max_device is None:
        return DecoderSession(decoder, features, rows, settings)
    from .gpu.session import GpuSession

    return GpuSession(decoder, features, rows, settings, max_device)


def _gpu_of(device: torch.device) -> MaxDevice | None:
    """None for the CPU, which has graphs of its own; `conditions` has settled what may run."""
    if device.type == "cpu":
        return None
    from .gpu import devices

    return devices.cuda_device(device)
