"""What a decode does beside the execution of graphs: as little as the benchmarks say."""

from __future__ import annotations

import time

import pytest
import torch
import whisper
from whisper.audio import log_mel_spectrogram, pad_or_trim

from benchmarks.peers.openai_whisper import forced
from benchmarks.peers.whisper_max import executions
from recordings import samples

TOKENS = 12


@pytest.mark.parametrize("beams", [1, 5])
def test_every_token_is_one_execution(checkpoint, strict, beams):
    """Besides: cross attention's keys and values once, and the prompt."""
    mel = log_mel_spectrogram(pad_or_trim(samples("en01")), checkpoint.dims.n_mels)
    features = checkpoint.embed_audio(mel[None])[0]
    whisper.decode(checkpoint, 0.5 * features, forced(TOKENS, beams))  # weights are packed
    begin = time.perf_counter()
    with executions() as seconds, torch.no_grad():
        decoded = whisper.decode(checkpoint, features, forced(TOKENS, beams)).tokens
    assert len(decoded) == TOKENS
    assert len(seconds) == 2 + TOKENS - 1
    assert 0 < sum(seconds) < time.perf_counter() - begin
