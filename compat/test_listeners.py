"""Forward hooks that listen: they hear on MAX what upstream's modules would have told them.

And those that do more than listen get their way, by PyTorch.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import whisper
from hypothesis import given
from hypothesis import strategies as st
from whisper.decoding import DecodingOptions, DecodingTask
from whisper.model import MultiHeadAttention

import whisper_max
from harness import exact, on_max, on_pytorch, with_fallback
from isolation import pytorch_threads
from recordings import samples
from strategies import numbers, recipes, seeds, token_rows
from test_decoding_options import assert_same
from tolerances import AVG_LOGPROB, INSIDE, assert_precise
from whisper_max import UnsupportedByMax
from whisper_max.runtime.engine import Engine

PLACES = ("token_embedding", "blocks.0.cross_attn", "blocks.1.cross_attn", "ln")
TOKENS = torch.tensor([[50258, 50259, 50359, 50364, 300]])

without_sdpa = getattr(whisper.model, "disable_sdpa", nullcontext)


class Heard:
    """Hooks in places of a module, and what they heard: (place, inputs, output) of each call."""

    def __init__(self, module, places, hook=lambda call: None):
        self.calls = []
        self._handles = [self._hang(module, place, hook) for place in places]

    def _hang(self, module, place, hook):
        def listen(part, inputs, output):
            assert part is module.get_submodule(place)
            self.calls.append((place, inputs, output))
            return hook(self.calls[-1])

        return module.get_submodule(place).register_forward_hook(listen)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()

    @property
    def places(self):
        return [place for place, _, _ in self.calls]

    @property
    def shapes(self):
        return [(call[0], *map(shape_of, tensors(call))) for call in self.calls]


def tensors(call):
    _, inputs, output = call
    return [*inputs, *(output if isinstance(output, tuple) else [output])]


def shape_of(tensor):
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.is_contiguous(), tensor.requires_grad


@pytest.fixture(scope="module")
def mel():
    return whisper.log_mel_spectrogram(whisper.pad_or_trim(samples("en02")))


@pytest.fixture
def model(plain):
    """A model of the test's own."""
    return copy.deepcopy(plain)


@given(recipes(), st.integers(1, 3), st.booleans(), st.booleans(), seeds, st.data())
def test_hooks_of_a_whole_text_hear_what_upstreams_modules_say(
    strict, recipe, rows, one_window, sdpa, seed, data
):
    dims = recipe.dims
    model = recipe.build()
    windows = 1 if one_window else rows
    features = numbers((windows, dims.n_audio_ctx, dims.n_audio_state), seed)
    tokens = token_rows((rows, data.draw(st.integers(1, dims.n_text_ctx))), dims.n_vocab, seed)
    layers = data.draw(st.sets(st.integers(0, dims.n_text_layer - 1)))
    places = [f"blocks.{layer}.cross_attn" for layer in sorted(layers)]
    places += data.draw(st.lists(st.sampled_from(["token_embedding", "ln"]), unique=True))
    on_torch = on_pytorch(model).decoder

    heard = []
    for decoder in (model.decoder, on_torch, exact(on_torch)):
        audio = features.to(decoder.ln.weight.dtype)
        with torch.no_grad(), nullcontext() if sdpa else without_sdpa():
            with Heard(decoder, places) as hooks:
                decoder(tokens, audio)
        heard.append(hooks)
    ours, theirs, precise = heard
    assert ours.places == theirs.places and ours.shapes == theirs.shapes
    for calls in zip(ours.calls, theirs.calls, precise.calls):
        for found, expected, truth in zip(*map(tensors, calls)):
            if found is not None and found.is_floating_point():
                assert_precise(found, expected, truth.double(), INSIDE)
            elif found is not None:
                assert torch.equal(found, expected)


