"""The encoder on MAX is as exact as PyTorch, for every shape that openai-whisper can have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness import exact, on_pytorch
from strategies import batches, numbers, official, recipes, seeds
from tolerances import PROMISES, assert_precise

# Upstream's log-mel spectrograms lie between -1 and 1.5 or so; the scale need not.
SCALES = st.sampled_from([0.0, 1e-3, 1.0, 30.0])


def check(model, mel, precision="high"):
    """Encode `mel` on MAX, on PyTorch and in float64, and compare."""
    plain = on_pytorch(model)
    with torch.no_grad():
        found = model.encoder(mel)
        assert_precise(
            found, plain.encoder(mel), exact(plain.encoder)(mel.double()), PROMISES[precision]
        )
    assert found.device == mel.device


@given(recipes(), batches, seeds, SCALES)
def test_any_shape(precision, recipe, batch, seed, scale):
    frames = 2 * recipe.dims.n_audio_ctx
    check(recipe.build(), numbers((batch, recipe.dims.n_mels, frames), seed, scale), precision)


@pytest.mark.parametrize("n_state", [512, 768, 1024, 1280])
def test_official_widths(strict, n_state):
    n_mels = 128 if n_state == 1280 else 80
    model = official(n_state, n_mels=n_mels, n_audio_ctx=250).build()
    check(model, numbers((1, n_mels, 500), 1))


def test_whole_window_of_tiny(strict):
    check(official(384, layers=4).build(), numbers((1, 80, 3000), 2))


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_whole_window_of_the_checkpoint(strict, checkpoint, scale):
    check(checkpoint, numbers((2, 80, 3000), 3, scale))


@given(recipes(), seeds, st.sampled_from(["transposed", "strided", "expanded", "narrowed"]))
def test_memory_in_any_order(strict, recipe, seed, order):
    n_mels, frames = recipe.dims.n_mels, 2 * recipe.dims.n_audio_ctx
    mel = {
        "transposed": lambda: numbers((3, frames, n_mels), seed).transpose(1, 2),
        "strided": lambda: numbers((3, 2 * n_mels, 2 * frames), seed)[:, ::2, 1::2],
        "expanded": lambda: numbers((1, n_mels, frames), seed).expand(3, -1, -1),
        "narrowed": lambda: numbers((3, n_mels, frames + 7), seed)[:, :, 5 : frames + 5],
    }[order]()
    check(recipe.build(), mel)
