"""Threads that share one model get what each would get alone."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from whisper import decoding
from whisper.model import MultiHeadAttention

from isolation import pytorch_threads
from recordings import assert_same_result, samples
from strategies import numbers, small, token_rows
from whisper_max.runtime import limits
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


def transcribe(model, name, **options):
    """Without retries at temperatures: those draw from a generator that all threads share."""
    return model.transcribe(samples(name), temperature=0.0, fp16=False, **options)


def test_transcriptions(checkpoint, strict):
    """As in a web service with one model."""
    calls = [
        lambda name=name, words=words: transcribe(checkpoint, name, word_timestamps=words)
        for name in ("en01", "es01", "de01")
        for words in (False, True)
    ]
    expected = [call() for call in calls]
    for found, alone in zip(at_once(calls), expected):
        assert_same_result(found, alone)


@pytest.mark.parametrize("count", [1, 2])
def test_max_uses_no_more_threads_than_pytorch(checkpoint, strict, monkeypatch, count):
    """Whoever runs a worker for each CPU limits PyTorch in each, and does not know of MAX."""
    teams = set()
    execute = Engine.execute

    def note(engine, graph, *operands):
        assert any(operand is engine.threads for operand in operands)
        teams.add(engine.threads.to_numpy().item())
        return execute(engine, graph, *operands)

    expected = transcribe(checkpoint, "en01", word_timestamps=True)
    monkeypatch.setattr(Engine, "execute", note)
    with pytorch_threads(count):
        assert_same_result(transcribe(checkpoint, "es01"), transcribe(checkpoint, "es01"))
        assert_same_result(transcribe(checkpoint, "en01", word_timestamps=True), expected)
    assert teams == {count if limits.threads() > 1 else 1}


def test_word_timestamps_leave_other_threads_on_max(checkpoint, strict):
    """Upstream switches SDPA off for them, for every thread; the others would heed that."""
    switches = set()

    def words():
        for _ in range(6):
            transcribe(checkpoint, "en01", word_timestamps=True)

    def others():
        found = []
        for _ in range(6):
            switches.add(getattr(MultiHeadAttention, "use_sdpa", True))
            found.append(transcribe(checkpoint, "es01"))
        return found

    expected = transcribe(checkpoint, "es01")
    _, *results = at_once([words, others, others])
    for found in (result for each in results for result in each):
        assert_same_result(found, expected)
    assert switches == {True} == {getattr(MultiHeadAttention, "use_sdpa", True)}


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
