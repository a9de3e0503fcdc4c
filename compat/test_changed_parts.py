"""A model whose parts were changed is run as it is now: by PyTorch, to the bit, with the reason."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import whisper
from torch import nn

import whisper_max
from harness import assert_close, load_checkpoint, on_max, on_pytorch, with_fallback
from strategies import numbers, small, token_rows
from whisper_max import changed_parts, report
from whisper_max.conditions import UnsupportedByMax

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


def without_heads(part):
    for name, layer in part.named_modules():
        if name.endswith("attn"):
            layer.n_head = 0


def without_bias(part):
    """As `LayerNorm(bias=False)` leaves it."""
    part.blocks[1].mlp_ln.bias = None


def take_out(name):
    return lambda part: part.get_submodule(name.rpartition(".")[0]).__setattr__(
        name.rpartition(".")[2], None
    )


def put_back(name):
    """A layer under its old number, by which it comes to stand behind the others."""

    def change(part):
        owner, number = part.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        layer = owner.get_submodule(number)
        delattr(owner, number)
        setattr(owner, number, layer)

    return change


def make_plain(name, parameter):
    """A tensor that is no parameter or buffer, as old ways of reparametrizing leave it."""

    def change(part):
        owner = part.get_submodule(name)
        tensor = getattr(owner, parameter).detach()
        delattr(owner, parameter)
        setattr(owner, parameter, 2 * tensor)

    return change


def lengthen_positions(part):
    part.positional_embedding = replaced(part, part.positional_embedding[None])


def replaced(part, tensor):
    return nn.Parameter(tensor) if "positional_embedding" in part._parameters else tensor


def widen_bias(part):
    part.blocks[0].attn.out.bias = nn.Parameter(torch.ones(1))


CHANGES = {
    "blocks.0.mlp.1 has approximate='tanh'": lambda part: part.blocks[0].mlp.__setitem__(
        1, nn.GELU("tanh")
    ),
    "blocks.0.attn_ln has eps=0.01": change_epsilon,
    "blocks.1.mlp_ln has normalized_shape=(64,)": lambda part: part.blocks[1].mlp_ln.__setattr__(
        "normalized_shape", (64,)
    ),
    "blocks.0.mlp.0 has weights of shape (1024, 128)": widen,
    "blocks.0.mlp.3 is no part of upstream's": lambda part: part.blocks[0].mlp.append(
        whisper.model.Linear(128, 128)
    ),
    "blocks has its layers in another order": put_back("blocks.0"),
    "blocks.0.mlp has its layers in another order": put_back("blocks.0.mlp.1"),
    "blocks.1.attn has n_head=1": change_heads,
    "blocks.0.mlp was replaced": lambda part: vars(part.blocks[0]).update(mlp=nn.Identity()),
    "blocks.1.mlp.0.weight was replaced": lambda part: part.blocks[1].mlp[0]._buffers.update(
        weight=torch.zeros(1, 1)
    ),
    "it has no heads": without_heads,
    "its blocks was replaced": lambda part: vars(part).update(blocks=part.blocks[:1]),
    "blocks.0.attn.query was replaced": adapt,
    "blocks.0 was replaced by test_changed_parts.Wrapped": wrap,
    "extra is no part of upstream's": lambda part: part.register_module("extra", nn.GELU()),
    "it has no blocks": lambda part: part.__setattr__("blocks", nn.ModuleList()),
    "blocks is missing": lambda part: part.__setattr__("blocks", None),
    "blocks.1.mlp_ln has no bias of its own": without_bias,
    "blocks.0.attn_ln has elementwise_affine=False": lambda part: part.blocks[0].__setattr__(
        "attn_ln", whisper.model.LayerNorm(128, elementwise_affine=False)
    ),
    "blocks.0.mlp_ln was replaced by torch.nn": lambda part: part.blocks[0].__setattr__(
        "mlp_ln", nn.LayerNorm(128)
    ),
    "blocks.1.mlp is missing": take_out("blocks.1.mlp"),
    "blocks.0.attn.key is missing": take_out("blocks.0.attn.key"),
    "blocks.0.attn_ln is missing": take_out("blocks.0.attn_ln"),
    "blocks.0.mlp.2 is missing": lambda part: part.blocks[0].mlp.__delitem__(2),
    "blocks.0.mlp.1 was replaced by torch.nn.modules.linear.Identity": lambda part: (
        part.blocks[0].mlp.__setitem__(1, nn.Identity())
    ),
    "blocks.1.attn.key has no weight of its own": make_plain("blocks.1.attn.key", "weight"),
    "blocks.1.attn.value has no bias of its own": make_plain("blocks.1.attn.value", "bias"),
    "blocks.0.attn.out has a bias of shape (1,)": widen_bias,
    "positional_embedding is not a matrix": lengthen_positions,
    "positional_embedding is not a matrix of its own": make_plain("", "positional_embedding"),
}
OF_THE_ENCODER = {
    "conv1 has weights of shape (128, 80, 5)": lambda part: part.__setattr__(
        "conv1", whisper.model.Conv1d(80, 128, kernel_size=5, padding=1)
    ),
    "conv1 has padding=(2,)": lambda part: part.__setattr__(
        "conv1", whisper.model.Conv1d(80, 128, kernel_size=5, padding=2)
    ),
    "conv1 has weights of shape (64, 80, 3)": lambda part: (
        part.__setattr__("conv1", whisper.model.Conv1d(80, 64, kernel_size=3, padding=1)),
        part.__setattr__(
            "conv2", whisper.model.Conv1d(64, 128, kernel_size=3, stride=2, padding=1)
        ),
    ),
    "conv2 is missing": take_out(".conv2"),
    "ln_post is missing": take_out(".ln_post"),
    "blocks.0.cross_attn is no part of upstream's": lambda part: part.blocks[0].__setattr__(
        "cross_attn", whisper.model.MultiHeadAttention(128, 2)
    ),
}
OF_THE_DECODER = {
    "token_embedding has a bias of shape (100,)": lambda part: part.token_embedding.__setattr__(
        "bias", nn.Parameter(torch.ones(100))
    ),
    "blocks.0.cross_attn is missing": take_out("blocks.0.cross_attn"),
    "mask is missing": lambda part: part.__setattr__("mask", None),
    "mask is not the causal one": lambda part: part.mask.zero_(),
    "token_embedding has weights of shape (100, 64)": lambda part: part.__setattr__(
        "token_embedding", nn.Embedding(100, 64)
    ),
    "token_embedding has max_norm=10000.0": lambda part: part.token_embedding.__setattr__(
        "max_norm", 10000.0
    ),
    "proj_out is no part of upstream's": lambda part: part.register_module(
        "proj_out", nn.Linear(128, 100)
    ),
}
ALL = [
    *((target, reason) for reason in CHANGES for target in ("encoder", "decoder")),
    *(("encoder", reason) for reason in OF_THE_ENCODER),
    *(("decoder", reason) for reason in OF_THE_DECODER),
]
CHANGES.update(OF_THE_ENCODER)
CHANGES.update(OF_THE_DECODER)


def call(model, target):
    mel, features = numbers((2, 80, 120), 2), numbers((1, 60, 128), 3)
    with torch.no_grad():
        if target == "encoder":
            return model.encoder(mel)
        return model.decoder(token_rows((2, 5), 100, 1), features)


def outcome(model, target):
    """The result, or what PyTorch raises; the message may name our class."""
    try:
        return call(model, target)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ZeroDivisionError) as error:
        return type(error)


@pytest.mark.parametrize("known", [True, False], ids=["later", "before"])
@pytest.mark.parametrize(("target", "reason"), ALL, ids=str)
def test_change(model, reason, target, known):
    """Before the first call, or after one that found everything as upstream made it."""
    part = getattr(model, target).requires_grad_(False)
    with with_fallback():
        whisper_max.accelerate(model)
        if known:
            call(model, target)
        torch.manual_seed(1)
        CHANGES[reason](part)
        with whisper_max.disabled():
            expected = outcome(model, target)
        report.reset()
        found = outcome(model, target)
        counted = whisper_max.status().targets[target]
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found is expected
    assert counted.max_calls == 0
    assert any(reason in found for found in counted.reasons), counted.reasons


def test_a_call_that_was_not_compiled_before(model):
    """As `Module.compile` does it, where the name stood there already with nothing behind it."""
    layer = model.encoder.blocks[0].mlp[0]
    layer._compiled_call_impl = None
    with with_fallback():
        whisper_max.accelerate(model)
        call(model, "encoder")
        layer._compiled_call_impl = lambda x: torch.zeros(*x.shape[:-1], 512)
        call(model, "encoder")
        counted = whisper_max.status().targets["encoder"]
    assert counted.max_calls == 1
    assert any("mlp.0._compiled_call_impl was replaced" in reason for reason in counted.reasons)


def test_a_scripted_layer_inside_is_named(model):
    """Its parameters stand in what is no dictionary."""
    with with_fallback():
        whisper_max.accelerate(model)
        call(model, "encoder")
        model.encoder.blocks[0].mlp[1] = torch.jit.script(nn.GELU())
        call(model, "encoder")
        counted = whisper_max.status().targets["encoder"]
    assert any("mlp.1 was replaced by torch.jit" in reason for reason in counted.reasons)


def test_a_setting_that_is_changed_in_place(model):
    """A tensor that equals the number upstream has there, as long as it does."""
    heads = torch.tensor(2)
    for block in model.encoder.blocks:
        block.attn.n_head = heads
    with with_fallback():
        whisper_max.accelerate(model)
        call(model, "encoder")
        heads.fill_(1)
        outcome(model, "encoder")
        counted = whisper_max.status().targets["encoder"]
    assert counted.max_calls == 1
    assert any("head_dim is 128" in reason for reason in counted.reasons)


def test_what_is_changed_while_it_is_looked_at(model, monkeypatch):
    """Another thread takes a change back before it is found: it is found when it is made again."""
    norm, look = model.encoder.blocks[0].attn_ln, changed_parts._changes_found

    def in_the_middle(*args, **kwargs):
        norm.eps = 1e-5
        yield from look(*args, **kwargs)

    norm.eps = 1e-2
    monkeypatch.setattr(changed_parts, "_changes_found", in_the_middle)
    assert changed_parts.encoder_changes(model.encoder) == []
    monkeypatch.undo()
    norm.eps = 1e-2
    assert changed_parts.encoder_changes(model.encoder) == ["blocks.0.attn_ln has eps=0.01"]


def refer(encoder):
    """Gives it a class that refers to it."""

    class Referring(type(encoder)):
        def itself(self):
            return encoder

    encoder.__class__ = Referring


def test_what_is_known_keeps_no_module():
    encoder = small().build().encoder
    refer(encoder)
    assert changed_parts.encoder_changes(encoder) == []
    alive = weakref.ref(encoder)
    del encoder
    gc.collect()
    assert alive() is None


def test_a_lazy_layer_inside_is_named(model):
    """Its weight has no shape before the first call."""
    with with_fallback():
        whisper_max.accelerate(model)
        call(model, "encoder")
        model.encoder.blocks[0].mlp.append(nn.LazyLinear(128))
        call(model, "encoder")
        counted = whisper_max.status().targets["encoder"]
    assert any("blocks.0.mlp.3 is no part" in reason for reason in counted.reasons)


@pytest.mark.parametrize("name", ["blocks.1.attn.key", "blocks.0.mlp.0"])
@pytest.mark.parametrize("target", ["encoder", "decoder"])
def test_biases_added_and_taken_away_run_on_max(model, target, name):
    part = getattr(model, target)
    layer = part.get_submodule(name)
    missing = layer.bias is None
    layer.bias = nn.Parameter(numbers((128,), 4), requires_grad=False) if missing else None
    expected = call(model, target)
    with on_max():
        found = call(whisper_max.accelerate(model), target)
    assert_close(found, expected)


@pytest.mark.parametrize("target", ["encoder", "decoder"])
def test_shared_blocks_run_on_max(model, target):
    """Also when another one is shared, with the same set of parameters."""
    part = getattr(model, target)
    part.blocks.append(part.blocks[0])
    for _ in range(2):
        expected = call(model, target)
        with on_max():
            found = call(whisper_max.accelerate(model), target)
        assert_close(found, expected)
        whisper_max.unpatch()
        part.blocks[2] = part.blocks[1]


@pytest.mark.parametrize("target", ["encoder", "decoder"])
def test_fewer_blocks_run_on_max(model, target):
    """As distillation and layer dropping leave them."""
    part = getattr(model, target)
    part.blocks = part.blocks[1:]
    expected = call(model, target)
    with on_max():
        found = call(whisper_max.accelerate(model), target)
    assert_close(found, expected)


@pytest.mark.parametrize("target", ["encoder", "decoder"])
@pytest.mark.parametrize("name", ["step", "99"])
def test_a_tensor_beside_the_blocks(model, target, name):
    getattr(model, target).blocks.register_buffer(name, torch.zeros(1))
    expected = call(on_pytorch(model), target)
    with on_max():
        found = call(whisper_max.accelerate(model), target)
    assert_close(found, expected)


@pytest.mark.parametrize("target", ["encoder", "decoder"])
def test_a_class_with_a_property_in_place_of_a_part(model, target):
    def leave_early(part):
        class EarlyExit(type(part)):
            @property
            def blocks(self):
                return self._modules["blocks"][:1]

        part.__class__ = EarlyExit

    plain = on_pytorch(model)
    leave_early(getattr(plain, target))
    with with_fallback():
        whisper_max.accelerate(model)
        call(model, target)
        leave_early(getattr(model, target))
        assert torch.equal(call(model, target), call(plain, target))
        reasons = whisper_max.status().targets[target].reasons
    assert any("its class was given another blocks" in reason for reason in reasons)


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


def test_projections_that_change_their_names(model):
    """The same parameters in the same order, to be used for something else."""
    features = numbers((1, 60, 128), 3)
    with on_max(), torch.no_grad():
        whisper_max.accelerate(model)
        model.decoder(token_rows((2, 5), 100, 1), features)
        attention = model.decoder.blocks[0].attn
        parts = dict(attention.named_children())
        for name in parts:
            delattr(attention, name)
        for name, part in zip(("out", "key", "value", "query"), parts.values()):
            setattr(attention, name, part)
        found = call(model, "decoder")
        expected = call(on_pytorch(model), "decoder")
    assert_close(found, expected)


def share_blocks(decoder):
    decoder.blocks[1] = decoder.blocks[0]


def tie_values_to_keys(decoder):
    decoder.blocks[1].attn.value = decoder.blocks[1].attn.key


def attend_alike(decoder):
    decoder.blocks[1].cross_attn = decoder.blocks[1].attn


def test_one_layer_for_keys_and_values():
    """Upstream's cache then has twice as many values as keys, and PyTorch may crash of it."""
    model = load_checkpoint()
    tie_values_to_keys(model.decoder)
    with whisper_max.patched(mode="strict", compile="blocking"):
        with pytest.raises(UnsupportedByMax, match="a key or value layer stands in two places"):
            whisper.decode(model, numbers((80, 3000), 5), language="en", fp16=False)


@pytest.mark.parametrize("share", [share_blocks, attend_alike])
@pytest.mark.parametrize("beam_size", [None, 3])
def test_layers_whose_caches_upstream_takes_for_one(share, beam_size):
    """Its caches go by module: keys of both places are in one, and other tokens come of it."""
    model = load_checkpoint()
    share(model.decoder)
    mel = numbers((80, 3000), 5)
    options = whisper.DecodingOptions(
        language="en", fp16=False, sample_len=12, suppress_tokens=[50257], beam_size=beam_size
    )

    def tokens():
        try:
            return whisper.decode(model, mel, options).tokens
        except RuntimeError as error:  # 20231117 cannot mask scores of so many keys
            return type(error)

    expected = tokens()
    with with_fallback():
        assert tokens() == expected
        (reason,) = whisper_max.status().targets["decoding_loop"].reasons
    assert reason.startswith("a key or value layer stands in two places")
