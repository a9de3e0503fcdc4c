"""The audio encoder on MAX: `whisper.model.AudioEncoder` with another `forward`."""

from __future__ import annotations

import torch
from torch import Tensor
from whisper.model import AudioEncoder

from . import activation, first_use, listeners, settings
from .activation import originals
from .changed_parts import encoder_changes
from .class_swap import SwappedModule, note_pytorch
from .conditions import (
    context_reasons, device_of, device_reasons, mel_reasons, tensor_reasons
)
from .dispatch import refuse, run
from .shadow import tensors_differ

UpstreamAudioEncoder: type[AudioEncoder] = originals.get("whisper.model.AudioEncoder", AudioEncoder)


class MaxAudioEncoder(SwappedModule, UpstreamAudioEncoder):
    """openai-whisper's AudioEncoder; its forward runs on MAX where that gives the same result."""

    _upstream = "AudioEncoder"

    def forward(self, x: Tensor) -> Tensor:
        """Encodes mel spectrograms, as upstream's `AudioEncoder.forward`.

        x : torch.Tensor, shape = (batch_size, n_mels, 2 * n_audio_ctx), float32 on MAX
            log-mel spectrograms, 10 ms a frame

        Returns features, shape = (batch_size, n_audio_ctx, n_audio_state), in fresh memory.
        Raises UnsupportedByMax in mode "strict" where MAX cannot run the call.
        """
        if torch.compiler.is_compiling():  # none of our bookkeeping goes into a compiled graph
            return UpstreamAudioEncoder.forward(self, x)
        hooks = listeners.HookCalls()

        def on_torch() -> Tensor:
            # By their classes: another thread's unpatch() may take ours from the module meanwhile.
            note_pytorch(self, encoder_changes)
            with hooks.on_pytorch():
                return UpstreamAudioEncoder.forward(self, x)

        return run(
            "encoder",
            activation.why_off("encoder", self),
            lambda: MaxAudioEncoder._on_max(self, x, hooks),
            on_torch,
            tensors_differ,
        )

    def _on_max(self, mel: Tensor, hooks: listeners.HookCalls) -> Tensor:
        active = settings.active()
        device = device_of(self)
        refuse(context_reasons(self) or device_reasons(device, active.device))
        refuse([*tensor_reasons("mel", mel, device), *encoder_changes(self)])
        refuse(mel_reasons(mel, self.conv1.weight.shape[1], 2 * len(self.positional_embedding)))
        hooks.encoder(listeners.hook_points_of(self), mel)
        return first_use.runtime().encode(self, mel, active)
