"""Code that exists out there, in miniature: it gets what it gets from unpatched whisper."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import textwrap
import weakref
from abc import ABC
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import whisper
import whisper.timing
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from whisper import decoding
from whisper.model import ModelDimensions

import whisper_max
from harness import load_checkpoint, on_max, on_pytorch, with_fallback
from recordings import assert_same_result, samples
from strategies import Recipe, numbers, small, token_rows
from whisper_max.runtime import loading


@pytest.fixture
def model():
    """A small model in upstream's classes, of the test's own."""
    return small().build()


@pytest.fixture
def mel():
    return numbers((2, 80, 120), 2)


@pytest.fixture
def features():
    return numbers((1, 60, 128), 3)


def assert_on_pytorch(target: str, reason: str) -> None:
    counted = whisper_max.status().targets[target]
    assert counted.max_calls == 0 and counted.torch_calls > 0
    assert any(reason in found for found in counted.reasons), counted.reasons


def test_transcribe_and_decode_stay_upstreams_own():
    before = whisper.transcribe, whisper.decode, whisper.detect_language, whisper.load_model
    with on_max():
        assert before == (
            whisper.transcribe,
            whisper.decode,
            whisper.detect_language,
            whisper.load_model,
        )
        assert whisper.model.Whisper.transcribe is whisper.transcribe
        assert whisper.model.Whisper.decode is whisper.decode


@torch.no_grad()
def test_an_instance_with_a_forward_of_its_own(model, mel):
    expected = 2 * model.encoder(mel)
    with with_fallback():
        whisper_max.accelerate(model)
        forward = model.encoder.forward
        model.encoder.forward = lambda x: 2 * forward(x)
        torch.testing.assert_close(model.encoder(mel), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.allow_fallback
def test_espnet_copies_the_decoder_extends_its_vocabulary_and_trains(model, features):
    def train(model):
        torch.manual_seed(5)
        decoder = copy.deepcopy(model.decoder)
        decoder.token_embedding = nn.Embedding(120, 128)
        decoder.requires_grad_(True).train()
        optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
        losses = []
        for step in range(3):
            optimizer.zero_grad()
            logits = decoder(token_rows((2, 7), 120, step), features)
            loss = logits.square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    expected = train(model)
    with with_fallback():
        assert train(whisper_max.accelerate(model)) == expected
        assert_on_pytorch("decoder", "gradients are wanted")


@torch.no_grad()
def test_a_replaced_embedding_of_another_size_runs_on_max(model, features):
    model.decoder.token_embedding = nn.Embedding(120, 128)
    tokens = token_rows((2, 7), 120, 4)
    expected = model.decoder(tokens, features)
    with on_max():
        found = whisper_max.accelerate(model).decoder(tokens, features)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.allow_fallback
@torch.no_grad()
def test_beam_search_by_hand_indexes_the_cache(model, features):
    """By the modules' own keys, as upstream's beam search once did."""

    def search(model):
        cache, hooks = model.install_kv_cache_hooks()
        five = features.repeat(5, 1, 1)
        found = [model.decoder(token_rows((5, 4), 100, 1), five, kv_cache=cache)]
        for step in range(3):
            for block in model.decoder.blocks:
                for module in (block.attn.key, block.attn.value):
                    cache[module] = cache[module][[4, 2, 2, 0, 1]].detach()
            tokens = token_rows((5, 1), 100, step)
            found.append(model.decoder(tokens, five, kv_cache=cache))
        for hook in hooks:
            hook.remove()
        return torch.cat(found, dim=1)

    expected = search(model)
    with with_fallback():
        assert torch.equal(search(whisper_max.accelerate(model)), expected)
        assert_on_pytorch("decoder", "the call brings its own kv_cache")


def mel_of(name: str) -> torch.Tensor:
    """Of a recording, shape = (80, 3000)."""
    return whisper.log_mel_spectrogram(whisper.pad_or_trim(samples(name)))


class OwnCaches:
    """The inference of a beam search that puts upstream's caches in order by itself."""

    def __init__(self, inference: decoding.Inference) -> None:
        self.inference = inference

    def rearrange_kv_cache(self, source_indices: list[int]) -> None:
        caches = self.inference.kv_cache
        for module, cache in caches.items():
            if len(cache) == len(source_indices):  # else of cross attention, for all beams
                caches[module] = cache[source_indices].detach()


