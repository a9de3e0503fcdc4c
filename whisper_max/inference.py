"""The decoder inside upstream's decoding loop, on MAX: `whisper.decoding.PyTorchInference`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from whisper.decoding import PyTorchInference

from . import activation, first_use, listeners, live_models, on_one_thread, report, settings
from .activation import originals
from .changed_parts import has_replaced
from .conditions import UnsupportedByMax, bypass_reasons, tokens_reasons
from .dispatch import on_pytorch, out_of_memory_is_unsupported, refuse
from .text_decoder import decoder_reasons

if TYPE_CHECKING:
    from torch import nn
    from whisper.model import Whisper

    from .runtime.by_device import Session

UpstreamInference: type[PyTorchInference] = originals.get(
    "whisper.decoding.PyTorchInference", PyTorchInference
)


class MaxInference(UpstreamInference):
    """One decode. The path is chosen at its first step and stays, unless MAX fails.

    model : the model that decodes; one loaded before patch() is taken up here
    initial_token_length : tokens of the prompt, after which one is decoded at a time
    """

    # Of the class: a subclass may set upstream's attributes by itself.
    session: Session | None = None
    _torch_reasons: list[str] | None = None
    _features: Tensor | None = None
    _decoded: Tensor | None = None
    _listening: listeners.HookPoints | None = None

    def __init__(self, model: Whisper, initial_token_length: int) -> None:
        super().__init__(model, initial_token_length)
        live_models.adopt(model)

    @property
    def kv_cache(self) -> dict:
        """Upstream's caches, by module; empty before the first step.

        Who asks for them in a decode on MAX may change them: PyTorch fills them, and goes on. In
        mode "strict" UnsupportedByMax is raised instead.
        """
        if self.session is not None and self._decoded is not None:
            reasons = ["its kv_cache was asked for"]
            if settings.active().mode == "strict":
                refuse(reasons)
            self.leave_to_pytorch(reasons)
            self._fill_caches()
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, caches: dict) -> None:
        """Other caches are another decode: the next step chooses its path anew."""
        self._kv_cache = caches
        if self.session is not None:
            self._end()

    def logits(self, tokens: Tensor, audio_features: Tensor) -> Tensor:
        """Logits of all new tokens, as upstream's `PyTorchInference.logits`.

        tokens : torch.Tensor, shape = (n_batch, current_sequence_length), integers
        audio_features : torch.Tensor, shape = (n_batch or 1, n_audio_ctx, n_audio_state)

        Returns shape = (n_batch, new tokens, n_vocab), float32, in fresh memory. Raises
        UnsupportedByMax in mode "strict" where MAX cannot run the decode.
        """
        if self.session is None and self._torch_reasons is None:
            self._choose(tokens, audio_features)
        if self._torch_reasons is not None:
            step = super().logits
            return on_pytorch(
                "inference", lambda: step(tokens, audio_features), self._torch_reasons
            )
        begin = time.perf_counter()
        hooks = listeners.HookCalls()
        on_one_thread.hold()
        reasons: Sequence[str] | None = None
        try:
            with out_of_memory_is_unsupported():
                logits = self._step(tokens, audio_features, hooks)
        except UnsupportedByMax as failed:
            if settings.active().mode == "strict":
                raise
            reasons = failed.reasons
        # The exception is over: PyTorch's have no context then, and what MAX held is freed.
        if reasons is not None:
            self.leave_to_pytorch(reasons)
            return on_pytorch(
                "inference",
                lambda: self._resume(tokens, audio_features, hooks),
                self._torch_reasons,
            )
        report.record("inference", "max", time.perf_counter() - begin)
        return logits

    def rearrange_kv_cache(self, source_indices: list[int]) -> None:
        """Row i continues what row source_indices[i] was."""
        if self.session is None:
            super().rearrange_kv_cache(source_indices)
        elif source_indices != list(range(len(source_indices))):
            if self._decoded is not None:
                self._decoded = self._decoded[source_indices]
            if len(source_indices) == self.session.rows:
                self.session.reorder(source_indices)
            # With more rows or fewer the next step refuses, and PyTorch goes on.

    def cleanup_caching(self) -> None:
        """Ends the decode; the next one chooses its path anew."""
        self._end()
        super().cleanup_caching()

    def _end(self) -> None:
        on_one_thread.release()
        self.session = self._torch_reasons = None
        self._features = self._decoded = self._listening = None

    def start(
        self, tokens: Tensor, audio_features: Tensor, *, refuse_hooks: bool = False
    ) -> None:
        """Opens the session of this decode; raises UnsupportedByMax with the reasons against it.

        refuse_hooks : whether hooks that listen inside the decoder are such a reason
        """
        refuse(inference_reasons(self, tokens, audio_features))
        self._listening = listeners.hook_points_of(self.model.decoder)
        if refuse_hooks:
            refuse(self._listening.reasons())
        with out_of_memory_is_unsupported():
            self.session = first_use.runtime().open_session(
                self.model.decoder, audio_features, len(tokens), settings.active()
            )
        self._features = audio_features

    def leave_to_pytorch(self, reasons: Sequence[str]) -> None:
        """Ends the session: the rest of this decode runs on PyTorch, for these reasons."""
        on_one_thread.release()
        self.session = None
        self._torch_reasons = list(reasons)

    def _choose(self, tokens: Tensor, audio_features: Tensor) -> None:
        if settings.active().mode == "shadow":
            # The main loop is what is compared; this is PyTorch's side of it.
            self.leave_to_pytorch(["shadow"])
            return
        off = activation.why_off("inference", self.model.decoder)
        if off is not None:  # the user's own wish: mode "strict" does not object
            self.leave_to_pytorch([off])
            return
        try:
            self.start(tokens, audio_features)
        except UnsupportedByMax as unsupported:
            if settings.active().mode == "strict":
                raise
            self.leave_to_pytorch(unsupported.reasons)

    def _step(self, tokens: Tensor, features: Tensor, hooks: listeners.HookCalls) -> Tensor:
        session, decoded = self.session, self._decoded
        for rows in (tokens, *([] if decoded is None else [decoded])):
            if len(rows) != session.rows:
                refuse([f"the decode began with {session.rows} rows and goes on with {len(rows)}"])
        n_vocab = len(self.model.decoder.token_embedding.weight)
        device = self._features.device
        refuse(tokens_reasons(tokens, tokens.shape[-1], n_vocab, device))
        new = tokens if tokens.shape[-1] <= self.initial_token_length else tokens[:, -1:]
        if decoded is not None and new.shape[1] > 1:
            # Upstream appends them all, under a mask made for the beginning of a text.
            refuse(["a second prompt in an open decode"])
        logits = hooks.decoder(self._listening, session, new, features)
        self._decoded = new if decoded is None else torch.cat([decoded, new], dim=1)
        return logits

    def _resume(self, tokens: Tensor, audio_features: Tensor, hooks: listeners.HookCalls) -> Tensor:
        """PyTorch takes over in the middle: what MAX has decoded goes into its caches first."""
        if self._decoded is not None:
            self._fill_caches()
        with hooks.on_pytorch():
            return super().logits(tokens, audio_features)

    def _fill_caches(self) -> None:
        self.kv_cache, self.hooks = self.model.install_kv_cache_hooks()
        with self._listening.silenced():  # they have heard of it
            self.model.decoder(self._decoded, self._features, kv_cache=self.kv_cache)


def inference_reasons(
    inference: MaxInference, tokens: Tensor, audio_features: Tensor
) -> list[str]:
    """Reasons against a decode on MAX."""
    model = inference.model
    reasons = []
    off = activation.why_off("inference", model.decoder)
    if off is not None:
        reasons.append(off)
    if not live_models.is_max(model.decoder):  # nor need it be a module, upstream
        return [*reasons, "the decoder is not on MAX"]
    if inference._kv_cache:
        reasons.append("its kv_cache was filled by somebody else")
    if has_replaced(model, "install_kv_cache_hooks", "whisper.model"):
        reasons.append("the model's install_kv_cache_hooks was replaced")
    reasons += bypass_reasons("decoder", model.decoder)
    reasons += decoder_reasons(model.decoder, tokens, audio_features)
    if not reasons:
        n_text_ctx = max(model.dims.n_text_ctx, len(model.decoder.positional_embedding))
        if audio_features.shape[1] <= n_text_ctx:
            # Upstream tells cross attention's cache from self-attention's by this length.
            reasons.append(f"the audio context is not longer than the text context, {n_text_ctx}")
        if _shares_caches(model.decoder):
            reasons.append(
                "a key or value layer stands in two places, whose caches are one upstream"
            )
    return reasons


def _shares_caches(decoder: nn.Module) -> bool:
    """Whether upstream keeps the keys or values of two places as one: its caches go by module."""
    cached = [
        block._modules[attention]._modules[layer]  # faster than attributes, at every decode
        for block in decoder.blocks
        for attention in ("attn", "cross_attn")
        for layer in ("key", "value")
    ]
    return len(set(cached)) < len(cached)
