"""Word timestamps on MAX: `whisper.timing.find_alignment`.

Upstream's own function runs, on a stand-in for the model: instead of a hooked forward pass on
PyTorch with its attention taken apart, it gets logits and cross-attention scores from MAX.
"""

from __future__ import annotations

import builtins
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from types import FunctionType, SimpleNamespace
from typing import TYPE_CHECKING

from torch import Tensor, nn
from whisper import timing
from whisper.model import Whisper

from . import activation, first_use, listeners, live_models, settings
from .activation import originals
from .changed_parts import CALLS, has_replaced
from .conditions import bypass_reasons, device_of, tensor_reasons
from .dispatch import refuse, run
from .text_decoder import audio_reasons, call_reasons

if TYPE_CHECKING:
    from whisper.timing import WordTiming
    from whisper.tokenizer import Tokenizer

upstream_find_alignment = originals.get("whisper.timing.find_alignment", timing.find_alignment)


def find_alignment(
    model: Whisper,
    tokenizer: Tokenizer,
    text_tokens: list[int],
    mel: Tensor,
    num_frames: int,
    *,
    medfilt_width: int = 7,
    qk_scale: float = 1.0,
) -> list[WordTiming]:
    """Start, end and probability of each word, as upstream's `find_alignment`.

    mel : torch.Tensor, shape = (n_mels, 2 * n_audio_ctx)
    num_frames : how many of those 10 ms frames hold audio

    Raises UnsupportedByMax in mode "strict" where MAX cannot run the call.
    """

    def with_model(function: Callable, model: object) -> list[WordTiming]:
        return function(
            model,
            tokenizer,
            text_tokens,
            mel,
            num_frames,
            medfilt_width=medfilt_width,
            qk_scale=qk_scale,
        )

    return run(
        "alignment",
        activation.why_off("alignment", getattr(model, "decoder", None)),
        lambda: with_model(_without_switch(upstream_find_alignment), _StandIn(model)),
        lambda: with_model(upstream_find_alignment, model),
        _differ,
    )


def _without_switch(function: FunctionType) -> FunctionType:
    """Upstream's function as it is, but for `disable_sdpa()`, which does nothing.

    That switch is every thread's, and a decode that begins in another one meanwhile would heed it.
    A stand-in has no attention for it to change. The function imports it when it is called, so
    only that import has to be answered; other names are looked up in the module as it is now.
    """

    def answer(name: str, *scope_and_level: object) -> object:
        if name == "model" and scope_and_level[2] == ("disable_sdpa",):
            return SimpleNamespace(disable_sdpa=nullcontext)
        return builtins.__import__(name, *scope_and_level)

    names = {**vars(timing), "__builtins__": {**vars(builtins), "__import__": answer}}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class _StandIn:
    """As much of a model as find_alignment uses: forward hooks on cross attention, and a call."""

    def __init__(self, model: Whisper) -> None:
        live_models.adopt(model)
        if not live_models.is_max(getattr(model, "decoder", None)):
            refuse(["the decoder is not on MAX"])
        # Upstream calls both; the stand-in calls neither.
        refuse([*bypass_reasons("model", model), *bypass_reasons("decoder", model.decoder)])
        if has_replaced(model, "forward", "whisper.model"):
            refuse([f"{type(model).__qualname__} has another forward"])
        if any(has_replaced(model, name, nn.Module.__module__) for name in CALLS):
            refuse([f"{type(model).__qualname__} has another __call__"])
        self.model = model
        self.dims = model.dims
        self.device = model.device
        self.alignment_heads = model.alignment_heads
        self._hooks: dict[int, Callable] = {}
        blocks = [
            SimpleNamespace(cross_attn=_Hookable(self._hooks, layer))
            for layer, _ in enumerate(model.decoder.blocks)  # it may have no len()
        ]
        self.decoder = SimpleNamespace(blocks=blocks)

    def __call__(self, mel: Tensor, tokens: Tensor) -> Tensor:
        """Logits, shape = (1, tokens, n_vocab); the hooks get the scores of the alignment heads."""
        decoder = self.model.decoder
        # Before the encoder runs, which PyTorch would run again.
        refuse(call_reasons(decoder, tokens) or tensor_reasons("mel", mel, device_of(decoder)))
        refuse(listeners.hook_points_of(decoder).reasons())
        shape = tuple(self.alignment_heads.shape)
        if shape != (len(decoder.blocks), decoder.blocks[0].attn.n_head):
            refuse([f"alignment_heads have the shape {shape}"])
        if _hears_twice(decoder):
            refuse(["a cross-attention module stands in two places, and is heard in both"])
        first_use.runtime().ready_to_decode(decoder, mel, settings.active())
        features = self.model.encoder(mel)
        refuse(audio_reasons(decoder, tokens, features))
        session = first_use.runtime().open_session(decoder, features, 1, settings.active())
        heads = self.alignment_heads.indices().T.tolist()
        logits, scores = session.align(tokens, heads)
        shape = (1, decoder.blocks[0].cross_attn.n_head, *scores.shape[1:])
        by_layer = {layer: scores.new_zeros(shape) for layer, _ in heads}
        for slot, (layer, head) in enumerate(heads):
            by_layer[layer][0, head] = scores[slot]
        for layer, qk in by_layer.items():
            if layer in self._hooks:
                self._hooks[layer](None, None, (None, qk))
        return logits.unsqueeze(0)


def _hears_twice(decoder: nn.Module) -> bool:
    """Whether upstream's hooks on cross attention are called for more than one attention each."""
    crossing = [block.cross_attn for block in decoder.blocks]
    attending = Counter(map(id, [*crossing, *(block.attn for block in decoder.blocks)]))
    return any(attending[id(module)] > 1 for module in crossing)


class _Hookable:
    """A cross-attention module that can be given one hook."""

    def __init__(self, hooks: dict[int, Callable], layer: int) -> None:
        self._hooks, self._layer = hooks, layer

    def register_forward_hook(self, hook: Callable) -> SimpleNamespace:
        self._hooks[self._layer] = hook
        return SimpleNamespace(remove=lambda: self._hooks.pop(self._layer, None))


def _differ(found: list[WordTiming], expected: list[WordTiming]) -> str | None:
    if [(w.word, w.tokens) for w in found] != [(w.word, w.tokens) for w in expected]:
        return "the words differ"
    pairs = list(zip(found, expected))
    worst = max((max(abs(f.start - e.start), abs(f.end - e.end)) for f, e in pairs), default=0)
    return f"word times by up to {worst:.2f} s" if worst > 0.02 else None
