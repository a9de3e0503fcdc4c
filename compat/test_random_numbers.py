"""Sampling draws from torch's one generator: what is drawn, and when it is put back."""

from __future__ import annotations

import pytest
import torch
import whisper
from whisper.decoding import DecodingOptions

import whisper_max
from harness import fail_from, with_fallback
from recordings import samples
from whisper_max import decoding_loop

OPTIONS = DecodingOptions(fp16=False, language="en", temperature=0.8, best_of=2, sample_len=8)

pytestmark = pytest.mark.allow_fallback


@pytest.fixture(scope="module")
def features(plain):
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples("en01")))
    with torch.no_grad():
        return plain.embed_audio(mel.unsqueeze(0))[0]


def drawn(model, features):
    """The tokens of a decode, and what another draw gives after it."""
    return whisper.decode(model, features, OPTIONS).tokens, torch.rand(1).item()


@pytest.mark.parametrize("step", [0, 1, 4])
def test_max_failing_in_the_middle(plain, checkpoint, features, monkeypatch, step):
    torch.manual_seed(5)
    expected = drawn(plain, features)
    with with_fallback():
        fail_from(monkeypatch, step)
        torch.manual_seed(5)
        assert drawn(checkpoint, features) == expected
        assert whisper_max.status().targets["decoding_loop"].torch_calls == 1


def test_what_others_draw_before_pytorch_begins_stays_drawn(
    plain, checkpoint, features, monkeypatch
):
    """As another thread may, while a decode finds out that MAX cannot run it."""
    torch.manual_seed(5)
    torch.rand(3)
    expected = drawn(plain, features)

    def refusing(task, tokens):
        torch.rand(3)
        return ["not today"]

    monkeypatch.setattr(decoding_loop, "_reasons", refusing)
    with with_fallback():
        torch.manual_seed(5)
        assert drawn(checkpoint, features) == expected


def test_shadow_mode_draws_once(plain, checkpoint, features):
    torch.manual_seed(5)
    expected = drawn(plain, features)
    with whisper_max.patched(mode="shadow", compile="blocking"):
        torch.manual_seed(5)
        assert drawn(checkpoint, features) == expected
