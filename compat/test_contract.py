"""The contract with the world: what others do to whisper's modules is honoured by running them.

Each call here goes to PyTorch, with its reason, and gives what unpatched whisper gives, to the bit.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import soundfile
import torch
import whisper
from torch import nn
from whisper import decoding
from whisper.model import MultiHeadAttention

import whisper_max
from harness import fail_from, on_max, with_fallback
from strategies import numbers
from test_decoding_options import assert_same
from whisper_max import UnsupportedByMax
from whisper_max.runtime.decoder_session import DecoderSession

RECORDINGS = Path(__file__).parents[1] / "tests" / "recordings"
TOKENS = torch.tensor([[50258, 50259, 50359, 50364, 300]])

pytestmark = pytest.mark.allow_fallback


@pytest.fixture(scope="module")
def mel():
    audio, _ = soundfile.read(RECORDINGS / "en02.flac", dtype="float32")
    return whisper.log_mel_spectrogram(whisper.pad_or_trim(audio)).unsqueeze(0)


@pytest.fixture
def model(plain):
    """A model of the test's own."""
    return copy.deepcopy(plain)


def encode(model, mel):
    with torch.no_grad():
        return model.encoder(mel)


def logits(model, features, tokens=TOKENS, **more):
    with torch.no_grad():
        return model.decoder(tokens, features, **more)


def on_torch(target: str, reason: str, call):
    """The result of `call` under the patch, which must have gone to PyTorch for this reason."""
    with with_fallback():
        result = call()
        status = whisper_max.status().targets[target]
    assert status.max_calls == 0 and status.torch_calls > 0
    assert any(reason in found for found in status.reasons), status.reasons
    return result


def assert_left_alone(model, target: str, reason: str, call) -> None:
    """`call(model)` gives the same bits as unpatched, through PyTorch, for this reason."""
    expected = call(model)
    whisper_max.accelerate(model)
    try:
        found = on_torch(target, reason, lambda: call(model))
    finally:
        whisper_max.restore(model)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("where", ["conv1", "blocks.1.attn", "blocks.0.mlp.1", "ln_post"])
def test_hooks_in_the_encoder(model, mel, where):
    seen = []
    model.encoder.get_submodule(where).register_forward_hook(lambda *call: seen.append(1))
    assert_left_alone(model, "encoder", f"{where} has hooks", lambda m: encode(m, mel))
    assert len(seen) == 2


@pytest.mark.parametrize("where", ["token_embedding", "ln", "blocks.0.cross_attn", "blocks.1.attn"])
def test_hooks_in_the_decoder(model, where):
    """Those of packages that only listen are in test_listeners.py."""
    features = numbers((1, 1500, 128), 1)
    seen = []
    model.decoder.get_submodule(where).register_forward_hook(lambda *call: seen.append(1))
    assert_left_alone(model, "decoder", f"{where} has hooks", lambda m: logits(m, features))
    assert len(seen) == 2


def test_pre_hooks_and_global_hooks(model, mel):
    handle = model.encoder.conv2.register_forward_pre_hook(lambda module, inputs: None)
    assert_left_alone(model, "encoder", "conv2 has hooks", lambda m: encode(m, mel))
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *call: None)
    try:
        assert_left_alone(model, "encoder", "global module hooks", lambda m: encode(m, mel))
    finally:
        handle.remove()


def test_hooks_on_the_module_itself_run_on_max(model, mel):
    whisper_max.accelerate(model)
    seen = []
    model.encoder.register_forward_hook(lambda *call: seen.append(1))
    with on_max():
        encode(model, mel)
    assert seen == [1]


def test_a_kv_cache_of_the_caller(model):
    """The loop of stable-ts: hooks, a cleared cache, then several tokens at once."""
    features = numbers((1, 1500, 128), 1)

    def loop(m):
        cache, hooks = m.install_kv_cache_hooks()
        first = logits(m, features, kv_cache=cache)
        second = logits(m, features, TOKENS[:, :1], kv_cache=cache)
        cache.clear()
        third = logits(m, features, kv_cache=cache)
        for hook in hooks:
            hook.remove()
        return torch.cat([first, second, third], dim=1)

    assert_left_alone(model, "decoder", "kv_cache", loop)


