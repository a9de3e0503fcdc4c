"""The decoder on MAX is as exact as PyTorch: whole sequences, and step by step with its caches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from whisper import decoding

from harness import exact_logits, on_pytorch
from strategies import batches, numbers, official, recipes, seeds, token_rows
from tolerances import PROMISES, assert_precise
from whisper_max.activation import originals


def check(model, tokens, features, precision="high"):
    """Logits of whole sequences, on MAX, on PyTorch and in float64."""
    plain = on_pytorch(model)
    with torch.no_grad():
        found = model.decoder(tokens, features)
        on_torch = plain.decoder(tokens, features)
    expected = exact_logits(plain.decoder, tokens, features)
    assert_precise(found, on_torch, expected, PROMISES[precision])


def audio_features(dims, windows, seed, scale=1.0):
    return numbers((windows, dims.n_audio_ctx, dims.n_audio_state), seed, scale)


@given(recipes(), batches, st.booleans(), seeds, st.data())
def test_whole_sequences(precision, recipe, batch, shared, seed, data):
    dims = recipe.dims
    count = data.draw(st.integers(1, dims.n_text_ctx))
    tokens = token_rows((batch, count), dims.n_vocab, seed)
    check(recipe.build(), tokens, audio_features(dims, 1 if shared else batch, seed), precision)


@given(recipes(), seeds, st.sampled_from([torch.int32, torch.int64]), st.booleans())
def test_memory_in_any_order(strict, recipe, seed, dtype, expanded):
    dims = recipe.dims
    tokens = token_rows((2 * dims.n_text_ctx, 6), dims.n_vocab, seed).to(dtype).T[::2, ::2]
    if expanded:
        features = audio_features(dims, 1, seed).expand(3, -1, -1)
    else:
        features = numbers((dims.n_audio_ctx, 3, dims.n_audio_state), seed).transpose(0, 1)
    check(recipe.build(), tokens, features)


@given(recipes(), seeds)
def test_silence(strict, recipe, seed):
    dims = recipe.dims
    tokens = token_rows((2, dims.n_text_ctx), dims.n_vocab, seed)
    check(recipe.build(), tokens, audio_features(dims, 1, seed, scale=0.0))


@given(recipes(), batches, seeds)
def test_rows_that_repeat_one_window_are_those_of_the_window(strict, recipe, batch, seed):
    """Upstream repeats the audio features for the beams; here they share one cache."""
    dims = recipe.dims
    model = recipe.build()
    tokens = token_rows((batch, dims.n_text_ctx), dims.n_vocab, seed)
    features = audio_features(dims, 1, seed)
    with torch.no_grad():
        one = model.decoder(tokens, features)
        repeated = model.decoder(tokens, features.repeat(batch, 1, 1))
    assert torch.equal(one, repeated)


@pytest.mark.parametrize("n_state", [384, 512, 768, 1024, 1280])
def test_official_widths(strict, n_state):
    recipe = official(n_state, layers=2, n_vocab=1000, n_audio_ctx=300, n_text_ctx=24)
    tokens = token_rows((2, 20), 1000, n_state)
    check(recipe.build(), tokens, audio_features(recipe.dims, 1, n_state))


def test_the_whole_vocabulary_of_the_checkpoint(strict, checkpoint):
    tokens = token_rows((2, 5), checkpoint.dims.n_vocab, 1)
    check(checkpoint, tokens, audio_features(checkpoint.dims, 2, 1))


def test_the_whole_context_of_the_checkpoint(strict):
    recipe = official(128, n_vocab=100, n_text_ctx=448)
    tokens = token_rows((2, 448), 100, 1)
    check(recipe.build(), tokens, audio_features(recipe.dims, 1, 1))


# Step by step


def decode(inference, plan, features):
    """All logits of one decode, shape = (rows, all tokens, n_vocab).

    plan : token rows of the prompt; then for each step the rows to continue, and a token for each
    """
    tokens, *steps = plan
    found = [take(inference.logits(tokens, features))]
    for parents, following in steps:
        inference.rearrange_kv_cache(parents)
        tokens = torch.cat([tokens[parents], following[:, None]], dim=1)
        found.append(take(inference.logits(tokens, features)))
    inference.cleanup_caching()
    return torch.cat(found, dim=1)


def take(logits):
    """A copy; what was returned is the caller's to overwrite, as upstream's filters do."""
    copy = logits.clone()
    logits.fill_(float("nan"))
    return copy


def exact_steps(decoder, plan, features):
    """What `decode` should return, each step from the whole sequence, in float64."""
    tokens, *steps = plan
    found = [exact_logits(decoder, tokens, features)]
    for parents, following in steps:
        tokens = torch.cat([tokens[parents], following[:, None]], dim=1)
        found.append(exact_logits(decoder, tokens, features)[:, -1:])
    return torch.cat(found, dim=1)


def check_steps(model, plan, features, precision="high"):
    plain = on_pytorch(model)
    prompt = plan[0].shape[1]
    with torch.no_grad():
        found = decode(decoding.PyTorchInference(model, prompt), plan, features)
        upstream = originals["whisper.decoding.PyTorchInference"](plain, prompt)
        on_torch = decode(upstream, plan, features)
    assert_precise(found, on_torch, exact_steps(plain.decoder, plan, features), PROMISES[precision])


@st.composite
def plans(draw, dims, *, windows, beams):
    """What to decode: rows of prompts, steps up to the end of the context, and reorders.

    windows : stretches of audio, each with as many beams
    """
    rows = windows * beams
    prompt = draw(st.integers(1, dims.n_text_ctx))
    steps = draw(st.integers(0, min(12, dims.n_text_ctx - prompt)))
    generator = torch.Generator().manual_seed(draw(seeds))
    first = torch.randint(dims.n_vocab, (rows, prompt), generator=generator)
    if draw(st.booleans()):
        first = first[::beams].repeat_interleave(beams, 0)  # beams begin alike
    plan = [first]
    for _ in range(steps):
        # A beam continues one of its own window, as in upstream's search.
        chosen = draw(st.lists(st.integers(0, beams - 1), min_size=rows, max_size=rows))
        parents = [row // beams * beams + beam for row, beam in enumerate(chosen)]
        plan.append((parents, torch.randint(dims.n_vocab, (rows,), generator=generator)))
    return plan


@given(recipes(), st.integers(1, 3), st.integers(1, 5), seeds, st.data())
def test_step_by_step(precision, recipe, windows, beams, seed, data):
    plan = data.draw(plans(recipe.dims, windows=windows, beams=beams))
    features = audio_features(recipe.dims, windows, seed)
    if windows > 1:  # one alone is broadcast
        features = features.repeat_interleave(beams, 0)
    check_steps(recipe.build(), plan, features, precision)


@pytest.mark.parametrize("prompt", [1, 4, 228, 447])
def test_prompts_as_long_as_upstreams(strict, prompt):
    recipe = official(128, layers=2, n_text_ctx=448)
    generator = torch.Generator().manual_seed(prompt)
    tokens = torch.randint(100, (1, prompt), generator=generator).repeat(5, 1)
    steps = [
        (parents, torch.randint(100, (5,), generator=generator))
        for parents in ([0, 0, 0, 0, 0], [4, 3, 2, 1, 0], [0, 1, 2, 2, 1])
    ][: 448 - prompt]
    check_steps(recipe.build(), [tokens, *steps], audio_features(recipe.dims, 1, prompt))