@pytest.mark.parametrize("beam_size", [None, 3])
@pytest.mark.allow_fallback  # the loop is upstream's
def test_hooks_of_a_decode_hear_every_step(plain, model, mel, beam_size):
    options = DecodingOptions(fp16=False, language="en", beam_size=beam_size)
    with without_sdpa(), Heard(plain.decoder, PLACES) as theirs:
        expected = whisper.decode(plain, mel, options)
    with without_sdpa(), Heard(model.decoder, PLACES) as ours, with_fallback():
        found = whisper.decode(model, mel, options)
        status = whisper_max.status().targets
    assert_same(found, expected)
    assert ours.shapes == theirs.shapes
    for call, expected_call in zip(ours.calls, theirs.calls):
        for one, other in zip(tensors(call), tensors(expected_call)):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    steps = len(ours.calls) / len(PLACES)
    assert (status["inference"].max_calls, status["inference"].torch_calls) == (steps, 0)
    assert status["decoding_loop"].reasons == {f"{place} has hooks": 1 for place in PLACES}


def test_hooks_on_the_first_convolution_hear_it(plain, model, mel, strict):
    with torch.no_grad():
        with Heard(plain.encoder, ["conv1"]) as theirs:
            expected = plain.encoder(mel[None])
        whisper_max.accelerate(model)
        with Heard(model.encoder, ["conv1"]) as ours:
            found = model.encoder(mel[None])
            again = model.encoder(mel[None])  # the features are remembered, the hook is not
    assert ours.places == 2 * theirs.places == ["conv1", "conv1"]
    assert ours.shapes[:1] == theirs.shapes
    for one, other in zip(tensors(ours.calls[0]), tensors(theirs.calls[0])):
        assert torch.equal(one, other)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, found)


def doubled(call):
    place, _, output = call
    return (output[0] * 2, output[1]) if isinstance(output, tuple) else output * 2


def halved_in_place(call):
    place, _, output = call
    (output[0] if isinstance(output, tuple) else output).mul_(0.5)


def inputs_zeroed(call):
    place, inputs, _ = call
    inputs[0].zero_()


CHANGES = pytest.mark.parametrize("change", [doubled, halved_in_place, inputs_zeroed])


@CHANGES
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.allow_fallback
def test_a_changed_output_stands_in_a_whole_text(model, place, change):
    features = numbers((1, 1500, 128), 1)
    results, heard = [], []
    for patched in (False, True):
        hook = lambda call: change(call) if call[0] == place else None  # noqa: E731
        with torch.no_grad(), Heard(model.decoder, PLACES, hook) as hooks:
            if patched:
                whisper_max.accelerate(model)
            with with_fallback() if patched else nullcontext():
                results.append(model.decoder(TOKENS.clone(), features))
        heard.append(hooks)
    assert heard[1].shapes == heard[0].shapes
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@CHANGES
@pytest.mark.allow_fallback
def test_a_changed_convolution_stands(model, mel, change):
    results, heard = [], []
    for patched in (False, True):
        with torch.no_grad(), Heard(model.encoder, ["conv1"], change) as hooks:
            if patched:
                whisper_max.accelerate(model)
            with with_fallback() if patched else nullcontext():
                results.append(model.encoder(mel[None].clone()))
        heard.append(hooks)
    assert heard[1].places == heard[0].places == ["conv1"]
    assert torch.equal(results[1], results[0])


