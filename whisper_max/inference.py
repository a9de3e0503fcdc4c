"""The decoder inside upstream's decoding loop, on MAX: `whisper.decoding.PyTorchInference`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import TYPE_CHECKING

import torch
import whisper.model
from torch import Tensor
from whisper.decoding import PyTorchInference

from . import activation, first_use, listeners, live_models, on_one_thread, report, settings
from .activation import originals
from .changed_parts import has_replaced, is_replaced
from .conditions import UnsupportedByMax, bypass_reasons, tokens_reasons
from .dispatch import on_pytorch, out_of_memory_is_unsupported, refuse
from .pickling import New
from .text_decoder import decoder_reasons

if TYPE_CHECKING:
    from torch import nn
    from whisper.model import Whisper

    from .runtime.by_device import Session

UpstreamInference: type[PyTorchInference] = originals.get(
    "whisper.decoding.PyTorchInference", PyTorchInference
)


METHODS = ("logits", "rearrange_kv_cache", "cleanup_caching")
"""What a decode calls of an inference."""


class MaxInference(UpstreamInference):
    """One decode. The path is chosen at its first step and stays, unless MAX fails.

    All that is ours stands in one attribute, and in functions of this module: a subclass may have
    names of its own.

    model : the model that decodes; one loaded before patch() is taken up here
    initial_token_length : tokens of the prompt, after which one is decoded at a time
    """

    _whisper_max: _Decode  # not set by __init__: a subclass may set upstream's attributes by itself

    def __init__(self, model: Whisper, initial_token_length: int) -> None:
        super().__init__(model, initial_token_length)
        live_models.adopt(model)

    @property
    def kv_cache(self) -> dict:
        """Upstream's caches, by module; empty before the first step.

        Who asks for them in a decode on MAX may change them: PyTorch fills them, and goes on. In
        mode "strict" UnsupportedByMax is raised instead.
        """
        if is_open(self):
            _hand_over(self, ["its kv_cache was asked for"])
        return decode_of(self).caches

    @kv_cache.setter
    def kv_cache(self, caches: dict) -> None:
        """Other caches are another decode: the next step chooses its path anew."""
        decode = decode_of(self)
        decode.caches = caches
        if decode.session is not None:
            _end(self)

    def logits(self, tokens: Tensor, audio_features: Tensor) -> Tensor:
        """Logits of all new tokens, as upstream's `PyTorchInference.logits`.

        tokens : torch.Tensor, shape = (n_batch, current_sequence_length), integers
        audio_features : torch.Tensor, shape = (n_batch or 1, n_audio_ctx, n_audio_state)

        Returns shape = (n_batch, new tokens, n_vocab), float32, in fresh memory. Raises
        UnsupportedByMax in mode "strict" where MAX cannot run the decode.
        """
        decode = decode_of(self)
        if decode.session is None and decode.torch_reasons is None:
            _choose(self, tokens, audio_features)
        on_torch = super().logits
        if decode.torch_reasons is not None:
            return on_pytorch(
                "inference", lambda: on_torch(tokens, audio_features), decode.torch_reasons
            )
        begin = time.perf_counter()
        hooks = listeners.HookCalls()
        on_one_thread.hold()
        reasons: Sequence[str] | None = None
        try:
            with out_of_memory_is_unsupported():
                logits = _step(self, tokens, audio_features, hooks)
        except UnsupportedByMax as failed:
            if settings.active().mode == "strict":
                raise
            reasons = failed.reasons
        # The exception is over: PyTorch's have no context then, and what MAX held is freed.
        if reasons is not None:
            leave_to_pytorch(self, reasons)

            def resume() -> Tensor:
                if decode.tokens is not None:
                    _fill_caches(self)  # with what MAX has decoded
                with hooks.on_pytorch():
                    return on_torch(tokens, audio_features)

            return on_pytorch("inference", resume, reasons)
        report.record("inference", "max", time.perf_counter() - begin)
        return logits

    def rearrange_kv_cache(self, source_indices: list[int]) -> None:
        """Row i continues what row source_indices[i] was."""
        decode = decode_of(self)
        if is_open(self):
            reasons = _rearrangement_reasons(self, source_indices)
            if reasons:
                _hand_over(self, reasons)
        if decode.session is None:
            super().rearrange_kv_cache(source_indices)
        elif decode.tokens is not None and not _stay(source_indices):
            decode.tokens = decode.tokens[source_indices]
            decode.session.reorder(source_indices)

    def cleanup_caching(self) -> None:
        """Ends the decode; the next one chooses its path anew."""
        _end(self)
        super().cleanup_caching()

    def __getstate__(self) -> dict:
        """Upstream's attributes: a decode on MAX goes on in PyTorch's caches, in copies as well."""
        caches = self.kv_cache
        state = {name: value for name, value in vars(self).items() if name != "_whisper_max"}
        return {**state, "kv_cache": caches}

    def __setstate__(self, state: dict) -> None:
        others = dict(state)
        caches = others.pop("kv_cache")
        vars(self).update(others)
        self.kv_cache = caches

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Pickles name upstream's class, and load where whisper_max is not installed."""
        if type(self) is not MaxInference:
            return super().__reduce_ex__(protocol)
        name = New(MaxInference, UpstreamInference.__name__, "whisper.decoding")
        return name, (), self.__getstate__()


