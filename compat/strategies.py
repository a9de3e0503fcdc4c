"""What Hypothesis draws: shapes, seeds and scales. The numbers come from seeded generators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from whisper.model import ModelDimensions, Whisper

HEAD_DIM = 64

seeds = st.integers(0, 2**32 - 1)
batches = st.integers(1, 5)


@dataclass(frozen=True)
class Recipe:
    """A model with random weights.

    gain : standard deviation of a layer's output where that of its input is 1; attention is
        diffuse where it is small, and looks at single frames where it is large
    float16 : whether float16 holds the weights exactly, as it does those of official
        checkpoints: they are stored so, others in float32
    """

    dims: ModelDimensions
    seed: int
    gain: float
    float16: bool

    @torch.no_grad()
    def build(self) -> Whisper:
        """The model; on MAX where whisper is patched."""
        model = Whisper(self.dims)
        generator = torch.Generator().manual_seed(self.seed)
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if weight is None:
                continue
            if isinstance(module, nn.LayerNorm):
                weight.normal_(1, 0.2, generator=generator)
            elif isinstance(module, nn.Embedding):
                weight.normal_(0, self.gain, generator=generator)
            else:
                fan_in = weight[0].numel()
                weight.normal_(0, self.gain * fan_in**-0.5, generator=generator)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(0, 0.1, generator=generator)
        model.decoder.positional_embedding.normal_(0, 0.3, generator=generator)
        if self.float16:
            for parameter in model.parameters():
                parameter.copy_(parameter.half())
        return model.requires_grad_(False)


@st.composite
def recipes(draw: st.DrawFn, *, n_text_ctx: st.SearchStrategy[int] = st.integers(1, 40)) -> Recipe:
    """Small models of any proportions; the audio context is longer than the text context."""
    text_ctx = draw(n_text_ctx)
    heads = draw(st.integers(1, 3))
    return Recipe(
        ModelDimensions(
            n_mels=draw(st.sampled_from([80, 128]) | st.integers(1, 40)),
            n_audio_ctx=draw(st.integers(text_ctx + 1, text_ctx + 100)),
            n_audio_state=heads * HEAD_DIM,
            n_audio_head=heads,
            n_audio_layer=draw(st.integers(1, 3)),
            n_vocab=draw(st.integers(2, 200)),
            n_text_ctx=text_ctx,
            n_text_state=heads * HEAD_DIM,
            n_text_head=heads,
            n_text_layer=draw(st.integers(1, 3)),
        ),
        seed=draw(seeds),
        gain=draw(st.sampled_from([0.3, 1.0, 2.0])),
        float16=draw(st.booleans()),
    )


def numbers(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    """Normally distributed, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def token_rows(shape: tuple[int, int], n_vocab: int, seed: int) -> Tensor:
    """Random tokens, shape = (rows, count), int64."""
    return torch.randint(n_vocab, shape, generator=torch.Generator().manual_seed(seed))


def official(n_state: int, *, layers: int = 1, **dims: int) -> Recipe:
    """A model of an official width, otherwise small unless `dims` says so."""
    heads = n_state // HEAD_DIM
    shape = {"n_mels": 80, "n_audio_ctx": 1500, "n_vocab": 100, "n_text_ctx": 8, **dims}
    return Recipe(
        ModelDimensions(
            n_audio_state=n_state,
            n_audio_head=heads,
            n_audio_layer=layers,
            n_text_state=n_state,
            n_text_head=heads,
            n_text_layer=layers,
            **shape,
        ),
        seed=n_state,
        gain=1.0,
        float16=True,
    )


def small() -> Recipe:
    """A model of two blocks, for what does not depend on the shape."""
    return Recipe(
        ModelDimensions(80, 60, 128, 2, 2, 100, 30, 128, 2, 2), seed=1, gain=1.0, float16=True
    )
