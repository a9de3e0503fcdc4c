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


@pytest.mark.parametrize("height", [64.0, 128.0, 1024.0])
@pytest.mark.parametrize("frame", [0, 40, 249])
def test_one_frame_far_above_all_others(precision, height, frame):
    """Tiles begin to weigh before they know the highest score, and have to notice that it comes.

    For every other row it is e^(0.56 height) times as heavy as the others: 2^52, which is none too
    heavy, 2^104, for which rows are weighed again, or more than float32 holds.
    """
    model = official(384, layers=1, n_audio_ctx=250).build()
    of_key, of_query = numbers((2, 384), 4).sign()
    attention = model.encoder.blocks[0].attn
    with torch.no_grad():
        model.encoder.positional_embedding[0::2] = 100 * of_query
        model.encoder.positional_embedding[1::2] = -100 * of_query
        model.encoder.positional_embedding[frame] = 100 * of_key
        # Channel 0 of each head's key is 0.75 for that frame, of its query 6 * height or 0.
        attention.key.weight.zero_()
        attention.key.weight[::64] = of_key / 512
        attention.query.weight.zero_()
        attention.query.weight[::64] = of_query * height / 128
        attention.query.bias.zero_()
        attention.query.bias[::64] = 3 * height
    check(model, numbers((1, 80, 500), 5), precision)