@dataclass
class _Decode:
    """What a `MaxInference` is doing.

    caches : upstream's
    session : of a decode on MAX
    torch_reasons : of a decode on PyTorch, why it is there; at most one of these two is set
    features : the encoded audio of a decode on MAX, in memory that nobody changes in a custom loop
    tokens : what has been decoded there, in such memory; None before the first step
    n_vocab : how many tokens its weights know, which the model may exchange meanwhile
    listening : hooks that listen inside the decoder
    alike : whether the features of two windows are equal, as far as that was asked
    """

    caches: dict = field(default_factory=dict)
    session: Session | None = None
    torch_reasons: Sequence[str] | None = None
    features: Tensor | None = None
    tokens: Tensor | None = None
    n_vocab: int = 0
    listening: listeners.HookPoints | None = None
    alike: dict[tuple[int, int], bool] = field(default_factory=dict)

    def hear_the_same(self, window: int, other: int) -> bool:
        """Whether two windows' audio is the same, as a program may repeat it for each beam."""
        if window == other:
            return True
        if (window, other) not in self.alike:
            self.alike[window, other] = torch.equal(self.features[window], self.features[other])
        return self.alike[window, other]


def decode_of(inference: MaxInference) -> _Decode:
    """What an inference is doing."""
    own = vars(inference)
    if "_whisper_max" not in own:
        own["_whisper_max"] = _Decode()
    return own["_whisper_max"]


def is_open(inference: MaxInference) -> bool:
    """Whether it is in the middle of a decode on MAX."""
    decode = decode_of(inference)
    return decode.session is not None and decode.tokens is not None


def start(
    inference: MaxInference,
    tokens: Tensor,
    audio_features: Tensor,
    *,
    refuse_hooks: bool = False,
) -> Session:
    """Opens the session of a decode; raises UnsupportedByMax with the reasons against it.

    refuse_hooks : whether hooks that listen inside the decoder are such a reason
    """
    refuse(inference_reasons(inference, tokens, audio_features))
    decoder = inference.model.decoder
    decode = decode_of(inference)
    decode.listening = listeners.hook_points_of(decoder)
    if refuse_hooks:
        refuse(decode.listening.reasons())
    with out_of_memory_is_unsupported():
        decode.session = first_use.runtime().open_session(
            decoder, audio_features, len(tokens), settings.active()
        )
    decode.torch_reasons = None
    decode.features = audio_features
    decode.n_vocab = len(decoder.token_embedding.weight)
    return decode.session


def leave_to_pytorch(inference: MaxInference, reasons: Sequence[str]) -> None:
    """Ends the session: the rest of this decode runs on PyTorch, for these reasons."""
    on_one_thread.release()
    decode = decode_of(inference)
    decode.session = None
    decode.torch_reasons = list(reasons)


def _end(inference: MaxInference) -> None:
    on_one_thread.release()
    decode = decode_of(inference)
    decode.session = decode.torch_reasons = None
    decode.features = decode.tokens = decode.listening = None
    decode.alike = {}


def _choose(inference: MaxInference, tokens: Tensor, audio_features: Tensor) -> None:
    if settings.active().mode == "shadow":
        # The main loop is what is compared; this is PyTorch's side of it.
        leave_to_pytorch(inference, ["shadow"])
        return
    off = activation.why_off("inference", inference.model.decoder)
    if off is not None:  # the user's own wish: mode "strict" does not object
        leave_to_pytorch(inference, [off])
        return
    try:
        start(inference, tokens, audio_features)
        # Upstream looks at the features once. Their memory may hold the next ones when PyTorch
        # is to go on.
        with on_one_thread.only_this_thread():  # MAX's are still looking out for work
            decode_of(inference).features = audio_features.clone()
    except UnsupportedByMax as unsupported:
        if settings.active().mode == "strict":
            raise
        leave_to_pytorch(inference, unsupported.reasons)