@pytest.mark.allow_fallback
def test_a_beam_search_that_reorders_the_caches_itself(plain, checkpoint):
    def search(model):
        options = decoding.DecodingOptions(language="en", fp16=False, beam_size=5)
        task = decoding.DecodingTask(model, options)

        class Search(decoding.BeamSearchDecoder):
            """Another class: the loop is upstream's then."""

        task.decoder = Search(5, task.tokenizer.eot, OwnCaches(task.inference))
        return [result.tokens for result in task.run(mel_of("oov01")[None])]

    expected = search(plain)
    with with_fallback():
        assert search(checkpoint) == expected
        reasons = whisper_max.status().targets["inference"].reasons
    assert reasons["its kv_cache was asked for"] > 0, reasons


@pytest.mark.allow_fallback
@torch.no_grad()
def test_caches_rolled_back_to_try_several_continuations(plain, checkpoint):
    def scores(model):
        inference = decoding.PyTorchInference(model, 4)
        assert not inference.kv_cache
        features = model.embed_audio(mel_of("en01")[None])
        prompt = torch.tensor([[50258, 50259, 50359, 50364]])
        inference.logits(prompt, features)
        kept = dict(inference.kv_cache)
        assert len(kept) == 4 * len(model.decoder.blocks)
        found = []
        for token in (1222, 3086, 2738):
            inference.kv_cache.clear()
            inference.kv_cache.update(kept)
            tokens = torch.cat([prompt, torch.tensor([[token]])], dim=1)
            found.append(inference.logits(tokens, features)[0, -1])
        inference.cleanup_caching()
        return torch.stack(found)

    expected = scores(plain)
    with with_fallback():
        torch.testing.assert_close(scores(checkpoint), expected, atol=1e-3, rtol=1e-4)


# What upstream's modules come down to, and what somebody makes of its result.
REPLACED = {
    "Conv1d": (nn.Conv1d, "_conv_forward", lambda y: y * 2),
    "LayerNorm": (nn.LayerNorm, "forward", lambda y: y * 1.5),
    "GELU": (nn.GELU, "forward", torch.neg),
    "Module": (nn.Module, "__call__", lambda y: y * 0.5 if torch.is_tensor(y) else y),
    "linear": (F, "linear", lambda y: y * 0.5),
    "gelu": (F, "gelu", torch.neg),
    "layer_norm": (F, "layer_norm", lambda y: y * 1.5),
}


@pytest.mark.allow_fallback
@pytest.mark.parametrize("name", REPLACED)
@torch.no_grad()
def test_pytorchs_own_methods_and_functions_are_replaced(model, mel, monkeypatch, name):
    owner, attribute, change = REPLACED[name]
    original = getattr(owner, attribute)

    @functools.wraps(original)
    def changed(*args, **options):
        return change(original(*args, **options))

    usual = model.encoder(mel)
    with with_fallback():
        whisper_max.accelerate(model)
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, changed)
            found = model.encoder(mel)
            whisper_max.restore(model)
            expected = model.encoder(mel)
        assert torch.equal(found, expected)
        assert not torch.allclose(found, usual, atol=0.1)
        assert_on_pytorch("encoder", "was replaced")


def test_a_model_from_before_patch_is_an_instance_of_what_has_the_classes_name(model):
    text = str(model)
    with on_max():
        for part, name in ((model.encoder, "AudioEncoder"), (model.decoder, "TextDecoder")):
            assert isinstance(part, getattr(whisper.model, name))
        assert not isinstance(model.encoder, whisper.model.TextDecoder)
        extended = type("Extended", (whisper.model.AudioEncoder, ABC), {})
        assert not isinstance(model.encoder, extended)
        whisper_max.accelerate(model)
        assert str(model) == text


def test_unpatch_makes_models_upstreams_that_were_made_patched():
    whisper_max.patch()
    made = small().build()
    models = [made, copy.deepcopy(made), copy.copy(made), pickle.loads(pickle.dumps(made))]
    for model in models:
        assert type(model.encoder) is whisper.model.AudioEncoder
    whisper_max.unpatch()
    for model in models:
        assert type(model.encoder) is whisper.model.AudioEncoder
        assert type(model.decoder) is whisper.model.TextDecoder


