"""Code that exists out there, in miniature: it gets what it gets from unpatched whisper."""

from __future__ import annotations

import copy

import pytest
import torch
import whisper
import whisper.timing
from torch import nn
from whisper import decoding
from whisper.model import ModelDimensions

import whisper_max
from harness import load_checkpoint, on_max, on_pytorch, with_fallback
from recordings import assert_same_result, samples
from strategies import Recipe, numbers, small, token_rows


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
        assert inference.kv_cache == {} and inference.hooks == []
        inference.cleanup_caching()
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
