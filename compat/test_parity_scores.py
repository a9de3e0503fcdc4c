"""Cross-attention's scores before softmax, from which words are timed, and the words themselves."""

from __future__ import annotations

import itertools

import pytest
import torch
import whisper
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from whisper import timing
from whisper.model import TextDecoder
from whisper.tokenizer import get_tokenizer

import tolerances
from harness import exact, load_checkpoint, on_max, on_pytorch, with_fallback
from recordings import samples
from strategies import HEAD_DIM, numbers, recipes, seeds, token_rows
from tolerances import assert_precise
from whisper_max import report, settings
from whisper_max.runtime.decoder_session import DecoderSession


def upstreams_scores(decoder: TextDecoder, tokens: Tensor, features: Tensor) -> Tensor:
    """As find_alignment gets them; shape = (layers, rows, heads, tokens, frames)."""
    seen: list[Tensor] = []
    for block in decoder.blocks:
        block.cross_attn.register_forward_hook(
            lambda module, inputs, output: seen.append(output[1])
        )
    with torch.no_grad(), getattr(whisper.model, "disable_sdpa", torch.no_grad)():
        decoder(tokens, features)
    return torch.stack(seen)


def exact_scores(decoder: TextDecoder, tokens: Tensor, features: Tensor) -> Tensor:
    """The same in float64; upstream's own are rounded to float32."""
    twin = exact(decoder)
    seen: list[Tensor] = []
    for block in twin.blocks:
        for layer in (block.cross_attn.query, block.cross_attn.key):
            layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        twin(tokens, features.double())
    # (batch, length, heads * 64) -> (batch, heads, length, 64)
    by_head = [x.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2) for x in seen]
    scores = [q @ k.transpose(2, 3) * HEAD_DIM**-0.5 for q, k in zip(by_head[::2], by_head[1::2])]
    return torch.stack(scores)


@given(recipes(), seeds, st.data())
def test_scores_of_any_heads(strict, recipe, seed, data):
    dims = recipe.dims
    model = recipe.build()
    features = numbers((1, dims.n_audio_ctx, dims.n_audio_state), seed)
    tokens = token_rows((1, data.draw(st.integers(1, dims.n_text_ctx))), dims.n_vocab, seed)
    every = list(itertools.product(range(dims.n_text_layer), range(dims.n_text_head)))
    heads = data.draw(st.lists(st.sampled_from(every), unique=True, min_size=1))

    session = DecoderSession(model.decoder, features, 1, settings.active())
    _, found = session.align(tokens, heads)

    on_torch, precise = (
        torch.stack([scores[layer, 0, head] for layer, head in heads])
        for scores in (
            upstreams_scores(on_pytorch(model).decoder, tokens, features),
            exact_scores(on_pytorch(model).decoder, tokens, features),
        )
    )
    assert_precise(found, on_torch, precise)


@pytest.mark.parametrize("name", ["en02", "de01"])
@pytest.mark.parametrize("all_heads", [False, True])
def test_words_of_a_text(plain, checkpoint, name, all_heads):
    """Also with an attention head map of its own, and another width of the filter."""
    tokenizer = get_tokenizer(True, num_languages=plain.num_languages, language="en")
    text = tokenizer.encode(" My father wants coffee and chicken.")
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples(name)))
    heads = torch.ones(2, 2, dtype=torch.bool) if all_heads else torch.eye(2, dtype=torch.bool)

    def align(model):
        whole = model.alignment_heads
        model.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
        try:
            return timing.find_alignment(
                model, tokenizer, text, mel, 400, medfilt_width=3, qk_scale=1.2
            )
        finally:
            model.register_buffer("alignment_heads", whole, persistent=False)

    expected = align(plain)
    with on_max():
        found = align(checkpoint)
    assert [(w.word, w.tokens) for w in found] == [(w.word, w.tokens) for w in expected]
    for ours, theirs in zip(found, expected):
        assert ours.start == pytest.approx(theirs.start, abs=tolerances.WORD_SECONDS)
        assert ours.end == pytest.approx(theirs.end, abs=tolerances.WORD_SECONDS)
        assert ours.probability == pytest.approx(theirs.probability, abs=tolerances.PROBABILITY)


@pytest.mark.allow_fallback
@pytest.mark.parametrize("share", ["a block", "cross attention", "self-attention"])
def test_words_where_attention_stands_in_two_places(share):
    """Upstream's hook on it is called for both, and keeps the scores of the last."""
    tokenizer = get_tokenizer(True, language="en")
    text = tokenizer.encode(" My father wants coffee and chicken.")
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples("en02")))

    def align(model):
        blocks = model.decoder.blocks
        if share == "a block":
            blocks[1] = blocks[0]
        elif share == "cross attention":
            blocks[1].cross_attn = blocks[0].cross_attn
        else:
            blocks[0].cross_attn = blocks[1].attn
        heads = torch.ones(2, 2, dtype=torch.bool).to_sparse()
        model.register_buffer("alignment_heads", heads, persistent=False)
        try:
            words = timing.find_alignment(model, tokenizer, text, mel, 400)
            return [(word.word, word.tokens, word.start, word.end) for word in words]
        except (IndexError, RuntimeError, TypeError) as error:
            return type(error)

    expected = align(load_checkpoint())
    with with_fallback():
        assert align(load_checkpoint()) == expected
        reasons = report.status().targets["alignment"].reasons
    assert any("stands in two places, and is heard in both" in reason for reason in reasons)