@pytest.mark.allow_fallback
@pytest.mark.parametrize("obstacle", ["a dispatch mode", "too many tokens", "nothing compiled"])
@torch.no_grad()
def test_word_timestamps_left_to_pytorch_run_the_encoder_once(model, monkeypatch, obstacle):
    ran = []
    model.encoder.conv2.register_forward_hook(lambda *_: ran.append(1))
    tokenizer = whisper.tokenizer.get_tokenizer(True, language="en")
    text = [100] * (40 if obstacle == "too many tokens" else 3)
    context = FlopCounterMode(display=False) if obstacle == "a dispatch mode" else nullcontext()

    def align(model):
        ran.clear()
        arguments = (model, tokenizer, text, numbers((80, 120), 4), 100)
        with context:
            try:
                words = whisper.timing.find_alignment(*arguments)
            except (IndexError, RuntimeError) as error:
                return type(error), len(ran)
        return [word.word for word in words], len(ran)

    expected = align(model)
    with with_fallback():
        whisper_max.accelerate(model)
        if obstacle == "nothing compiled":
            refusal = whisper_max.UnsupportedByMax("nothing is compiled")
            monkeypatch.setattr(loading, "engine", raiser(refusal))
        assert align(model) == expected
        assert expected[1] == 1


def raiser(error: Exception):
    def fail(*args, **options):
        raise error

    return fail


@pytest.mark.allow_fallback
@torch.no_grad()
def test_quantize_dynamic(model, mel):
    """It copies the model and replaces the layers that it is told to."""
    if "onednn" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "onednn"

    def quantized(model):
        model.decoder.requires_grad_(False)
        for module in model.encoder.modules():
            if type(module).__name__ == "Linear":
                module.__class__ = nn.Linear
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    expected = quantized(copy.deepcopy(model)).encoder(mel)
    with with_fallback():
        small = whisper_max.accelerate(quantized(whisper_max.accelerate(model)))
        assert torch.equal(small.encoder(mel), expected)
        assert_on_pytorch("encoder", "was replaced by torch.ao")


