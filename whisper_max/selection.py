"""Which tokens may follow: openai-whisper's logit filters as ranges that a kernel applies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from whisper.decoding import ApplyTimestampRules, LogitFilter, SuppressBlank, SuppressTokens

from .changed_parts import has_replaced
from .rule import Rule

if TYPE_CHECKING:
    from whisper.decoding import DecodingTask


@dataclass(frozen=True)
class Rules:
    """The stock filters of one decode, for every step after the first.

    At the first step further rules hold (no blank, an initial timestamp); upstream's own filters
    apply them.

    suppressed : tokens that are never sampled
    sample_begin : length of the prompt
    timestamp_begin : the first timestamp token, None where timestamps follow no rules
    eot : the end of the text; the text tokens are those before it
    n_vocab : size of the vocabulary
    """

    suppressed: tuple[int, ...]
    sample_begin: int
    timestamp_begin: int | None
    eot: int
    n_vocab: int

    @classmethod
    def of(cls, task: DecodingTask) -> Rules:
        """The rules of a task whose filters are all stock (see `foreign_filters`)."""
        suppressed: list[int] = []
        timestamp_begin, eot = None, task.tokenizer.eot
        for logit_filter in task.logit_filters:
            if isinstance(logit_filter, SuppressTokens):
                suppressed += logit_filter.suppress_tokens
            elif isinstance(logit_filter, ApplyTimestampRules):
                timestamp_begin = logit_filter.tokenizer.timestamp_begin
                eot = logit_filter.tokenizer.eot
                if logit_filter.tokenizer.no_timestamps is not None:
                    suppressed.append(logit_filter.tokenizer.no_timestamps)
        return cls(
            tuple(suppressed),
            task.sample_begin,
            timestamp_begin,
            eot,
            len(task.model.decoder.token_embedding.weight),  # not of dims: it may have been resized
        )

    def after(self, tokens: Sequence[int]) -> Rule:
        """What may follow `tokens`, prompt included: `ApplyTimestampRules` of openai-whisper."""
        begin = self.timestamp_begin
        if begin is None:
            return Rule(0, self.n_vocab, self.n_vocab, self.n_vocab, 0)
        text_from, text_to = 0, min(begin, self.n_vocab)
        time_from, time_to = begin, self.n_vocab
        sampled = tokens[self.sample_begin :]
        last_is_time = sampled[-1] >= begin
        # Timestamps come in pairs, except directly before the end of the text.
        pair_is_open = last_is_time and len(sampled) >= 2 and sampled[-2] < begin
        if pair_is_open:
            text_from = self.eot
        elif last_is_time:
            time_to = begin
        last_time = next((token for token in reversed(sampled) if token >= begin), None)
        if last_time is not None:
            # They do not decrease, and a segment is not empty.
            time_from = max(last_time, self.eot) if pair_is_open else last_time + 1
        return Rule(text_from, text_to, min(time_from, time_to), time_to, 1)


def in_stock_order(filters: Sequence[LogitFilter], sample_begin: int) -> bool:
    """Whether stock filters stand as upstream puts them: timestamp rules last, and only once.

    They weigh timestamps against the text that the filters before them have left. All begin where
    the prompt ends.
    """
    timed = [isinstance(f, ApplyTimestampRules) for f in filters]
    return not any(timed[:-1]) and all(
        getattr(f, "sample_begin", sample_begin) == sample_begin for f in filters
    )


def foreign_filters(filters: Sequence[LogitFilter]) -> list[str]:
    """Names of the filters that are not exactly upstream's."""
    return [
        f"{type(f).__module__}.{type(f).__qualname__}"
        for f in filters
        if type(f) not in (SuppressBlank, SuppressTokens, ApplyTimestampRules)
        or has_replaced(f, "apply", "whisper.decoding")
        or (type(f) is SuppressTokens and not _are_tokens(f.suppress_tokens))
    ]


def _are_tokens(index: object) -> bool:
    """Whether an index is a list of tokens; what else PyTorch takes for one is left to PyTorch."""
    return isinstance(index, (list, tuple)) and all(type(token) is int for token in index)