@pytest.mark.parametrize("change", [doubled, halved_in_place])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("beam_size", [None, 3])
@pytest.mark.allow_fallback
def test_a_changed_output_stands_in_a_decode(plain, model, mel, place, change, step, beam_size):
    """PyTorch goes on from there, and what was told before is not told again."""
    options = DecodingOptions(fp16=False, language="en", beam_size=beam_size, sample_len=8)

    def decode(model):
        heard = []

        def hook(call):
            heard.append(call[0])
            if call[0] == place and heard.count(place) == step + 1:
                return change(call)

        with Heard(model.decoder, PLACES, hook) as hooks:
            return whisper.decode(model, mel, options), hooks

    expected, theirs = decode(plain)
    with with_fallback():
        found, ours = decode(model)
        inference = whisper_max.status().targets["inference"]
    assert f"a hook changed what {place} returns" in inference.reasons
    assert inference.max_calls == step
    assert ours.places == theirs.places
    assert found.tokens == expected.tokens
    assert found.avg_logprob == pytest.approx(expected.avg_logprob, abs=AVG_LOGPROB)
    assert not any(part._forward_hooks for part in model.modules())


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.allow_fallback
def test_no_hook_is_called_twice_where_max_fails(plain, model, mel, monkeypatch, step):
    options = DecodingOptions(fp16=False, language="en", beam_size=3)
    execute = Engine.execute
    steps = iter(range(1000))

    def failing(self, graph, *operands):
        if graph == "decoder_step" and next(steps) >= step:
            raise UnsupportedByMax("out of memory, say")
        return execute(self, graph, *operands)

    with Heard(plain.decoder, PLACES) as theirs:
        expected = whisper.decode(plain, mel, options)
    monkeypatch.setattr(Engine, "execute", failing)
    with Heard(model.decoder, PLACES) as ours, with_fallback():
        found = whisper.decode(model, mel, options)
        assert whisper_max.status().targets["inference"].max_calls == step
    assert_same(found, expected)
    assert ours.shapes == theirs.shapes


@pytest.mark.allow_fallback
def test_no_hook_is_called_twice_in_shadow_mode(model, mel):
    features = numbers((1, 1500, 128), 1)
    whisper_max.accelerate(model)
    with Heard(model.decoder, PLACES) as decoder, Heard(model.encoder, ["conv1"]) as encoder:
        with torch.no_grad(), whisper_max.patched(mode="shadow", compile="blocking"):
            model.decoder(TOKENS, features)
            model.encoder(mel[None])
            status = whisper_max.status().targets
    assert status["decoder"].max_calls == status["encoder"].max_calls == 1
    assert decoder.places == list(PLACES) and encoder.places == ["conv1"]


def test_a_fault_in_a_hook_is_the_callers(model, strict):
    features = numbers((1, 1500, 128), 1)
    whisper_max.accelerate(model)

    def fail(call):
        raise KeyError("the hook's own")

    for place in PLACES:
        with Heard(model.decoder, [place], fail), torch.no_grad():
            with pytest.raises(KeyError, match="the hook's own"):
                model.decoder(TOKENS, features)
    with torch.no_grad():
        model.decoder(TOKENS, features)


def test_strict_mode_refuses_a_changed_output(model, strict):
    whisper_max.accelerate(model)
    with Heard(model.decoder, ["ln"], doubled), torch.no_grad():
        with pytest.raises(UnsupportedByMax, match="a hook changed what ln returns"):
            model.decoder(TOKENS, numbers((1, 1500, 128), 1))


@pytest.mark.parametrize("more", [{"with_kwargs": True}, {"always_call": True}])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.allow_fallback
def test_hooks_that_want_more_are_pytorchs(model, place, more):
    heard = []
    features = numbers((1, 1500, 128), 1)
    part = model.decoder.get_submodule(place)
    part.register_forward_hook(lambda *call: heard.append(len(call)), **more)
    with torch.no_grad():
        expected = model.decoder(TOKENS, features)
        whisper_max.accelerate(model)
        with with_fallback():
            found = model.decoder(TOKENS, features)
            decoder = whisper_max.status().targets["decoder"]
    assert decoder.reasons == {f"{place} has hooks": 1}
    assert torch.equal(found, expected)
    assert len(heard) == 2 and heard[0] == heard[1]