def _step(
    inference: MaxInference, tokens: Tensor, features: Tensor, hooks: listeners.HookCalls
) -> Tensor:
    decode = decode_of(inference)
    session, decoded = decode.session, decode.tokens
    for rows in (tokens, *([] if decoded is None else [decoded])):
        if len(rows) != session.rows:
            refuse([row_count_reason(session.rows, len(rows))])
    if getattr(features, "dtype", None) is not decode.features.dtype:
        # Upstream does not read them any more, but converts to their dtype.
        refuse([f"the features of a later step are {getattr(features, 'dtype', 'no tensor')}"])
    decoder = inference.model.decoder
    refuse(bypass_reasons("decoder", decoder))
    refuse(tokens_reasons(tokens, tokens.shape[-1], decode.n_vocab, decode.features.device))
    new = tokens if tokens.shape[-1] <= inference.initial_token_length else tokens[:, -1:]
    if decoded is not None and new.shape[1] > 1:
        # Upstream appends them all, under a mask made for the beginning of a text.
        refuse(["a second prompt in an open decode"])
    logits = hooks.decoder(decode.listening, session, new, features)
    decode.tokens = new.clone() if decoded is None else torch.cat([decoded, new], dim=1)
    return logits


def _hand_over(inference: MaxInference, reasons: Sequence[str]) -> None:
    """PyTorch goes on with an open decode; in mode "strict" raises UnsupportedByMax."""
    if settings.active().mode == "strict":
        refuse(reasons)
    leave_to_pytorch(inference, reasons)
    _fill_caches(inference)


def _fill_caches(inference: MaxInference) -> None:
    """Has PyTorch decode what MAX has; no hook of a user's hears of it once more."""
    decode, decoder = decode_of(inference), inference.model.decoder
    inference.kv_cache, inference.hooks = inference.model.install_kv_cache_hooks()
    with decode.listening.silenced():
        forward = type(decoder).forward  # not a call: hooks on the decoder, or another forward
        forward(decoder, decode.tokens, decode.features, kv_cache=inference.kv_cache)


def _rearrangement_reasons(inference: MaxInference, source_indices: object) -> list[str]:
    """Reasons against rows of an open decode changing places on MAX."""
    if type(source_indices) is not list or any(type(row) is not int for row in source_indices):
        return ["rows change places by something else than a list of integers"]
    if _stay(source_indices):
        return []
    decode = decode_of(inference)
    rows, windows = decode.session.rows, len(decode.features)
    if len(source_indices) != rows:
        return [row_count_reason(rows, len(source_indices))]
    reasons = kv_modules_reasons(inference)
    window_of = [row * windows // rows for row in range(rows)]
    pairs = zip(window_of, map(window_of.__getitem__, source_indices))
    if not all(decode.hear_the_same(window, other) for window, other in pairs):
        # Were PyTorch to take over later, it would decode all of a row with one window.
        reasons.append("a row goes on as one of another window")
    return reasons


def _stay(source_indices: list[int]) -> bool:
    """Whether upstream has nothing to do."""
    return source_indices == list(range(len(source_indices)))


def row_count_reason(rows: int, found: int) -> str:
    return f"the decode began with {rows} rows and goes on with {found}"


def kv_modules_reasons(inference: MaxInference) -> list[str]:
    """Why other caches would change places upstream than those of self-attention, if so."""
    blocks = inference.model.decoder.blocks
    upstreams = [getattr(block.attn, name) for name in ("key", "value") for block in blocks]
    found = getattr(inference, "kv_modules", None)
    if type(found) is list and len(found) == len(upstreams) and all(map(is_, found, upstreams)):
        return []
    return ["the inference's kv_modules are not upstream's"]


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
    if decode_of(inference).caches:
        reasons.append("its kv_cache was filled by somebody else")
    if has_replaced(model, "install_kv_cache_hooks", "whisper.model"):
        reasons.append("the model's install_kv_cache_hooks was replaced")
    reasons += [
        f"PyTorchInference.{name} was replaced"
        for name in METHODS
        if is_replaced(vars(UpstreamInference).get(name), "whisper.decoding", UpstreamInference)
    ]
    reasons += bypass_reasons("decoder", model.decoder)
    reasons += decoder_reasons(model.decoder, tokens, audio_features)
    if not reasons:
        n_text_ctx = max(model.dims.n_text_ctx, len(model.decoder.positional_embedding))
        if audio_features.shape[1] <= n_text_ctx:
            # Upstream tells cross attention's cache from self-attention's by this length.
            reasons.append(f"the audio context is not longer than the text context, {n_text_ctx}")
        if not isinstance(model.decoder.blocks[0].attn, whisper.model.MultiHeadAttention):
            # As where the module was loaded anew: upstream finds nothing then that has caches.
            reasons.append("whisper.model.MultiHeadAttention was replaced")
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