@pytest.mark.allow_fallback
@torch.no_grad()
def test_torch_compile(model, mel):
    expected = model.encoder(mel)
    with with_fallback():
        compiled = torch.compile(whisper_max.accelerate(model).encoder, backend="eager")
        torch.testing.assert_close(compiled(mel), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.allow_fallback
@torch.no_grad()
def test_parametrized_weights(model, mel):
    nn.utils.parametrizations.weight_norm(model.encoder.blocks[0].mlp[0])
    expected = model.encoder(mel)
    with with_fallback():
        assert torch.equal(whisper_max.accelerate(model).encoder(mel), expected)
        assert_on_pytorch("encoder", "blocks.0.mlp.0")


@pytest.mark.allow_fallback
@torch.no_grad()
def test_another_head_size(mel):
    dims = ModelDimensions(80, 60, 128, 4, 1, 100, 30, 128, 4, 1)
    model = Recipe(dims, seed=1, gain=1.0, float16=True).build()
    tokens = token_rows((2, 5), 100, 1)
    expected = model(mel, tokens)
    with with_fallback():
        assert torch.equal(whisper_max.accelerate(model)(mel, tokens), expected)
        for target in ("encoder", "decoder"):
            assert_on_pytorch(target, "its head_dim is 32; the kernels are for 64")


@torch.no_grad()
def test_train_and_eval_are_the_same(model, mel):
    with on_max():
        whisper_max.accelerate(model)
        assert torch.equal(model.train().encoder(mel), model.eval().encoder(mel))


@torch.no_grad()
def test_one_window_of_audio_for_several_rows_of_tokens(model, features):
    tokens = token_rows((5, 8), 100, 1)
    with on_max():
        whisper_max.accelerate(model)
        one = model.decoder(tokens, features)
        five = model.decoder(tokens, features.repeat(5, 1, 1))
    assert torch.equal(one, five)
    torch.testing.assert_close(
        one, on_pytorch(model).decoder(tokens, features), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_the_mapping_of_caches_is_never_half_filled(model, features):
    """Upstream reads the offset off its first entry, and installs hooks whenever it is empty."""
    with on_max():
        whisper_max.accelerate(model)
        inference = decoding.PyTorchInference(model, 4)
        inference.logits(token_rows((2, 4), 100, 1), features)
        assert inference.hooks == []
        with pytest.raises(whisper_max.UnsupportedByMax, match="kv_cache was asked for"):
            inference.kv_cache
        inference.cleanup_caching()
        assert inference.kv_cache == {}
    assert not any(module._forward_hooks for module in model.modules())


def test_inference_mode(plain, checkpoint):
    options = {"fp16": False, "beam_size": 2, "word_timestamps": True}
    expected = plain.transcribe(samples("en01"), **options)
    with on_max(), torch.inference_mode():
        for _ in range(2):
            assert_same_result(checkpoint.transcribe(samples("en01"), **options), expected)


@pytest.mark.allow_fallback
def test_a_model_loaded_in_inference_mode(plain):
    """Its tensors have no version by which changes could be noticed."""
    expected = plain.transcribe(samples("en01"), fp16=False)
    with with_fallback(), torch.inference_mode():
        assert load_checkpoint().transcribe(samples("en01"), fp16=False) == expected
        assert_on_pytorch("encoder", "inference tensors")


@pytest.mark.parametrize("name", ["median_filter", "dtw"])
def test_a_replaced_part_of_the_word_timestamps_is_used(checkpoint, monkeypatch, name):
    """As packages do that bring a faster one."""
    theirs, calls = getattr(whisper.timing, name), []

    def replacement(*args):
        calls.append(name)
        return theirs(*args)

    with on_max():
        monkeypatch.setattr(whisper.timing, name, replacement)
        checkpoint.transcribe(samples("en01"), fp16=False, word_timestamps=True)
    assert calls


@torch.no_grad()
def test_negated_views(model, mel, features):
    """Their memory holds the numbers with another sign."""
    tokens = token_rows((2, 5), 100, 1)
    expected = model.encoder(-mel), model.decoder(tokens, -features)
    with on_max():
        whisper_max.accelerate(model)
        found = (
            model.encoder(torch._neg_view(mel)),
            model.decoder(tokens, torch._neg_view(features)),
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hooks_on_the_state_dict_do_not_change_the_weights(model, mel):
    """As those that rename or convert weights for a checkpoint."""
    expected = model.encoder(mel)

    def zeros(module, state, prefix, metadata):
        return {name: torch.zeros_like(tensor) for name, tensor in state.items()}

    model.encoder._register_state_dict_hook(zeros)
    with on_max():
        found = whisper_max.accelerate(model).encoder(mel)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Proxy:
    """Somebody's stand-in for a model, such as one that loads it when it is needed."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *arguments):
        return self.model(*arguments)


EAGER = partial(torch.compile, backend="eager")


@pytest.mark.parametrize("stand_in", [Proxy, weakref.proxy, EAGER])
@pytest.mark.allow_fallback
def test_stand_ins_for_a_model(plain, checkpoint, stand_in):
    def text(model):
        model = stand_in(model)
        return whisper.transcribe(model, samples("en01"), word_timestamps=True, fp16=False)

    expected = text(plain)
    with with_fallback():
        assert_same_result(text(checkpoint), expected)


@torch.no_grad()
def test_logits_can_be_changed_in_place_with_gradients(model, features):
    """Upstream's are no view of another tensor, which PyTorch would refuse to change so."""
    bias, tokens = nn.Parameter(torch.ones(())), token_rows((2, 3), 100, 1)
    with with_fallback():
        whisper_max.accelerate(model)
        several = model.decoder(token_rows((2, 1), 100, 1).expand(2, 3), features)
        own = decoding.PyTorchInference(model, 3)
        found = several, model.decoder(tokens, features), own.logits(tokens, features)
        own.cleanup_caching()
    for logits in found:
        assert not logits._is_view()
        with torch.enable_grad():
            logits += bias
        assert logits.requires_grad
        logits.detach_().squeeze_()


class Early(nn.Module):
    """Some of the blocks, without a length: upstream only goes through them."""

    def __init__(self, blocks):
        super().__init__()
        self.inner = blocks

    def __iter__(self):
        return iter(self.inner[:2])


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.allow_fallback
def test_blocks_without_a_length(plain, part):
    def outcome(model):
        model = copy.deepcopy(model)
        blocks = getattr(model, part)
        blocks.blocks = Early(blocks.blocks)
        return model.transcribe(samples("en01"), word_timestamps=True, fp16=False)

    expected = outcome(plain)
    with with_fallback():
        assert_same_result(outcome(plain), expected)


@pytest.mark.allow_fallback
def test_an_encoder_that_no_set_could_hold(plain, checkpoint):
    """As a data class is, that stands in for a part of a model."""

    class Encoder:
        __hash__ = None

        def __init__(self, encoder):
            self.encoder = encoder

        def __call__(self, mel):
            return self.encoder(mel)

    def tokens(model):
        names = "dims", "decoder", "device", "is_multilingual", "num_languages"
        names += ("install_kv_cache_hooks",)
        duck = SimpleNamespace(**{name: getattr(model, name) for name in names})
        duck.encoder = Encoder(model.encoder)
        options = decoding.DecodingOptions(language="en", fp16=False, sample_len=5)
        return decoding.DecodingTask(duck, options).run(window)[0].tokens

    window = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples("en01")))[None]
    expected = tokens(plain)
    with with_fallback():
        assert tokens(checkpoint) == expected


@pytest.mark.allow_fallback
def test_whispers_model_loaded_anew(plain, monkeypatch):
    """Then upstream finds no attention in models from before, and decodes without caches."""

    def logits(model):
        inference = decoding.PyTorchInference(model, 3)
        with torch.no_grad():
            found = [inference.logits(tokens[:, :count], audio) for count in (3, 4)]
        inference.cleanup_caching()
        return found

    tokens, audio = token_rows((1, 4), 100, 1), torch.randn(1, 1500, plain.dims.n_audio_state)
    other = type("MultiHeadAttention", (whisper.model.MultiHeadAttention,), {})
    with with_fallback():
        monkeypatch.setattr(whisper.model, "MultiHeadAttention", other)
        found = logits(plain)
        reasons = whisper_max.status().targets["inference"].reasons
    expected = logits(whisper_max.restore(plain))
    assert "whisper.model.MultiHeadAttention was replaced" in reasons
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["of the function", "another function"])
@pytest.mark.allow_fallback
def test_whispers_code_reloaded_while_it_runs(plain, checkpoint, monkeypatch, how):
    """As IPython's autoreload does: the old function gets new code, or the class a new function."""

    def tokens(model):
        mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples("en01")))
        options = decoding.DecodingOptions(language="en", fp16=False)
        return whisper.decode(model, mel, options).tokens

    greedy = decoding.GreedyDecoder
    source = textwrap.dedent(inspect.getsource(greedy.update))
    changed = source.replace("next_tokens =", "logits[:, 2738] = -np.inf; next_tokens =")
    assert changed != source
    namespace = {}
    exec(compile(changed, decoding.__file__, "exec"), vars(decoding), namespace)
    with with_fallback():
        before = tokens(checkpoint)
        assert 2738 in before
        new = namespace["update"]
        new.__qualname__ = greedy.update.__qualname__
        if how == "of the function":
            monkeypatch.setattr(greedy.update, "__code__", new.__code__)
        else:
            monkeypatch.setattr(greedy, "update", new)
        found = tokens(checkpoint)
    assert found == tokens(plain) != before


