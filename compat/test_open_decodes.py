"""Inference used in other ways than upstream's loop does: what upstream's gives, step by step."""

from __future__ import annotations

import pytest
import torch
import whisper
from hypothesis import given
from hypothesis import strategies as st
from whisper import decoding

import whisper_max
from harness import fail_from, on_pytorch, with_fallback
from recordings import samples
from strategies import numbers, small, token_rows

FEATURES, TOKENS = numbers((1, 60, 128), 2), token_rows((3, 30), 100, 3)
PROMPT = 3

pytestmark = pytest.mark.allow_fallback


@pytest.fixture(scope="module")
def model():
    return small().build()


def outcomes(model, calls) -> list:
    """Of each call the logits, or what is raised: then the decode is over.

    calls : how many of the tokens are given, or the rows to go on with
    """
    inference = decoding.PyTorchInference(model, PROMPT)
    tokens, found = TOKENS, []
    try:
        for call in calls:
            if isinstance(call, list):
                inference.rearrange_kv_cache(call)
                tokens = tokens[call]
            else:
                found.append(inference.logits(tokens[:, :call], FEATURES))
    except (IndexError, KeyError, RuntimeError) as error:
        found.append(type(error))
    finally:
        inference.cleanup_caching()
    return found


@torch.no_grad()
def assert_same_outcomes(model, calls) -> dict[str, int]:
    expected = outcomes(on_pytorch(model), calls)
    with with_fallback():
        found = outcomes(model, calls)
        reasons = whisper_max.status().targets["inference"].reasons
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        else:
            assert ours is theirs
    assert not any(module._forward_hooks for module in model.modules())
    return reasons


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ([3, 4, 5, 3, 4, 5], "a second prompt in an open decode"),
        ([3, 2], "a second prompt in an open decode"),
        ([3, [2, 0, 0], 4, [1, 1, 2], 3, 4], "a second prompt in an open decode"),
        ([3, 4, 1, 1, 5], None),
        ([1, 2], "a second prompt in an open decode"),
        ([6, 7, 8], None),
        ([3, 4, [0, 1], 5, 6], None),
        ([3, 4, [1, 2], 5, 6], "the decode began with 3 rows and goes on with 2"),
        ([3, 4, [0, 1, 2, 2], 5, 6], "the decode began with 3 rows and goes on with 4"),
        ([3, [2, 1, 0], 4, [1, 1, 0], 5], None),
        ([3, [0, 2], [0, 0, 1], 4], "the decode began with 3 rows and goes on with 2"),
        ([3, [0, 1, 2, 2], [3, 0, 1], 4], "the decode began with 3 rows and goes on with 4"),
    ],
    ids=str,
)
def test_calls(model, calls, reason):
    reasons = assert_same_outcomes(model, calls)
    assert reason is None or reason in reasons


def move_windows(inference):
    blocks = inference.model.decoder.blocks
    layers = [(block.cross_attn.key, block.cross_attn.value) for block in blocks]
    inference.kv_modules += [layer for pair in layers for layer in pair]