def test_replaced_method_of_one_module(model, mel, monkeypatch):
    block = model.encoder.blocks[0]
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda *args, **kw: forward(*args, **kw) * 1.5)
    reason = "blocks.0.forward was replaced"
    assert_left_alone(model, "encoder", reason, lambda m: encode(m, mel))


def test_replaced_method_of_a_class(model, mel, monkeypatch):
    """As icefall does, and after patch(): before it, the target would be refused."""
    attention = MultiHeadAttention.qkv_attention

    def louder(self, *args, **kw):
        values, weights = attention(self, *args, **kw)
        return values * 1.5, weights

    with monkeypatch.context() as patch:
        patch.setattr(MultiHeadAttention, "qkv_attention", louder)
        expected = encode(model, mel)
    whisper_max.accelerate(model)
    with with_fallback(), monkeypatch.context() as patch:
        patch.setattr(MultiHeadAttention, "qkv_attention", louder)
        assert torch.equal(encode(model, mel), expected)
        reasons = whisper_max.status().targets["encoder"].reasons
    assert any("qkv_attention was replaced" in reason for reason in reasons), reasons


@pytest.mark.parametrize("of", ["its class", "the model"])
def test_a_model_that_hooks_into_the_caches_itself(model, mel, of):
    """Upstream's inference asks the model for the caches' hooks."""
    queries = []

    def install(self, cache=None):
        cache, hooks = whisper.model.Whisper.install_kv_cache_hooks(self, cache)
        query = self.decoder.blocks[0].cross_attn.query
        return cache, [*hooks, query.register_forward_hook(lambda *_: queries.append(_[2]))]

    if of == "its class":
        model.__class__ = type("Recording", (type(model),), {"install_kv_cache_hooks": install})
    else:
        model.install_kv_cache_hooks = install.__get__(model)
    with with_fallback():
        eight_tokens(whisper_max.accelerate(model), mel)
        reasons = whisper_max.status().targets["decoding_loop"].reasons
    assert len(queries) == 8
    assert any("install_kv_cache_hooks was replaced" in reason for reason in reasons), reasons


def eight_tokens(model, mel):
    options = decoding.DecodingOptions(language="en", fp16=False, sample_len=8)
    return model.decode(mel[0], options).tokens


def wrapped(method, change):
    """A method in the disguise of the one it calls, which `functools.wraps` is."""

    @functools.wraps(method)
    def around(*args, **options):
        return change(method, *args, **options)

    return around


def without_even_tokens(method, self, first, logits, *rest):
    """Of a token decoder's update (tokens, logits, ...), which ranks what is left."""
    logits[:, ::2] = -torch.inf
    return method(self, first, logits, *rest)


def also_without_even_tokens(method, self, logits, tokens):
    """Of a filter."""
    method(self, logits, tokens)
    logits[:, ::2] = -torch.inf