@pytest.mark.allow_fallback
def test_a_method_exchanged_for_that_of_another_class(plain, checkpoint, monkeypatch):
    """Both are upstream's own: here timestamps follow no rules any more."""

    def tokens(model):
        mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples("oov02")))
        return whisper.decode(model, mel, decoding.DecodingOptions(fp16=False)).tokens

    with_rules = tokens(plain)
    monkeypatch.setattr(decoding.ApplyTimestampRules, "apply", decoding.SuppressBlank.apply)
    expected = tokens(plain)
    assert expected != with_rules
    with with_fallback():
        assert tokens(checkpoint) == expected


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (whisper.model.Whisper, "forward"),
        (whisper.model.TextDecoder, "__call__"),
        (nn.Module, "_call_impl"),
    ],
)
@pytest.mark.allow_fallback
def test_calls_replaced_after_patch(plain, checkpoint, monkeypatch, owner, name):
    heard = []
    original = getattr(owner, name)

    def listening(self, *arguments, **named):
        heard.append(type(self))
        return original(self, *arguments, **named)

    def count(model):
        heard.clear()
        model.transcribe(samples("en01"), word_timestamps=True, fp16=False)
        return len(heard)

    with with_fallback():
        count(checkpoint)
        # On the class that has the name now, which may be ours.
        monkeypatch.setattr(getattr(whisper.model, owner.__name__, owner), name, listening)
        found = count(checkpoint)
    monkeypatch.undo()
    monkeypatch.setattr(owner, name, listening)
    assert found == count(plain) > 0
