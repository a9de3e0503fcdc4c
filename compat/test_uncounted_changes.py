"""Weights that change without PyTorch counting it, where something else tells of it.

What it counts, `runtime/watch.py` looks at; after the rest a user has to call `refresh`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import whisper_max
from harness import on_pytorch, with_fallback
from strategies import numbers, small, token_rows
from whisper_max.runtime import model_state

pytestmark = pytest.mark.allow_fallback

MEL, FEATURES = numbers((1, 80, 120), 1), numbers((1, 60, 128), 2)
TOKENS = token_rows((2, 5), 100, 1)
OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "Adagrad": torch.optim.Adagrad,
    "SGD": torch.optim.SGD,
}
CALLS = {
    "encoder": lambda model: model.encoder(MEL),
    "decoder": lambda model: model.decoder(TOKENS, FEATURES),
}


@pytest.fixture
def model():
    """Its results are from MAX, and remembered."""
    with with_fallback():
        model = whisper_max.accelerate(small().build()).requires_grad_()
        with torch.no_grad():
            for call in CALLS.values():
                call(model)
        yield model


@torch.no_grad()
def assert_up_to_date(model, before) -> None:
    """MAX computes with the weights as they are now."""
    for target, call in CALLS.items():
        served = whisper_max.status().targets[target].max_calls
        found = call(model)
        assert whisper_max.status().targets[target].max_calls == served + 1
        expected = call(on_pytorch(model))
        close = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=close)
        assert not torch.allclose(found, before[target], rtol=1e-2, atol=1e-2)


@torch.no_grad()
def results(model):
    return {target: call(model) for target, call in CALLS.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fused_optimizer(model, name):
    """It has its gradients from elsewhere: nothing but its step tells."""
    before = results(model)
    versions = [parameter._version for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    OPTIMIZERS[name](model.parameters(), lr=0.1, fused=True).step()
    # What this is about:
    assert versions == [parameter._version for parameter in model.parameters()]
    assert_up_to_date(model, before)


def test_an_optimizer_of_another_model_changes_nothing(model):
    before = results(model)
    other = small().build().requires_grad_()
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    whisper_max.accelerate(other)
    kept = model_state.state_of(model.encoder, "encoder")._ready
    torch.optim.SGD(other.parameters(), lr=0.1, fused=True).step()
    after = results(model)
    assert kept is not None
    assert model_state.state_of(model.encoder, "encoder")._ready is kept
    assert all(torch.equal(after[target], before[target]) for target in CALLS)


def test_training_that_writes_through_data(model):
    """As optimizers do that are older than `torch.no_grad`, or want to be quick."""
    before = results(model)
    loss = sum(call(model).square().mean() for call in CALLS.values())
    loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data.add_(parameter.grad.sign(), alpha=-0.05)
    assert_up_to_date(model, before)


@torch.no_grad()
def test_an_adapter_that_is_merged(model):
    """As PEFT's LoRA: it stands around a layer, whose weight it changes when it goes."""
    before = results(model)
    for target, call in CALLS.items():
        mlp = getattr(model, target).blocks[0].mlp
        layer = mlp[0]
        mlp[0] = torch.nn.Sequential(layer)
        call(model)
        layer.weight.data += 0.5
        mlp[0] = layer
    assert_up_to_date(model, before)


WRITES = {
    "in place": lambda weight: weight.data.add_(0.5),
    "initialized": lambda weight: torch.nn.init.normal_(weight.data, std=0.5),
    "NumPy": lambda weight: np.add(weight.detach().numpy(), 0.5, out=weight.detach().numpy()),
    "storage": lambda weight: weight.untyped_storage().copy_((weight + 0.5).untyped_storage()),
}


@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_all_of_a_matrix_written_behind_pytorchs_back(model, write):
    """With no call in between that PyTorch would serve."""
    before = results(model)
    versions = [parameter._version for parameter in model.parameters()]
    for part in (model.encoder, model.decoder):
        WRITES[write](part.blocks[0].mlp[0].weight)
    assert versions == [parameter._version for parameter in model.parameters()]
    assert_up_to_date(model, before)


@pytest.mark.parametrize("change", ["rows", "transposed", "negated"])
@torch.no_grad()
def test_data_seen_otherwise(model, change):
    """Address, version and storage stay what they were."""
    part = model.decoder.token_embedding if change == "rows" else model.encoder.conv2
    if change == "rows":
        part.weight.data = part.weight.data[:90]
    elif change == "transposed":
        part.weight.data = part.weight.data.transpose(0, 1)
    else:
        part.weight.data = part.weight.data._neg_view()
    calls = CALLS["encoder"], lambda model: model.decoder(TOKENS % 90, FEATURES)
    for call in calls:
        expected = call(on_pytorch(model))
        found = call(model)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