@pytest.mark.parametrize(
    "change",
    [move_windows, lambda inference: inference.kv_modules.clear()],
    ids=["cross attention's, too", "none"],
)
@torch.no_grad()
def test_other_caches_of_several_windows_change_places(model, change):
    features = numbers((3, 60, 128), 7)

    def outcome(model):
        inference = decoding.PyTorchInference(model, PROMPT)
        change(inference)
        inference.logits(TOKENS[:, :PROMPT], features)
        inference.rearrange_kv_cache([1, 2, 0])
        caches = [cache.clone() for cache in inference.kv_cache.values()]
        logits = inference.logits(TOKENS[[1, 2, 0], : PROMPT + 1], features)
        inference.cleanup_caching()
        return caches, logits

    expected = outcome(on_pytorch(model))
    with with_fallback():
        found = outcome(model)
        reasons = whisper_max.status().targets["inference"].reasons
    assert "the inference's kv_modules are not upstream's" in reasons
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alike", [True, False])
@torch.no_grad()
def test_rows_of_several_windows_change_places(model, monkeypatch, alike):
    """PyTorch takes over in the end: what a row has heard before it heard in another window."""
    features = numbers((1 if alike else 3, 60, 128), 7).expand(3, 60, 128).contiguous()
    moved = TOKENS[[1, 2, 0]]

    def outcome(model, in_the_end=lambda: None):
        inference = decoding.PyTorchInference(model, PROMPT)
        found = [inference.logits(TOKENS[:, :PROMPT], features)]
        inference.rearrange_kv_cache([1, 2, 0])
        found.append(inference.logits(moved[:, : PROMPT + 1], features))
        in_the_end()
        found.append(inference.logits(moved[:, : PROMPT + 2], features))
        inference.cleanup_caching()
        return found

    expected = outcome(on_pytorch(model))
    with with_fallback():
        found = outcome(model, lambda: fail_from(monkeypatch, 0))
        ran = whisper_max.status().targets["inference"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert ran.max_calls == (2 if alike else 1)
    assert ("a row goes on as one of another window" in ran.reasons) is not alike


@torch.no_grad()
def test_weights_that_move_in_the_middle():
    """To memory that processes share; what held them is given back."""

    def outcome(model):
        inference = decoding.PyTorchInference(model, PROMPT)
        inference.logits(TOKENS[:, :PROMPT], FEATURES)
        model.decoder.share_memory()
        logits = inference.logits(TOKENS[:, : PROMPT + 1], FEATURES)
        inference.cleanup_caching()
        return logits

    model = small().build()
    expected = outcome(on_pytorch(model))
    with with_fallback():
        found = outcome(whisper_max.accelerate(model))
        assert whisper_max.status().targets["inference"].max_calls == 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tokens_of_a_larger_vocabulary_that_came_in_the_middle():
    """What MAX has packed ends with the first one."""
    model = small().build()
    n_vocab, n_state = model.decoder.token_embedding.weight.shape
    with with_fallback():
        whisper_max.accelerate(model)
        inference = decoding.PyTorchInference(model, PROMPT)
        inference.logits(TOKENS[:, :PROMPT], FEATURES)
        model.decoder.token_embedding = torch.nn.Embedding(n_vocab + 9000, n_state)
        tokens = TOKENS[:, : PROMPT + 1].clone()
        tokens[:, -1] = n_vocab + 8999
        assert inference.logits(tokens, FEATURES).shape == (3, 1, n_vocab + 9000)
        inference.cleanup_caching()
        reasons = whisper_max.status().targets["inference"].reasons
    assert any("tokens outside the vocabulary" in reason for reason in reasons)


def test_beams_that_begin_with_other_tokens(plain, checkpoint):
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples("en02")))[None]
    options = decoding.DecodingOptions(fp16=False, language="en", sample_len=12, beam_size=2)

    @torch.no_grad()
    def outcome(model):
        task = decoding.DecodingTask(model, options)
        prompts = torch.tensor([task.initial_tokens, task.initial_tokens])
        prompts[1, 1] = task.tokenizer.to_language_token("de")
        return task._main_loop(model.embed_audio(mel), prompts)[0].tolist()

    expected = outcome(plain)
    with with_fallback():
        assert outcome(checkpoint) == expected
        reasons = whisper_max.status().targets["decoding_loop"].reasons
    assert "the beams of a window begin with other tokens" in reasons


@pytest.mark.parametrize("beams", [False, True])
def test_other_caches_change_places(plain, checkpoint, beams):
    """As for who has switched it off."""
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples("en02")))[None]
    options = decoding.DecodingOptions(fp16=False, language="en", sample_len=12, beam_size=3)

    class Own(decoding.DecodingTask):
        """A loop that runs on MAX step by step."""

    def outcome(model):
        task = (decoding.DecodingTask if beams else Own)(model, options)
        task.inference.kv_modules = []
        return task.run(mel)[0].tokens

    expected = outcome(plain)
    with with_fallback():
        assert outcome(checkpoint) == expected
        reasons = whisper_max.status().targets["decoding_loop" if beams else "inference"].reasons
    assert "the inference's kv_modules are not upstream's" in reasons


def begin_anew(inference):
    """Upstream's `cleanup_caching`, written out."""
    for hook in inference.hooks:
        hook.remove()
    inference.kv_cache, inference.hooks = {}, []


def go_on_with_caches(inference):
    """Those of the same decode, which PyTorch has made."""
    begin_anew(inference)
    model = inference.model
    caches, hooks = model.install_kv_cache_hooks()
    with whisper_max.disabled():
        model.decoder(TOKENS[:, :4], FEATURES, kv_cache=caches)
    for hook in hooks:
        hook.remove()
    inference.kv_cache = caches


