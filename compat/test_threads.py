"""Threads that share one model get what each would get alone."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from whisper import decoding
from whisper.model import MultiHeadAttention

from harness import on_max
from recordings import assert_same_result, samples
from strategies import numbers, small, token_rows
from whisper_max.runtime.engine import Engine

THREADS = 4


@pytest.fixture(autouse=True)
def many_switches():
    """Threads take turns often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def at_once(calls):
    """The results of all calls, made by several threads at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda call: call(), calls))


def without_gradients(call):
    """The switch is each thread's own."""

    def quietly():
        with torch.no_grad():
            return call()

    return quietly




def test_modules(strict):
    """Each call with audio of its own, so that what is remembered changes hands all the time."""
    model = small().build()
    mels = [numbers((1, 80, 120), seed) for seed in range(40)]
    features = [numbers((1, 60, 128), seed) for seed in range(40)]
    tokens = token_rows((3, 9), 100, 1)
    calls = [
        without_gradients(lambda mel=mel, f=f: (model.encoder(mel), model.decoder(tokens, f)))
        for mel, f in zip(mels, features)
    ]
    expected = [call() for call in calls]
    for ours, theirs in zip(at_once(calls), expected):
        for found, alone in zip(ours, theirs):
            assert torch.equal(found, alone)


def test_decodes_step_by_step(strict):
    """A decode's caches belong to the call."""
    model = small().build()

    def decode(seed):
        inference = decoding.PyTorchInference(model, 3)
        features, tokens = numbers((1, 60, 128), seed % 3), token_rows((2, 12), 100, seed)
        found = [inference.logits(tokens[:, :end], features) for end in range(3, 13)]
        inference.cleanup_caching()
        return torch.cat(found, dim=1)

    calls = [without_gradients(lambda seed=seed: decode(seed)) for seed in range(16)]
    expected = [call() for call in calls]
    for found, alone in zip(at_once(calls), expected):
        assert torch.equal(found, alone)


def test_weights_edited_between_rounds(strict):
    """Threads that come first after an edit all see it."""
    model, mel = small().build(), numbers((1, 80, 120), 1)
    for factor in (1.5, 0.5, 2.0):
        with torch.no_grad():
            model.encoder.conv1.weight.mul_(factor)
        found = at_once([without_gradients(lambda: model.encoder(mel))] * 8)
        assert all(torch.equal(result, found[0]) for result in found)
        with torch.no_grad():
            again = small().build()
            again.load_state_dict(model.state_dict())
            assert torch.equal(again.encoder(mel), found[0])