@pytest.mark.allow_fallback
def test_hooks_in_inference_mode_are_pytorchs(model, mel):
    """In which nobody counts changes in place."""
    features = numbers((1, 1500, 128), 1)
    with torch.inference_mode(), Heard(model.decoder, ["ln"], halved_in_place) as heard:
        expected = model.decoder(TOKENS, features)
        whisper_max.accelerate(model)
        with with_fallback():
            found = model.decoder(TOKENS, features)
            assert whisper_max.status().targets["decoder"].reasons == {"ln has hooks": 1}
    assert torch.equal(found, expected) and heard.places == ["ln", "ln"]


@pytest.mark.allow_fallback
def test_a_hook_that_comes_during_a_decode_is_heard(plain, model, mel):
    def decode(model):
        inference = whisper.decoding.PyTorchInference(model, TOKENS.shape[1])
        heard = []
        with torch.no_grad():
            features = model.encoder(mel[None])
            rows = TOKENS
            for step in range(4):
                if step == 2:
                    handle = model.decoder.ln.register_forward_hook(
                        lambda part, inputs, output: heard.append(output)
                    )
                logits = inference.logits(rows, features)
                rows = torch.cat([rows, logits[:, -1:].argmax(dim=-1)], dim=1)
        inference.cleanup_caching()
        handle.remove()
        return rows, heard

    expected, theirs = decode(plain)
    with on_max():
        found, ours = decode(model)
    assert torch.equal(found, expected)
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not hasattr(MultiHeadAttention, "use_sdpa"), reason="before SDPA")
def test_without_sdpa_nobody_has_to_listen(checkpoint, mel, strict):
    """The switch is for hooks; where there are none, it changes nothing."""
    with whisper.model.disable_sdpa():
        whisper.decode(checkpoint, mel, DecodingOptions(fp16=False, language="en"))


class OwnLoop(DecodingTask):
    """A task with a loop of its own, as stable-ts's."""

    def _main_loop(self, audio_features, tokens):
        self.threads = []
        try:
            for _ in range(4):
                logits = self.inference.logits(tokens, audio_features)[:, -1]
                self.threads.append(torch.get_num_threads())
                tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
            if self.sample_len == 1:
                raise KeyboardInterrupt
        finally:
            self.inference.cleanup_caching()
        self.threads.append(torch.get_num_threads())
        return tokens, torch.zeros(len(tokens)), [0.0] * len(tokens)


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="PyTorch without OpenMP")
@torch.no_grad()
def test_pytorch_keeps_to_one_thread_between_the_steps_of_a_loop(checkpoint, mel, strict):
    """Its threads and MAX's would wait for each other on the same CPUs."""
    options = DecodingOptions(fp16=False, language="en")
    interrupted = DecodingOptions(fp16=False, language="en", sample_len=1)
    with pytorch_threads(3):
        task = OwnLoop(checkpoint, options)
        task.run(mel[None])
        assert task.threads == [1, 1, 1, 1, 3]
        with pytest.raises(KeyboardInterrupt):
            OwnLoop(checkpoint, interrupted).run(mel[None])
        assert torch.get_num_threads() == 3

        inference = whisper.decoding.PyTorchInference(checkpoint, TOKENS.shape[1])
        inference.logits(TOKENS, checkpoint.embed_audio(mel[None]))
        assert torch.get_num_threads() == 3  # outside of a decode nobody would end it


@pytest.mark.parametrize(("count", "in_hooks"), [(3, 3), (2, 1)])
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="PyTorch without OpenMP")
@torch.no_grad()
def test_hooks_have_pytorchs_threads_where_they_gain_by_them(
    checkpoint, mel, strict, count, in_hooks
):
    seen = []
    listen = lambda call: seen.append(torch.get_num_threads())  # noqa: E731
    with pytorch_threads(count), Heard(checkpoint.decoder, ["ln"], listen):
        task = OwnLoop(checkpoint, DecodingOptions(fp16=False, language="en"))
        task.run(mel[None])
    assert seen == [in_hooks] * 4
    assert task.threads == [1, 1, 1, 1, count]