@pytest.mark.parametrize("prompt", [1, PROMPT])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("assign", [begin_anew, go_on_with_caches])
@torch.no_grad()
def test_assigned_caches(model, assign, steps, prompt):
    other = numbers((1, 60, 128), 4)

    def outcome(model):
        inference = decoding.PyTorchInference(model, prompt)
        for count in range(prompt, prompt + steps):
            inference.logits(TOKENS[:, :count], FEATURES)
        assign(inference)
        features = other if assign is begin_anew else FEATURES
        logits = inference.logits(TOKENS[:, 5 : 5 + prompt], features)
        inference.cleanup_caching()
        return logits

    expected = outcome(on_pytorch(model))
    with with_fallback():
        torch.testing.assert_close(outcome(model), expected, rtol=1e-4, atol=1e-4)
        used = whisper_max.status().targets["inference"]
    if assign is begin_anew:
        assert used.max_calls == steps + 1 and not used.torch_calls
    else:
        assert "its kv_cache was filled by somebody else" in used.reasons


@torch.no_grad()
def test_an_inference_that_sets_upstreams_attributes_by_itself(model):
    class Own(decoding.PyTorchInference):
        def __init__(self, model):
            self.model, self.initial_token_length = model, PROMPT
            self.kv_cache, self.hooks, self.kv_modules = {}, [], []

    expected = on_pytorch(model).logits(TOKENS[:, :PROMPT], FEATURES)
    with with_fallback():
        inference = Own(model)
        torch.testing.assert_close(
            inference.logits(TOKENS[:, :PROMPT], FEATURES), expected, rtol=1e-4, atol=1e-4
        )
        inference.rearrange_kv_cache([2, 1, 0])
        inference.cleanup_caching()


@torch.no_grad()
def test_a_decoder_that_is_no_module(model):
    class Decoder:
        """Counts the calls of another."""

        def __init__(self, decoder):
            self.blocks, self.calls, self._decoder = decoder.blocks, 0, decoder

        def __call__(self, tokens, features, kv_cache):
            self.calls += 1
            return self._decoder(tokens, features, kv_cache=kv_cache)

    class Model:
        dims, encoder = model.dims, model.encoder
        install_kv_cache_hooks = model.install_kv_cache_hooks

        def __init__(self, decoder):
            self.decoder = Decoder(decoder)

    expected = on_pytorch(model).logits(TOKENS[:, :PROMPT], FEATURES)
    with with_fallback():
        duck = Model(model.decoder)
        inference = decoding.PyTorchInference(duck, PROMPT)
        found = inference.logits(TOKENS[:, :PROMPT], FEATURES)
        inference.cleanup_caching()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert duck.decoder.calls == 1


calls = st.lists(
    st.integers(1, 6) | st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=6
)


@given(calls.filter(lambda calls: isinstance(calls[0], int)))
def test_any_calls(model, calls):
    assert_same_outcomes(model, calls)


def edited(task, what):
    """A task that somebody has changed since it was made."""
    if what == "longer":
        task.initial_tokens += tuple(task.tokenizer.encode(" the"))
    elif what == "shorter":
        task.initial_tokens, task.sot_index = task.initial_tokens[-3:], 0
    elif what == "index":
        task.sot_index = 70
    elif what == "mask":
        suppress = task.logit_filters[1]
        mask = torch.zeros(task.model.dims.n_vocab, dtype=torch.bool)
        mask[list(suppress.suppress_tokens)] = mask[2738] = True
        suppress.suppress_tokens = mask
    else:
        task.logit_filters[1].suppress_tokens = slice(0, 100)
    return task


@pytest.mark.parametrize("what", ["longer", "shorter", "index", "mask", "slice"])
def test_tasks_changed_after_they_were_made(plain, checkpoint, what):
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples("en01")))[None]
    options = decoding.DecodingOptions(language="en", fp16=False, prompt="hello there")

    def outcome(model):
        try:
            return edited(decoding.DecodingTask(model, options), what).run(mel)[0].tokens
        except (IndexError, RuntimeError) as error:  # the latter with 20231117
            return type(error)

    expected = outcome(plain)
    with with_fallback():
        assert outcome(checkpoint) == expected
        assert whisper_max.status().targets["decoding_loop"].max_calls == 0
