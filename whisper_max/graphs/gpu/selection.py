"""Token selection on the device: `whisper_select` of kernels/select.mojo in MAX operations."""

from __future__ import annotations

from max.dtype import DType
from max.graph import TensorValue, ops

from ..specification import MASKED

TAKEN = -3.3e38
"""As MASKED, of a token that is ranked already."""

REACHABLE = -1.0e38
"""Below this a score is that of a suppressed token."""


def select(
    logits: TensorValue, mask: TensorValue, rules: TensorValue, count: int
) -> tuple[TensorValue, TensorValue]:
    """The `count` most likely tokens of each row under the decoding rules.

    logits, shape = (rows, n_vocab), float32
    mask, shape = (n_vocab,), float32
        0, or MASKED for a token that is never sampled
    rules, shape = (rows, 5), int32
        the text tokens [from, to) and the timestamps [from, to) that may follow, and whether
        timestamps together may outweigh text

    Returns log probabilities, float32, and tokens, int32, both (rows, count). Where fewer tokens
    may follow, the rest is minus infinity, with other tokens; where none may, all are NaN.
    """
    device = logits.device
    n_vocab = int(logits.shape[1])
    token = ops.range(0, n_vocab, 1, dtype=DType.int32, device=device)
    rule = [rules[:, i : i + 1] for i in range(5)]  # (rows, 1) each

    def number(value: float) -> TensorValue:
        return ops.constant(value, DType.float32, device=device)

    def between(begin: TensorValue, end: TensorValue) -> TensorValue:
        inside = ops.logical_and(token >= begin, token < end)
        possible = ops.logical_and(inside, mask > number(REACHABLE))
        return ops.where(possible, logits, number(MASKED))  # (rows, n_vocab)

    text, times = between(rule[0], rule[1]), between(rule[2], rule[3])
    highest_text, highest_time = ops.max(text), ops.max(times)  # (rows, 1)
    all_times = highest_time + ops.log(ops.sum(ops.exp(times - highest_time)))
    outweighed = ops.logical_and(
        ops.logical_and(rule[4] > 0, highest_time > number(REACHABLE)), all_times > highest_text
    )
    # A token is text, a timestamp, or none of both.
    scores = ops.where(outweighed, times, ops.max(text, times))
    highest = ops.max(scores)
    total = ops.log(ops.sum(ops.exp(scores - highest)))

    unreachable = ops.where(
        highest > number(REACHABLE), number(float("-inf")), number(float("nan"))
    )
    logprobs, tokens = [], []
    for _ in range(count):
        score, best = _first_highest(scores, token, n_vocab)
        logprobs.append(
            ops.where(score > number(REACHABLE), (score - highest) - total, unreachable)
        )
        tokens.append(best)
        scores = ops.where(token.broadcast_to(scores.shape) != best, scores, number(TAKEN))
    return ops.concat(logprobs, axis=1), ops.concat(tokens, axis=1)


def _first_highest(
    scores: TensorValue, token: TensorValue, n_vocab: int
) -> tuple[TensorValue, TensorValue]:
    """The highest score of each row and the lowest token that has it, both (rows, 1).

    On a GPU, MAX's argmax and top-k return any of several equals. Logits of half precision are
    often equal, and greedy decoding upstream takes the first.
    """
    score = ops.max(scores)
    beyond = ops.constant(n_vocab - 1, DType.int32, device=scores.device)
    return score, ops.min(ops.where(scores >= score, token, beyond))
