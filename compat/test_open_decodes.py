"""Inference used in other ways than upstream's loop does: what upstream's gives, step by step."""

from __future__ import annotations

import pytest
import torch
import whisper
from hypothesis import given
from hypothesis import strategies as st
from whisper import decoding

import whisper_max
from harness import on_pytorch, with_fallback
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
    ],
    ids=str,
)
def test_calls(model, calls, reason):
    reasons = assert_same_outcomes(model, calls)
    assert reason is None or reason in reasons


calls = st.lists(
    st.integers(1, 6) | st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=6
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
        except IndexError:
            return IndexError

    expected = outcome(plain)
    with with_fallback():
        assert outcome(checkpoint) == expected
        assert whisper_max.status().targets["decoding_loop"].max_calls == 0
