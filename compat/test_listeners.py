"""Hooks of packages that listen: they hear on MAX what upstream's modules would have told them.

Should one do more than listen, it gets its way. All other hooks are PyTorch's.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import FunctionType

import pytest
import torch
import whisper
from hypothesis import given
from hypothesis import strategies as st
from whisper import timing
from whisper.decoding import DecodingOptions, DecodingTask, LogitFilter
from whisper.model import MultiHeadAttention
from whisper.tokenizer import get_tokenizer

import whisper_max
from harness import exact, on_pytorch, with_fallback
from isolation import pytorch_threads
from recordings import samples
from strategies import numbers, recipes, seeds, token_rows
from test_decoding_options import assert_same
from tolerances import AVG_LOGPROB, INSIDE, assert_precise
from whisper_max import UnsupportedByMax, report
from whisper_max.runtime.engine import Engine

PLACES = ("token_embedding", "blocks.0.cross_attn", "blocks.1.cross_attn", "ln")
TOKENS = torch.tensor([[50258, 50259, 50359, 50364, 300]])

without_sdpa = getattr(whisper.model, "disable_sdpa", nullcontext)


def as_of(package, function):
    """The same function, as if a module of this package had defined it."""
    names = {**function.__globals__, "__name__": f"{package}.timing"}
    return FunctionType(function.__code__, names, closure=function.__closure__)


class Heard:
    """Hooks in places of a module, and what they heard: (place, inputs, output) of each call.

    hook : is given each call, and may return what a hook may
    package : whose hooks they are
    """

    def __init__(self, module, places, hook=lambda call: None, package="stable_whisper"):
        self.calls = []
        self._handles = [self._hang(module, place, hook, package) for place in places]

    def _hang(self, module, place, hook, package):
        def listen(part, inputs, output):
            assert part is module.get_submodule(place)
            self.calls.append((place, inputs, output))
            return hook(self.calls[-1])

        return module.get_submodule(place).register_forward_hook(as_of(package, listen))

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


CHANGES = pytest.mark.parametrize("change", [doubled, halved_in_place])


@CHANGES
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.allow_fallback
def test_a_changed_output_stands_in_a_whole_text(plain, model, place, change):
    features = numbers((1, 1500, 128), 1)

    def logits(model):
        hook = lambda call: change(call) if call[0] == place else None  # noqa: E731
        with torch.no_grad(), Heard(model.decoder, PLACES, hook) as hooks:
            return model.decoder(TOKENS, features), hooks

    expected, theirs = logits(plain)
    whisper_max.accelerate(model)
    with with_fallback():
        found, ours = logits(model)
        decoder = whisper_max.status().targets["decoder"]
    assert decoder.reasons == {f"a hook changed what {place} returns": 1}
    assert ours.shapes == theirs.shapes
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@CHANGES
@pytest.mark.allow_fallback
def test_a_changed_convolution_stands(plain, model, mel, change):
    def features(model):
        with torch.no_grad(), Heard(model.encoder, ["conv1"], change) as hooks:
            return model.encoder(mel[None]), hooks

    expected, theirs = features(plain)
    whisper_max.accelerate(model)
    with with_fallback():
        found, ours = features(model)
        encoder = whisper_max.status().targets["encoder"]
    assert encoder.reasons == {"a hook changed what conv1 returns": 1}
    assert ours.places == theirs.places == ["conv1"]
    assert torch.equal(found, expected)


@CHANGES
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
def test_in_shadow_mode_hooks_hear_pytorch_alone(plain, model, mel):
    features = numbers((1, 1500, 128), 1)

    def hear(model):
        with Heard(model.decoder, PLACES) as decoder, Heard(model.encoder, ["conv1"]) as encoder:
            with torch.no_grad():
                model.decoder(TOKENS, features)
                model.encoder(mel[None])
        return decoder.calls + encoder.calls

    expected = hear(plain)
    whisper_max.accelerate(model)
    with whisper_max.patched(mode="shadow", compile="blocking"):
        found = hear(model)
        status = whisper_max.status().targets
    assert status["decoder"].max_calls == status["encoder"].max_calls == 1
    assert [call[0] for call in found] == [call[0] for call in expected]
    for call, other in zip(found, expected):
        for one, two in zip(tensors(call), tensors(other)):
            assert one is two is None or torch.equal(one, two)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", [KeyError, MemoryError])
def test_a_fault_in_a_hook_is_the_callers(model, strict, place, error):
    features = numbers((1, 1500, 128), 1)
    whisper_max.accelerate(model)

    def fail(call):
        if call[0] == place:
            raise error("of the hook")

    with Heard(model.decoder, PLACES, fail) as heard, torch.no_grad():
        with pytest.raises(error, match="of the hook"):
            model.decoder(TOKENS, features)
    assert heard.places == list(PLACES[: PLACES.index(place) + 1])
    with torch.no_grad():
        model.decoder(TOKENS, features)


def test_strict_mode_refuses_a_changed_output(model, strict):
    whisper_max.accelerate(model)
    with Heard(model.decoder, ["ln"], doubled), torch.no_grad():
        with pytest.raises(UnsupportedByMax, match="a hook changed what ln returns"):
            model.decoder(TOKENS, numbers((1, 1500, 128), 1))


def anything(call):
    """What counters of changes do not see."""
    (call[2][0] if isinstance(call[2], tuple) else call[2]).data.mul_(0.5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.allow_fallback
def test_hooks_of_others_are_pytorchs(model, place):
    """They may do anything."""
    assert_pytorchs(model, place, lambda: Heard(model.decoder, [place], anything, package="mine"))


@pytest.mark.parametrize("place", ["blocks.1.cross_attn_ln", "blocks.0.attn", "blocks.0.mlp"])
@pytest.mark.allow_fallback
def test_hooks_elsewhere_are_pytorchs(model, place):
    assert_pytorchs(model, place, lambda: Heard(model.decoder, [place]))


@pytest.mark.parametrize("more", [{"with_kwargs": True}, {"always_call": True}])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.allow_fallback
def test_hooks_that_want_more_are_pytorchs(model, place, more):
    hook = as_of("stable_whisper", lambda *call: None)
    part = model.decoder.get_submodule(place)

    @contextmanager
    def hung():
        handle = part.register_forward_hook(hook, **more)
        yield
        handle.remove()

    assert_pytorchs(model, place, hung)


@pytest.mark.allow_fallback
def test_hooks_of_one_module_in_two_places_are_pytorchs(model):
    model.decoder.blocks[1].cross_attn = model.decoder.blocks[0].cross_attn
    place = "blocks.1.cross_attn"
    assert_pytorchs(model, place, lambda: Heard(model.decoder, [place], halved_in_place))


def assert_pytorchs(model, place, hung):
    """With hooks hung, the decoder gives what it gives unpatched, for that reason."""
    features = numbers((1, 1500, 128), 1)
    with torch.no_grad(), hung():
        expected = model.decoder(TOKENS, features)
        whisper_max.accelerate(model)
        with with_fallback():
            found = model.decoder(TOKENS, features)
            decoder = whisper_max.status().targets["decoder"]
    assert f"{place} has hooks" in decoder.reasons and not decoder.max_calls
    assert torch.equal(found, expected)


def test_hooks_hear_inference_tensors(model, mel, strict):
    """Of which PyTorch counts no changes."""
    whisper_max.accelerate(model)
    with torch.inference_mode():
        window, features, tokens = mel[None].clone(), numbers((1, 1500, 128), 1), TOKENS.clone()
    for mode in (torch.no_grad, torch.inference_mode):
        with Heard(model.decoder, PLACES) as heard, Heard(model.encoder, ["conv1"]) as first:
            with mode():
                model.decoder(tokens, features)
                model.encoder(window)
        assert heard.places == list(PLACES) and first.places == ["conv1"]


@pytest.mark.allow_fallback
def test_a_hook_that_comes_during_a_decode_is_heard(plain, model, mel):
    def decode(model, package):
        inference = whisper.decoding.PyTorchInference(model, TOKENS.shape[1])
        with torch.no_grad():
            rows, features = TOKENS, model.encoder(mel[None])
            for step in range(4):
                if step == 2:
                    heard = Heard(model.decoder, ["ln"], package=package)
                logits = inference.logits(rows, features)
                rows = torch.cat([rows, logits[:, -1:].argmax(dim=-1)], dim=1)
        inference.cleanup_caching()
        heard.__exit__()
        return rows, [output for _, _, output in heard.calls]

    expected, theirs = decode(plain, "mine")
    for package, steps_on_max in (("stable_whisper", 4), ("mine", 2)):
        with with_fallback():
            report.reset()
            found, ours = decode(model, package)
            assert whisper_max.status().targets["inference"].max_calls == steps_on_max
        assert torch.equal(found, expected)
        assert len(ours) == len(theirs) == 2
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.allow_fallback
def test_word_timestamps_call_the_hooks_of_the_encoder_once(plain, model, mel):
    """Also where hooks of the decoder leave them to PyTorch."""
    tokenizer = get_tokenizer(True, num_languages=plain.num_languages, language="en")
    text = tokenizer.encode(" My father wants coffee.")

    def places(model):
        with Heard(model.encoder, ["conv1"]) as encoder, Heard(model.decoder, ["ln"]) as decoder:
            timing.find_alignment(model, tokenizer, text, mel, 300)
        return encoder.places + decoder.places

    expected = places(plain)
    with with_fallback():
        assert places(model) == expected == ["conv1", "ln"]
        assert whisper_max.status().targets["alignment"].reasons == {"ln has hooks": 1}


@pytest.mark.skipif(not hasattr(MultiHeadAttention, "use_sdpa"), reason="before SDPA")
def test_without_sdpa_nobody_has_to_listen(checkpoint, mel, strict):
    """The switch is for hooks; where there are none, it changes nothing."""
    options = DecodingOptions(fp16=False, language="en")
    expected = whisper.decode(checkpoint, mel, options)
    with whisper.model.disable_sdpa():
        assert whisper.decode(checkpoint, mel, options).tokens == expected.tokens != []


@pytest.mark.allow_fallback
def test_threads_that_share_a_model_leave_its_hooks_in_place(model):
    """Though PyTorch takes every call over."""
    features = numbers((1, 1500, 128), 1)
    whisper_max.accelerate(model)
    with Heard(model.decoder, ["ln"], doubled) as heard, with_fallback():
        hooks = dict(model.decoder.ln._forward_hooks)

        def call(_):
            with torch.no_grad():
                model.decoder(TOKENS, features)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(call, range(24)))
        assert dict(model.decoder.ln._forward_hooks) == hooks
        assert heard.calls


class OwnLoop(DecodingTask):
    """A task with a loop of its own, as stable-ts's."""

    __module__ = "stable_whisper.decode"

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


class ForeignLoop(OwnLoop):
    """Which may compute as much as the model does."""


class ForeignFilter(LogitFilter):
    def apply(self, logits, tokens):
        pass


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

        task = ForeignLoop(checkpoint, options)
        task.run(mel[None])
        assert task.threads == [3] * 5
        task = OwnLoop(checkpoint, options)
        task.logit_filters.append(ForeignFilter())
        task.run(mel[None])
        assert task.threads == [3] * 5


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
