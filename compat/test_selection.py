"""Token selection on MAX against upstream's own filters and decoders, on the same logits."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from whisper.decoding import DecodingOptions, DecodingTask
from whisper.model import ModelDimensions, Whisper

from isolation import busy_cpus, pytorch_threads
from strategies import Recipe, numbers, seeds
from whisper_max import settings
from whisper_max.runtime.decoder_session import DecoderSession
from whisper_max.selection import Rules, foreign_filters

EOT, NO_TIMESTAMPS, TIMESTAMP_BEGIN = 50257, 50363, 50364
LOGPROB = 1e-4
"""Both sides take the logarithm of one sum, added up in another order."""

LOUDNESS = (0.25, 1.0, 4.0)

text = st.integers(0, EOT - 1)
timestamps = st.integers(TIMESTAMP_BEGIN, 51864)
special = st.integers(EOT, TIMESTAMP_BEGIN - 1)


@lru_cache(maxsize=None)
def small_model(loudness: float = 1.0) -> Whisper:
    """A real vocabulary on a small decoder; made while whisper is patched.

    loudness : scales the logits of all timestamps, to let text or timestamps prevail
    """
    dims = ModelDimensions(80, 500, 64, 1, 1, 51865, 448, 64, 1, 1)
    model = Recipe(dims, seed=3, gain=1.0, float16=False).build()
    model.decoder.token_embedding.weight[TIMESTAMP_BEGIN:] *= loudness
    for parameter in model.parameters():
        parameter.copy_(parameter.half())
    return model


class Case:
    """One step of a decode: its task, its rows of tokens, and the logits of the last token."""

    def __init__(
        self, options: DecodingOptions, rows: list[list[int]], seed: int, loudness: float = 1.0
    ):
        self.model = small_model(loudness)
        self.task = DecodingTask(self.model, options)
        begin = self.task.initial_tokens
        self.tokens = torch.tensor([[*begin, *row] for row in rows])
        features = numbers((1, 500, 64), seed)
        self.session = DecoderSession(
            self.model.decoder, features, len(rows), settings.active()
        )
        self.session.prefill(self.tokens[:, :-1], [0])

    def logits(self) -> Tensor:
        """What upstream's filters get, and the cache as it was."""
        logits = self.session.step(self.tokens[:, -1:], range(len(self.tokens)))
        self.session._state.length -= 1
        return logits

    def on_max(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Log probabilities and tokens, (rows, count), ranked by the kernel."""
        rules = Rules.of(self.task)
        selection = self.session.selection(rules.suppressed, rules.n_vocab, count)
        rows = self.tokens.tolist()
        ranked = self.session.select(
            [row[-1] for row in rows], selection, [rules.after(row) for row in rows]
        )
        logprobs, best = (np.reshape(numbers, (len(rows), count)) for numbers in ranked)
        return logprobs, best

    def on_torch(self) -> Tensor:
        """Log probabilities after upstream's filters, (rows, n_vocab)."""
        logits = self.logits()
        for logit_filter in self.task.logit_filters:
            logit_filter.apply(logits, self.tokens)
        return logits.log_softmax(dim=-1)


def assert_same_choice(case: Case, count: int) -> None:
    expected = case.on_torch()
    logprobs, tokens = case.on_max(count)
    for row, everything in enumerate(expected):
        possible = int(everything.isfinite().sum())
        best = everything.topk(count)
        for rank in range(count):
            found = logprobs[row, rank]
            if rank >= possible:
                assert found == -np.inf
                continue
            assert abs(found - best.values[rank].item()) < LOGPROB
            # The token itself; where two are as likely, either.
            assert abs(everything[tokens[row, rank]].item() - best.values[rank].item()) < LOGPROB
        assert len(set(tokens[row].tolist())) == count


histories = st.integers(1, 12).flatmap(
    lambda length: st.lists(
        st.lists(text | timestamps | special, min_size=length, max_size=length),
        min_size=1,
        max_size=3,
    )
)


@given(histories, seeds, st.integers(1, 6), st.sampled_from(LOUDNESS))
def test_any_history(strict, rows, seed, count, loudness):
    assert_same_choice(Case(DecodingOptions(fp16=False), rows, seed, loudness), count)


@pytest.mark.parametrize(
    "sampled",
    [
        [TIMESTAMP_BEGIN],  # an initial timestamp: text must follow
        [TIMESTAMP_BEGIN, 100],
        [TIMESTAMP_BEGIN, 100, TIMESTAMP_BEGIN + 50],  # a pair to close, or the end
        [TIMESTAMP_BEGIN, 100, TIMESTAMP_BEGIN + 50, TIMESTAMP_BEGIN + 50],
        [TIMESTAMP_BEGIN, 100, 51864],  # the last timestamp there is
        [TIMESTAMP_BEGIN, 100, 51864, 51864],  # none may follow
        [100],  # no timestamp yet
        [TIMESTAMP_BEGIN, 100, TIMESTAMP_BEGIN + 50, EOT],
    ],
)
@pytest.mark.parametrize("loudness", LOUDNESS)
def test_edges_of_the_timestamp_rules(strict, sampled, loudness):
    assert_same_choice(Case(DecodingOptions(fp16=False), [sampled], 1, loudness), 6)


@given(histories, seeds)
def test_without_timestamps(strict, rows, seed):
    options = DecodingOptions(fp16=False, without_timestamps=True, suppress_tokens="1,2,3")
    assert_same_choice(Case(options, rows, seed), 6)


@given(histories, seeds, st.lists(text, max_size=5), st.booleans())
def test_suppressed_tokens_and_prompts(strict, rows, seed, suppressed, blank):
    options = DecodingOptions(
        fp16=False,
        suppress_tokens=suppressed or None,
        suppress_blank=blank,
        prompt=[5, 6, 7],
        prefix="a b",
    )
    assert_same_choice(Case(options, rows, seed), 6)


@pytest.mark.parametrize("reachable", [(), (100,), (3, 100, 2), (EOT - 1, 0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("without_timestamps", [True, False])
def test_almost_everything_suppressed(strict, reachable, without_timestamps):
    """Fewer tokens than are ranked, or none at all: then PyTorch's log_softmax gives NaN."""
    options = DecodingOptions(
        fp16=False,
        suppress_tokens=[token for token in range(51865) if token not in reachable],
        without_timestamps=without_timestamps,
    )
    case = Case(options, [[5, 6], [7, 8]], 1)
    if reachable:
        assert_same_choice(case, 6)
        return
    assert bool(case.on_torch().isnan().all())
    logprobs, tokens = case.on_max(3)
    assert np.isnan(logprobs).all()
    # As argmax has it; topk ranks equals in no particular order.
    assert tokens.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_both_outcomes_of_the_probability_rule_occur(strict):
    """The examples above would prove little if timestamps never, or always, outweighed text."""
    outcomes = set()
    for loudness in LOUDNESS:
        case = Case(DecodingOptions(fp16=False), [[TIMESTAMP_BEGIN, 100]], 1, loudness)
        outcomes.add(bool(case.on_torch()[0, :TIMESTAMP_BEGIN].isfinite().any()))
    assert outcomes == {True, False}


def test_a_filter_of_somebody_else_is_named(strict):
    task = DecodingTask(small_model(), DecodingOptions(fp16=False))
    assert foreign_filters(task.logit_filters) == []

    class Louder(type(task.logit_filters[0])):
        pass

    task.logit_filters[0].__class__ = Louder
    assert [name.rpartition(".")[2] for name in foreign_filters(task.logit_filters)] == ["Louder"]
    task.logit_filters[1].apply = lambda logits, tokens: None
    assert len(foreign_filters(task.logit_filters)) == 2


def test_one_thread_where_pytorch_has_one(strict):
    """Beside others, each with a CPU of its own; rows enough that choosing takes long."""
    case = Case(DecodingOptions(fp16=False), [[5, 6]] * 60, 1)
    with pytorch_threads(1):

        def choose():
            case.on_max(6)
            case.session._state.length -= 1

        assert busy_cpus(choose) < 1.3
