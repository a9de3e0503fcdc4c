"""The text decoder on MAX: `whisper.model.TextDecoder` with another `forward`."""

from __future__ import annotations

import torch
from torch import Tensor
from whisper.model import TextDecoder

from . import activation, first_use, listeners, settings
from .activation import originals
from .changed_parts import decoder_changes
from .class_swap import SwappedModule, note_pytorch
from .conditions import (
    context_reasons, device_of, device_reasons, features_reasons, tensor_reasons, tokens_reasons
)
from .dispatch import refuse, run
from .shadow import tensors_differ

UpstreamTextDecoder: type[TextDecoder] = originals.get("whisper.model.TextDecoder", TextDecoder)


class MaxTextDecoder(SwappedModule, UpstreamTextDecoder):
    """openai-whisper's TextDecoder; its forward runs on MAX where that gives the same result."""

    _upstream = "TextDecoder"

    def forward(self, x: Tensor, xa: Tensor, kv_cache: dict | None = None) -> Tensor:
        """Logits of whole sequences, as upstream's `TextDecoder.forward`.

        x : torch.Tensor, shape = (batch_size, <= n_text_ctx), integers
            the text tokens
        xa : torch.Tensor, shape = (batch_size or 1, n_audio_ctx, n_audio_state), float32 on MAX
            the encoded audio
        kv_cache : a caller's own cache; such a call is PyTorch's

        Returns logits, shape = (batch_size, tokens, n_vocab), float32, in fresh memory. Raises
        UnsupportedByMax in mode "strict" where MAX cannot run the call.
        """
        if torch.compiler.is_compiling():  # none of our bookkeeping goes into a compiled graph
            return UpstreamTextDecoder.forward(self, x, xa, kv_cache)
        hooks = listeners.HookCalls()

        def on_torch() -> Tensor:
            # By their classes: another thread's unpatch() may take ours from the module meanwhile.
            if not kv_cache:  # a step of a decode follows others, at whose first this was done
                note_pytorch(self, decoder_changes)
            with hooks.on_pytorch():
                return UpstreamTextDecoder.forward(self, x, xa, kv_cache)

        return run(
            "decoder",
            activation.why_off("decoder", self),
            lambda: MaxTextDecoder._on_max(self, x, xa, kv_cache, hooks),
            on_torch,
            tensors_differ,
        )

    def _on_max(
        self, tokens: Tensor, features: Tensor, kv_cache: dict | None, hooks: listeners.HookCalls
    ) -> Tensor:
        if kv_cache is not None:
            refuse(["the call brings its own kv_cache"])
        refuse(decoder_reasons(self, tokens, features))
        session = first_use.runtime().open_session(self, features, len(tokens), settings.active())
        return hooks.decoder(listeners.hook_points_of(self), session, tokens, features)


def call_reasons(decoder: TextDecoder, tokens: Tensor) -> list[str]:
    """Reasons against decoding these tokens on MAX, whatever the audio features."""
    device = device_of(decoder)
    reasons = (
        context_reasons(decoder)
        or device_reasons(device, settings.active().device)
        or decoder_changes(decoder)
    )
    if reasons:
        return reasons
    n_text_ctx = len(decoder.positional_embedding)
    return tokens_reasons(tokens, n_text_ctx, len(decoder.token_embedding.weight), device)


def decoder_reasons(decoder: TextDecoder, tokens: Tensor, features: Tensor) -> list[str]:
    """Reasons against decoding these tokens with these audio features on MAX."""
    return call_reasons(decoder, tokens) or audio_reasons(decoder, tokens, features)


def audio_reasons(decoder: TextDecoder, tokens: Tensor, features: Tensor) -> list[str]:
    """Those that lie in the features, for tokens that nothing is against."""
    reasons = tensor_reasons("audio features", features, device_of(decoder))
    reasons = reasons or features_reasons(features, decoder.positional_embedding.shape[1])
    if not reasons and len(features) not in (1, len(tokens)):
        reasons.append(
            f"{len(tokens)} rows of tokens do not go with {len(features)} windows of audio"
        )
    return reasons
