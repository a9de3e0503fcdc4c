"""`medium` and `int8`: numbers within what they promise, and no more words misheard."""

from __future__ import annotations

import pytest
import torch
import whisper
from hypothesis import given, settings

import whisper_max
from benchmarks.inputs import references
from benchmarks.word_errors import word_error_rate
from harness import compile_all, exact, exact_logits, on_max, on_pytorch
from recordings import LONG, samples
from strategies import batches, numbers, recipes, seeds, token_rows
from tolerances import REDUCED, WORD_ERROR_RATE, assert_precise


@pytest.fixture(scope="module", autouse=True)
def compiled_too():
    compile_all("medium", "int8")


@pytest.fixture(params=sorted(REDUCED))
def reduced(request):
    """whisper patched in each of the precisions; everything runs on MAX, or raises."""
    with on_max(request.param):
        yield request.param


@settings(max_examples=15)
@given(recipes(), batches, seeds)
def test_encoder(reduced, recipe, batch, seed):
    model = recipe.build()
    plain = on_pytorch(model)
    mel = numbers((batch, recipe.dims.n_mels, 2 * recipe.dims.n_audio_ctx), seed)
    with torch.no_grad():
        expected = exact(plain.encoder)(mel.double())
        assert_precise(model.encoder(mel), plain.encoder(mel), expected, REDUCED[reduced])


@settings(max_examples=15)
@given(recipes(), batches, seeds)
def test_logits(reduced, recipe, batch, seed):
    dims = recipe.dims
    model = recipe.build()
    plain = on_pytorch(model)
    features = numbers((batch, dims.n_audio_ctx, dims.n_audio_state), seed)
    tokens = token_rows((batch, dims.n_text_ctx), dims.n_vocab, seed)
    with torch.no_grad():
        found, on_torch = model.decoder(tokens, features), plain.decoder(tokens, features)
    assert_precise(
        found, on_torch, exact_logits(plain.decoder, tokens, features), REDUCED[reduced]
    )


def test_word_error_rate(plain, checkpoint, record_property):
    """Over all bundled recordings whose words are known, greedy."""
    spoken = {name: text for name, text in references().items() if text and name != LONG}
    expected = rate_of(plain, spoken)
    record_property("float32", expected)
    for precision in sorted(REDUCED):
        with on_max(precision):
            whisper_max.accelerate(checkpoint)
            found = rate_of(checkpoint, spoken)
        record_property(precision, found)
        assert found <= expected + WORD_ERROR_RATE, precision


def rate_of(model: whisper.model.Whisper, spoken: dict[str, str]) -> float:
    """The word error rate of a model over recordings with these words."""
    pairs = []
    for name, text in spoken.items():
        language = name[:2] if name[:2] in ("de", "es") else "en"
        result = model.transcribe(samples(name), language=language, temperature=0, fp16=False)
        pairs.append((text, result["text"]))
    return word_error_rate(pairs)
