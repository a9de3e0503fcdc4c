"""Packing a model's weights: what float16 holds is found on the way, and pages in good time."""

from __future__ import annotations

import pytest
import torch

import whisper_max
from harness import assert_close, on_pytorch
from strategies import numbers, small, token_rows
from whisper_max.conditions import UnsupportedByMax
from whisper_max.runtime import decoder_session, loading, model_state, weights

MEL, FEATURES = numbers((1, 80, 120), 1), numbers((1, 60, 128), 2)
TOKENS = token_rows((2, 5), 100, 3)


@pytest.fixture
def model():
    with torch.no_grad():
        yield small().build()


@pytest.fixture
def looks(monkeypatch):
    """How many times weights were looked at before they were packed."""
    found = []
    look = weights.exact_in_float16
    monkeypatch.setattr(
        weights, "exact_in_float16", lambda tensors: (found.append(1), look(tensors))[1]
    )
    return found


def held_in(module):
    """The dtypes of the packed matrices."""
    ready = model_state._states[module]._ready
    return {str(buffer.dtype) for part in ready.packed for buffer in part if buffer.rank == 4}


def assert_on_max(model):
    plain = on_pytorch(model)
    with whisper_max.patched(mode="strict", compile="blocking"):
        whisper_max.accelerate(model)
        assert_close(model.encoder(MEL), plain.encoder(MEL))
        assert_close(model.decoder(TOKENS, FEATURES), plain.decoder(TOKENS, FEATURES))


def test_exact_weights_are_found_exact_by_packing_them(model, looks):
    assert_on_max(model)
    looks.clear()
    model.encoder.conv1.bias[0] += 1
    model.decoder.ln.bias[0] += 1
    assert_on_max(model)
    assert not looks
    assert held_in(model.encoder) == held_in(model.decoder) == {"DType.float16"}


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("encoder", "conv1.weight"),
        ("encoder", "blocks.1.mlp.2.weight"),
        ("decoder", "token_embedding.weight"),
        ("decoder", "blocks.0.attn.value.weight"),
        ("decoder", "blocks.1.cross_attn.key.weight"),
    ],
)
def test_one_weight_that_float16_would_round_is_not_rounded(model, looks, target, name):
    assert_on_max(model)
    looks.clear()
    getattr(model, target).get_parameter(name).view(-1)[-1] = 1 + 2.0**-12
    assert_on_max(model)
    assert not looks
    other = "decoder" if target == "encoder" else "encoder"
    assert held_in(getattr(model, target)) == {"DType.float32"}
    assert held_in(getattr(model, other)) == {"DType.float16"}


def test_weights_are_looked_at_where_none_could_be_packed(model, looks, monkeypatch):
    engine = loading.engine

    def only_for_float32(arithmetic, settings):
        if arithmetic.weight != "float32":
            raise UnsupportedByMax("not compiled")
        return engine(arithmetic, settings)

    monkeypatch.setattr(loading, "engine", only_for_float32)
    model.encoder.conv1.weight[0, 0, 0] = 1 + 2.0**-12
    model.decoder.token_embedding.weight[0, 0] = 1 + 2.0**-12
    assert_on_max(model)
    assert len(looks) == 2
    assert held_in(model.encoder) == held_in(model.decoder) == {"DType.float32"}


def test_every_window_joins_pages(model, monkeypatch):
    joined = []

    class Pages:
        def begin_window(self):
            joined.append(1)

    monkeypatch.setattr(decoder_session, "huge_pages", Pages())
    with whisper_max.patched(mode="strict", compile="blocking"):
        whisper_max.accelerate(model)
        for seed in (4, 4, 5):
            model.decoder(TOKENS, numbers((1, 60, 128), seed))
    assert len(joined) == 2