WRAPPED = {
    "qkv_attention": (
        lambda: whisper.model.MultiHeadAttention,
        lambda method, *args, **options: (-(found := method(*args, **options))[0], found[1]),
    ),
    "forward": (
        lambda: whisper.model.ResidualAttentionBlock,
        lambda method, *args, **options: -method(*args, **options),
    ),
    "apply": (lambda: decoding.SuppressTokens, also_without_even_tokens),
    "update": (lambda: decoding.GreedyDecoder, without_even_tokens),
    "logits": (
        lambda: decoding.PyTorchInference,
        lambda method, *args: -method(*args),
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_method_wrapped_in_the_middle(plain, checkpoint, mel, monkeypatch, name):
    """A class that MAX has served gets another method that claims to be upstream's own."""
    find, change = WRAPPED[name]

    def change_class(patch):
        cls = find()  # the present one: a patch replaces some
        patch.setattr(cls, name, wrapped(getattr(cls, name), change))

    usual = eight_tokens(plain, mel)
    with monkeypatch.context() as patch:
        change_class(patch)
        expected = eight_tokens(plain, mel)
    with with_fallback():
        assert eight_tokens(checkpoint, mel) == usual
        with monkeypatch.context() as patch:
            change_class(patch)
            assert eight_tokens(checkpoint, mel) == expected != usual
        assert eight_tokens(checkpoint, mel) == usual


def test_a_buffer_with_gradients(model, mel):
    """Where no parameter has any."""
    model.encoder.positional_embedding.requires_grad_()
    assert_left_alone(
        model, "encoder", "gradients are wanted", lambda m: m.encoder(mel) * m.encoder(mel)
    )
    assert model.encoder(mel).requires_grad


def test_another_function_for_attention(plain, checkpoint, mel, monkeypatch):
    """In the place where upstream's module looks for it."""
    if not getattr(whisper.model, "scaled_dot_product_attention", None):
        pytest.skip("this release has its own attention only")
    attend = whisper.model.scaled_dot_product_attention

    def change(patch):
        patch.setattr(
            whisper.model, "scaled_dot_product_attention", lambda *args, **kw: -attend(*args, **kw)
        )

    with monkeypatch.context() as patch:
        change(patch)
        expected = eight_tokens(plain, mel)
    with with_fallback():
        usual = eight_tokens(checkpoint, mel)
        change(monkeypatch)
        assert eight_tokens(checkpoint, mel) == expected != usual


def test_replaced_and_quantized_submodules(model, mel):
    features = numbers((1, 1500, 128), 1)
    model.decoder.token_embedding = copy.deepcopy(model.decoder.token_embedding)
    model.decoder.token_embedding.__class__ = type("Other", (nn.Embedding,), {})
    reason = "token_embedding was replaced"
    assert_left_alone(model, "decoder", reason, lambda m: logits(m, features))
    model.encoder.ln_post = nn.Identity()
    assert_left_alone(model, "encoder", "ln_post was replaced", lambda m: encode(m, mel))


def test_gradients(model, mel):
    whisper_max.accelerate(model)

    def train():
        features = model.encoder(mel)
        features.sum().backward()
        return model.encoder.conv1.weight.grad.clone()

    found = on_torch("encoder", "gradients", train)
    whisper_max.restore(model)
    model.zero_grad()
    assert torch.equal(found, train())


def test_autocast(model, mel):
    def call(m):
        with torch.autocast("cpu", torch.bfloat16):
            return encode(m, mel)

    assert_left_alone(model, "encoder", "autocast", call)


def test_tracing(model, mel):
    whisper_max.accelerate(model)
    with with_fallback(), torch.no_grad():
        traced = torch.jit.trace(model.encoder, mel, check_trace=False)
    other = numbers((1, 80, 3000), 5)
    whisper_max.restore(model)
    torch.testing.assert_close(traced(other), encode(model, other))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(model, mel, dtype):
    reason = f"mel is {str(dtype).removeprefix('torch.')}, not float32"
    assert_left_alone(model, "encoder", reason, lambda m: encode(m, mel.to(dtype)))


def test_half_a_model_gets_upstreams_own_error(model, mel):
    """Upstream's LayerNorm does not take float16 parameters on a CPU."""
    model.half()

    def outcome():
        with pytest.raises(RuntimeError) as raised:
            encode(model, mel)
        return str(raised.value)

    expected = outcome()
    whisper_max.accelerate(model)
    assert on_torch("encoder", "the parameters are float16", outcome) == expected


def test_tensor_subclasses(model, mel):
    class Tagged(torch.Tensor):
        pass

    assert_left_alone(
        model, "encoder", "not a plain tensor", lambda m: encode(m, mel.as_subclass(Tagged))
    )


def test_values_that_are_not_finite(model, mel):
    spoilt = mel.clone()
    spoilt[0, 3, 100] = float("inf")
    whisper_max.accelerate(model)
    found = on_torch("encoder", "not finite", lambda: encode(model, spoilt))
    whisper_max.restore(model)
    assert torch.equal(found.isnan(), encode(model, spoilt).isnan())


@pytest.mark.parametrize("shape", [(1, 80, 2999), (1, 79, 3000), (80, 3000), (0, 80, 3000)])
def test_shapes_get_upstreams_own_answer(model, shape):
    bad = torch.zeros(shape)

    def outcome():
        try:
            return encode(model, bad).shape
        except (AssertionError, RuntimeError, IndexError) as error:
            return type(error), str(error)

    expected = outcome()
    whisper_max.accelerate(model)
    assert on_torch("encoder", "mel", outcome) == expected


def test_subclassed_task(plain, checkpoint, mel):
    """A project's own DecodingTask keeps whisper's loop, with the decoder's steps on MAX."""

    class Task(decoding.DecodingTask):
        pass

    options = decoding.DecodingOptions(fp16=False)
    expected = decoding.DecodingTask(plain, options).run(mel)[0]
    with with_fallback():
        found = Task(checkpoint, options).run(mel)[0]
        status = whisper_max.status().targets
    assert status["inference"].max_calls > 0 and status["inference"].torch_calls == 0
    assert any("not upstream's DecodingTask" in r for r in status["decoding_loop"].reasons)
    assert_same(found, expected)


def test_custom_filter_and_foreign_inference(plain, checkpoint, mel):
    class NoBlue(decoding.LogitFilter):
        def apply(self, logits, tokens):
            logits[:, 300] = -torch.inf

    def decode(model):
        task = decoding.DecodingTask(model, decoding.DecodingOptions(fp16=False))
        task.logit_filters.append(NoBlue())
        return task.run(mel)[0]

    expected = decode(plain)
    with with_fallback():
        found = decode(checkpoint)
        reasons = whisper_max.status().targets["decoding_loop"].reasons
    assert any("NoBlue filters the logits" in reason for reason in reasons)
    assert_same(found, expected)


@pytest.mark.parametrize("options", [{}, {"beam_size": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("step", [0, 1, 5])
@pytest.mark.parametrize("loop", ["fused", "stepwise"])
def test_max_failing_in_the_middle(plain, checkpoint, mel, monkeypatch, options, step, loop):
    options = decoding.DecodingOptions(fp16=False, language="en", **options)
    expected = whisper.decode(plain, mel[0], options)
    targets = ("encoder", "decoder", "inference")
    targets += ("decoding_loop",) if loop == "fused" else ()
    with whisper_max.patched(compile="blocking", targets=targets):
        fail_from(monkeypatch, step)
        found = whisper.decode(checkpoint, mel[0], options)
        target = "decoding_loop" if loop == "fused" else "inference"
        reasons = whisper_max.status().targets[target].reasons
    assert "out of memory, say" in reasons
    assert_same(found, expected)
    assert not any(module._forward_hooks for module in checkpoint.modules())


def test_disabled_block(plain, checkpoint, mel):
    expected = encode(plain, mel)
    with with_fallback(), whisper_max.disabled():
        assert torch.equal(encode(checkpoint, mel), expected)


def test_strict_mode_tells_all_reasons(model, mel):
    whisper_max.accelerate(model)
    model.encoder.conv1.register_forward_hook(lambda *call: None)
    with on_max(), pytest.raises(UnsupportedByMax) as raised:
        encode(model, mel.double())
    assert "conv1 has hooks" in str(raised.value) and "not float32" in str(raised.value)


def test_shadow_mode_returns_pytorchs_result_and_tells_of_differences(
    plain, checkpoint, mel, monkeypatch, caplog
):
    options = decoding.DecodingOptions(fp16=False, language="en", beam_size=2)
    expected = whisper.decode(plain, mel[0], options)
    with whisper_max.patched(mode="shadow", compile="blocking"):
        found = whisper.decode(checkpoint, mel[0], options)
        assert not [r for r in caplog.records if "differs" in r.getMessage()]
        assert found.tokens == expected.tokens and found.avg_logprob == expected.avg_logprob
        select = DecoderSession.select

        def other(self, tokens, selection, rules):
            logprobs, best = select(self, tokens, selection, rules)
            return logprobs, [400] * len(best)

        monkeypatch.setattr(DecoderSession, "select", other)
        found = whisper.decode(checkpoint, mel[0], options)
    assert found.tokens == expected.tokens
    assert any("decoding_loop on MAX differs" in r.getMessage() for r in caplog.records)
