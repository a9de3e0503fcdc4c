"""A model whose parts were changed is run as it is now: by PyTorch, to the bit, with the reason."""

from __future__ import annotations

import pytest
import torch
import whisper
from torch import nn

import whisper_max
from harness import on_max, with_fallback
from strategies import numbers, small, token_rows

pytestmark = pytest.mark.allow_fallback


@pytest.fixture
def model():
    """In upstream's classes, of the test's own."""
    return small().build()


class Wrapped(nn.Module):
    """As checkpointing, sharding and profiling wrap the blocks of a model."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class LowRank(nn.Module):
    """As LoRA stands in the place of a linear layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(128, 4)
        self.up = nn.Linear(4, 128)

    def forward(self, x):
        return self.inner(x) + self.up(self.down(x))


def widen(part):
    mlp = part.blocks[0].mlp
    mlp[0], mlp[2] = whisper.model.Linear(128, 1024), whisper.model.Linear(1024, 128)


def change_epsilon(part):
    part.blocks[0].attn_ln.eps = 1e-2


def adapt(part):
    part.blocks[0].attn.query = LowRank(part.blocks[0].attn.query)


def wrap(part):
    part.blocks[0] = Wrapped(part.blocks[0])


def change_heads(part):
    part.blocks[1].attn.n_head = 1


CHANGES = {
    "blocks.0.mlp.1 has approximate='tanh'": lambda part: part.blocks[0].mlp.__setitem__(
        1, nn.GELU("tanh")
    ),
    "blocks.0.attn_ln has eps=0.01": change_epsilon,
    "blocks.0.mlp.0 has weights of shape (1024, 128)": widen,
    "blocks.0.mlp.3 is no part of upstream's": lambda part: part.blocks[0].mlp.append(
        whisper.model.Linear(128, 128)
    ),
    "blocks.1.attn has n_head=1": change_heads,
    "blocks.0.attn.query was replaced": adapt,
    "blocks.0 was replaced by test_changed_parts.Wrapped": wrap,
    "extra is no part of upstream's": lambda part: part.register_module("extra", nn.GELU()),
    "it has no blocks": lambda part: part.__setattr__("blocks", nn.ModuleList()),
}


def call(model, target):
    mel, features = numbers((2, 80, 120), 2), numbers((1, 60, 128), 3)
    with torch.no_grad():
        if target == "encoder":
            return model.encoder(mel)
        return model.decoder(token_rows((2, 5), 100, 1), features)


@pytest.mark.parametrize("target", ["encoder", "decoder"])
@pytest.mark.parametrize("reason", CHANGES)
def test_change(model, reason, target):
    torch.manual_seed(1)
    CHANGES[reason](getattr(model, target))
    expected = call(model, target)
    with with_fallback():
        assert torch.equal(call(whisper_max.accelerate(model), target), expected)
        counted = whisper_max.status().targets[target]
    assert counted.max_calls == 0
    assert any(reason in found for found in counted.reasons), counted.reasons


@pytest.mark.parametrize("target", ["encoder", "decoder"])
def test_fewer_blocks_run_on_max(model, target):
    """As distillation and layer dropping leave them."""
    part = getattr(model, target)
    part.blocks = part.blocks[1:]
    expected = call(model, target)
    with on_max():
        found = call(whisper_max.accelerate(model), target)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_class_given_another_forward_in_the_middle(model, monkeypatch):
    """As icefall does, here to upstream's own class after patch()."""
    upstream = next(c for c in type(model.encoder).__mro__ if c.__module__ == "whisper.model")

    def forward(self, x):
        return nn.functional.gelu(self.conv1(x))

    with with_fallback():
        whisper_max.accelerate(model)
        monkeypatch.setattr(upstream, "forward", forward)
        found = call(model, "encoder")
        reasons = whisper_max.status().targets["encoder"].reasons
        assert "its class was given another forward" in reasons
    assert torch.equal(found, nn.functional.gelu(model.encoder.conv1(numbers((2, 80, 120), 2))))
    with with_fallback():  # and before patch(): the encoder is refused
        assert not whisper_max.is_patched("encoder")
        assert whisper_max.is_patched("decoder")
