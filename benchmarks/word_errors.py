"""The word error rate: edits that turn a text into the reference, per word of the reference."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def word_error_rate(pairs: Iterable[tuple[str, str]]) -> float:
    """Over all (reference, text) pairs together. Raises ValueError when no word is expected."""
    edits = expected = 0
    for reference, text in pairs:
        words = words_of(reference)
        edits += edit_distance(words, words_of(text))
        expected += len(words)
    if not expected:
        raise ValueError("the references have no words")
    return edits / expected


def words_of(text: str) -> list[str]:
    """Lower case, without punctuation."""
    return re.sub(r"[^\w\s]", "", text.lower()).split()


def edit_distance(expected: Sequence[str], found: Sequence[str]) -> int:
    """Least number of insertions, deletions and substitutions (Levenshtein)."""
    previous = list(range(len(found) + 1))
    for row, word in enumerate(expected, start=1):
        current = [row]
        for column, other in enumerate(found, start=1):
            substituted = previous[column - 1] + (word != other)
            current.append(min(substituted, previous[column] + 1, current[-1] + 1))
        previous = current
    return previous[-1]
