"""PyTorch's own transforms, modes and traces get PyTorch's own modules to work on."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import fx
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import whisper_max
from harness import on_max, with_fallback
from strategies import numbers, small, token_rows
from tolerances import PROMISES

MEL, FEATURES = numbers((2, 80, 120), 1), numbers((1, 60, 128), 2)
TOKENS = token_rows((2, 5), 100, 3)

pytestmark = pytest.mark.allow_fallback


@pytest.fixture
def model():
    return small().build()


def encode(model, mel=MEL):
    return model.encoder(mel)


def decode(model, features=FEATURES):
    return model.decoder(TOKENS, features)


def vmap(model):
    """Each window for itself."""
    return torch.func.vmap(lambda mel: encode(model, mel[None])[0])(MEL)


def vmap_decoder(model):
    return torch.func.vmap(lambda features: decode(model, features[None]))(FEATURES.repeat(2, 1, 1))


def grad(model):
    return torch.func.grad(lambda features: decode(model, features).square().sum())(FEATURES)


def jvp(model):
    with sdpa_kernel(SDPBackend.MATH):  # the others know no forward mode
        return torch.func.jvp(lambda mel: encode(model, mel), (MEL,), (torch.ones_like(MEL),))[1]


def forward_gradients(model):
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        return forward_ad.unpack_dual(encode(model, forward_ad.make_dual(MEL, MEL))).tangent


def other_weights(model):
    """By a function of the parameters, as for ensembles."""
    doubled = {name: 1.5 * parameter for name, parameter in model.encoder.named_parameters()}
    return torch.func.vmap(lambda mel: torch.func.functional_call(model.encoder, doubled, mel))(
        MEL[:, None]
    )


def flops(model):
    with FlopCounterMode(display=False) as counter:
        encode(model)
    return torch.tensor(counter.get_total_flops())


def watched(model):
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        encode(model)
    return torch.tensor(len([function for function in seen if function is torch.conv1d]) > 0)


def symbolic(model):
    """The decoder, down to its blocks."""

    class Root(torch.nn.Module):
        def __init__(self, decoder):
            super().__init__()
            self.decoder = decoder

        def forward(self, tokens, features):
            return self.decoder(tokens, features, None)

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return "blocks" in name or name.endswith("ln") or super().is_leaf_module(module, name)

    graph = Tracer().trace(Root(model.decoder))
    return fx.GraphModule(Root(model.decoder), graph)(TOKENS, FEATURES)


def dispatched(model):
    return make_fx(lambda mel: encode(model, mel))(MEL)(MEL)


def exported(model):
    return torch.export.export(model.encoder, (MEL,)).module()(MEL)


def faked(model):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        shape = encode(model).shape
    return torch.tensor(shape)


@pytest.mark.parametrize(
    ("target", "call", "reason"),
    [
        ("encoder", vmap, "in a transform of torch.func"),
        ("decoder", vmap_decoder, "in a transform of torch.func"),
        ("decoder", grad, "in a transform of torch.func"),
        ("encoder", jvp, "in a transform of torch.func"),
        ("encoder", other_weights, "in a transform of torch.func"),
        ("encoder", forward_gradients, "forward-mode gradients"),
        ("encoder", flops, "a torch dispatch mode is on"),
        ("encoder", faked, "a torch dispatch mode is on"),
        ("encoder", dispatched, "a torch dispatch mode is on"),
        ("encoder", watched, "a torch function mode is on"),
        ("decoder", symbolic, "the call is being traced"),
        ("encoder", exported, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_transform(model, target, call, reason):
    with torch.no_grad() if call is not grad else torch.enable_grad():
        expected = call(model)
        with with_fallback():
            found = call(whisper_max.accelerate(model))
            counted = whisper_max.status().targets[target]
    assert torch.equal(found, expected)
    assert counted.max_calls == 0
    if reason is not None:
        assert any(reason in text for text in counted.reasons), counted.reasons


@torch.no_grad()
def test_other_weights_for_one_call(model):
    """Without a transform it is a call like others, and the next one has the model's own again."""
    doubled = {name: 1.5 * parameter for name, parameter in model.encoder.named_parameters()}

    def calls():
        return encode(model), torch.func.functional_call(model.encoder, doubled, MEL), encode(model)

    expected = calls()
    with on_max():
        whisper_max.accelerate(model)
        for found, wanted in zip(calls(), expected, strict=True):
            # What rounding adds up to; the two models' features differ by more than 1.
            bound = max(1e-4, PROMISES["high"].largest_floor * wanted.abs().max().item())
            torch.testing.assert_close(found, wanted, rtol=0, atol=bound)
    assert (expected[0] - expected[1]).abs().max() > 1


@contextmanager
def default_device():
    torch.set_default_device("cpu")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("context", [default_device, lambda: torch.device("cpu")])
@torch.no_grad()
def test_a_default_device_is_no_obstacle(model, context):
    expected = encode(model), decode(model)
    with on_max(), context():
        found = encode(whisper_max.accelerate(model)), decode(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
