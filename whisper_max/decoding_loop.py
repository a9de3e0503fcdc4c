"""Upstream's main loop of a decode with its inner part on MAX: `DecodingTask._main_loop`.

The first step is upstream's in every respect but the decoder's forward pass. From the second on,
one call decodes a token for each row, applies the logit filters, normalizes and ranks; Python
keeps the token lists.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from math import inf, isnan
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from whisper.decoding import BeamSearchDecoder, DecodingTask, GreedyDecoder

from . import activation, inference
from .activation import originals
from .changed_parts import function_changes, has_replaced
from .conditions import UnsupportedByMax
from .dispatch import out_of_memory_is_unsupported, refuse, run
from .on_one_thread import only_this_thread
from .selection import Rules, foreign_filters, in_stock_order

if TYPE_CHECKING:
    from .runtime.by_device import Session

Decoded = tuple[Tensor, Tensor, list[float]]

upstream_main_loop = originals.get(
    "whisper.decoding.DecodingTask._main_loop", DecodingTask._main_loop
)


def max_main_loop(self: DecodingTask, audio_features: Tensor, tokens: Tensor) -> Decoded:
    """Samples until every sequence has ended, as upstream's `DecodingTask._main_loop`.

    audio_features : torch.Tensor, shape = (n_audio, n_audio_ctx, n_audio_state)
    tokens : torch.Tensor, shape = (n_audio * n_group, initial tokens), integers

    Returns tokens, shape = (n_audio * n_group, length); the sum of log probabilities of each row,
    float32; and the probability of silence of each row. Raises UnsupportedByMax in mode "strict"
    where MAX cannot run the decode.
    """
    rollback = _Rollback(self)

    def on_torch() -> Decoded:
        rollback.roll_back()
        return upstream_main_loop(self, audio_features, tokens)

    return run(
        "decoding_loop",
        activation.why_off("decoding_loop", getattr(self.model, "decoder", None)),
        lambda: _on_max(self, rollback, audio_features, tokens),
        on_torch,
        _differ,
    )


class _Rollback:
    """What MAX changes beyond its own state, as it was: PyTorch may have to start over.

    MAX may fail in the middle, or be compared. Where it has not begun nothing is put back: the
    generator is the whole process's, and another thread may have drawn from it meanwhile.
    """

    def __init__(self, task: DecodingTask) -> None:
        self._task = task
        self._begun = False
        self._generator: Tensor | None = None
        self._device = torch.device("cpu")

    def begin(self, device: torch.device) -> None:
        """Now MAX begins to choose tokens, drawing them from this device's generator if at all."""
        self._begun = True
        if isinstance(self._task.decoder, GreedyDecoder) and self._task.decoder.temperature != 0:
            self._device = device
            self._generator = _generator(device).get_state()

    def roll_back(self) -> None:
        """Puts back what MAX has changed, if it has."""
        if self._begun:
            self._task.decoder.reset()
        if self._generator is not None:
            _generator(self._device).set_state(self._generator)


def _generator(device: torch.device) -> torch.Generator:
    """Where PyTorch draws a device's random numbers from."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator


def _on_max(
    task: DecodingTask, rollback: _Rollback, audio_features: Tensor, tokens: Tensor
) -> Decoded:
    refuse(_reasons(task, tokens))
    session = inference.start(task.inference, tokens, audio_features, refuse_hooks=True)
    try:
        with out_of_memory_is_unsupported(), only_this_thread():
            return _decode(task, rollback, session, audio_features, tokens)
    except UnsupportedByMax as failed:
        inference.leave_to_pytorch(task.inference, failed.reasons)
        raise
    finally:
        if inference.decode_of(task.inference).session is not None:
            task.inference.cleanup_caching()


def _decode(
    task: DecodingTask,
    rollback: _Rollback,
    session: Session,
    audio_features: Tensor,
    tokens: Tensor,
) -> Decoded:
    sum_logprobs = torch.zeros(len(tokens), device=audio_features.device)
    no_speech_probs = [np.nan] * len(tokens)

    logits = session.prefill(tokens, (task.sot_index, tokens.shape[1] - 1))
    if task.tokenizer.no_speech is not None:
        probs_at_sot = logits[:, 0].softmax(dim=-1)
        no_speech_probs = probs_at_sot[:, task.tokenizer.no_speech].tolist()
    rollback.begin(tokens.device)
    tokens, completed = _upstream_step(task, logits[:, 1].clone(), tokens, sum_logprobs)
    if completed or tokens.shape[1] > task.n_ctx or task.sample_len == 1:
        return tokens, sum_logprobs, no_speech_probs
    if isinstance(task.decoder, GreedyDecoder) and task.decoder.temperature != 0:
        tokens = _sample(task, session, tokens, sum_logprobs)
        return tokens, sum_logprobs, no_speech_probs
    loop = _beam_search if isinstance(task.decoder, BeamSearchDecoder) else _greedy
    tokens, sums = loop(task, session, tokens, sum_logprobs.tolist())
    sum_logprobs.copy_(torch.tensor(sums, dtype=torch.float32, device="cpu"))
    return tokens, sum_logprobs, no_speech_probs


def _upstream_step(
    task: DecodingTask, logits: Tensor, tokens: Tensor, sum_logprobs: Tensor
) -> tuple[Tensor, bool]:
    """Filters logits, shape = (rows, n_vocab), and adds a token to each row, as upstream does."""
    for logit_filter in task.logit_filters:
        logit_filter.apply(logits, tokens)
    return task.decoder.update(tokens, logits, sum_logprobs)


def _sample(
    task: DecodingTask, session: Session, tokens: Tensor, sum_logprobs: Tensor
) -> Tensor:
    """Temperature above 0: upstream draws from torch's generator, from its own filtered logits."""
    for _ in range(1, task.sample_len):
        logits = session.step(tokens[:, -1:], range(len(tokens)))
        tokens, completed = _upstream_step(task, logits, tokens, sum_logprobs)
        if completed or tokens.shape[1] > task.n_ctx:
            break
    return tokens


def _greedy(
    task: DecodingTask, session: Session, tokens: Tensor, sums: list[float]
) -> tuple[Tensor, Sequence[float]]:
    """`GreedyDecoder.update` at temperature 0, step by step.

    sums : of each row's log probabilities up to now

    Returns the tokens and the sums at the end.
    """
    rules, eot = Rules.of(task), task.decoder.eot
    rows = tokens.tolist()
    selection = session.selection(rules.suppressed, rules.n_vocab, 1)
    summands = [[total] for total in sums]
    for _ in range(1, task.sample_len):
        last = [row[-1] for row in rows]
        logprobs, best = session.select(last, selection, [rules.after(row) for row in rows])
        completed = True
        for row, token, logprob, of_row in zip(rows, best, logprobs, summands):
            _refuse_not_a_number(logprob)
            if row[-1] == eot:
                token = eot
            else:
                of_row.append(logprob)
            row.append(token)
            completed = completed and token == eot
        if completed or len(rows[0]) > task.n_ctx:
            break
    # One after the other in float32, as upstream adds them.
    sums = [np.add.accumulate(of_row, dtype=np.float32)[-1] for of_row in summands]
    return torch.tensor(rows, device=tokens.device), sums


def _beam_search(
    task: DecodingTask, session: Session, tokens: Tensor, sums: list[float]
) -> tuple[Tensor, Sequence[float]]:
    """`BeamSearchDecoder.update`, as `_greedy`; beams exchange row numbers."""
    decoder, rules = task.decoder, Rules.of(task)
    size, eot = decoder.beam_size, decoder.eot
    ranked = size + 1
    rows = [tuple(row) for row in tokens.tolist()]
    selection = session.selection(rules.suppressed, rules.n_vocab, ranked)
    row_of = [row for row in range(len(rows)) for _ in range(ranked)]
    for _ in range(1, task.sample_len):
        last = [row[-1] for row in rows]
        logprobs, best = session.select(last, selection, [rules.after(row) for row in rows])
        # In float32, as upstream adds them; rounding a double's sum once more gives the same.
        totals = array("f", [sums[row] + logprob for row, logprob in zip(row_of, logprobs)])
        candidates = list(zip(totals, row_of, best))
        kept: list[tuple[int, ...]] = []
        parents: list[int] = []
        sums = []
        for window, finished in enumerate(decoder.finished_sequences):
            of_window = slice(window * size * ranked, (window + 1) * size * ranked)
            full = len(kept) + size
            for total, parent, token in _best_first(candidates[of_window]):
                if token == eot:
                    if len(finished) < decoder.max_candidates:
                        finished[rows[parent] + (token,)] = total
                    continue
                sums.append(total)
                kept.append(rows[parent] + (token,))
                parents.append(parent)
                if len(kept) == full:
                    break
        rows = kept
        session.reorder(parents)
        ended = all(len(f) >= decoder.max_candidates for f in decoder.finished_sequences)
        if ended or len(rows[0]) > task.n_ctx:
            break
    return torch.tensor(rows, device=tokens.device), sums


def _best_first(
    candidates: list[tuple[float, int, int]]
) -> Iterator[tuple[float, int, int]]:
    """Log probability, row and next token of what a window's rows could go on with, best first.

    Raises UnsupportedByMax where one is not a number, and at one that is impossible: which of
    those topk names is not defined.
    """
    _refuse_not_a_number(sum(total for total, _, _ in candidates))  # no infinity is positive
    for candidate in sorted(candidates, key=itemgetter(0), reverse=True):
        if candidate[0] == -inf:
            refuse(["fewer tokens may follow than there are beams"])
        yield candidate


def _refuse_not_a_number(logprob: float) -> None:
    """Leaves a decode to PyTorch where everything is suppressed, or logits are not numbers."""
    if isnan(logprob):
        refuse(["log probabilities are not numbers"])


def _reasons(task: DecodingTask, tokens: Tensor) -> list[str]:
    """Reasons against decoding this task here rather than step by step in upstream's loop.

    tokens : shape = (rows, initial tokens)
    """
    reasons = []
    decoder = task.decoder
    if type(task) is not DecodingTask:
        reasons.append(f"the task is a {type(task).__qualname__}, not upstream's DecodingTask")
    if type(task.inference) is not inference.MaxInference:
        reasons.append(f"the inference is a {type(task.inference).__qualname__}")
    else:
        reasons += [
            f"the inference's {name} was replaced"
            for name in inference.METHODS
            if has_replaced(task.inference, name, inference.__name__)
        ]
        if inference.is_open(task.inference):
            reasons.append("the inference is in the middle of a decode")
        if task.inference.model is not task.model:
            reasons.append("the inference decodes another model than the task's")
        if not tokens.shape[-1] == task.sample_begin == task.inference.initial_token_length:
            reasons.append("the initial tokens were changed after the task was made")
    if not 0 <= task.sot_index < tokens.shape[-1]:
        reasons.append(f"sot_index is {task.sot_index}, of {tokens.shape[-1]} initial tokens")
    if type(decoder) not in (GreedyDecoder, BeamSearchDecoder):
        reasons.append(f"the token decoder is a {type(decoder).__qualname__}")
    elif has_replaced(decoder, "update", "whisper.decoding"):
        reasons.append("the token decoder's update was replaced")
    elif isinstance(decoder, BeamSearchDecoder) and decoder.inference is not task.inference:
        reasons.append("the token decoder has an inference of its own")
    elif isinstance(decoder, BeamSearchDecoder):
        if type(task.inference) is inference.MaxInference:
            reasons += inference.kv_modules_reasons(task.inference)
        of_windows = tokens[:: decoder.beam_size].repeat_interleave(decoder.beam_size, dim=0)
        if not torch.equal(of_windows, tokens):
            reasons.append("the beams of a window begin with other tokens")
    if torch.get_default_dtype() is not torch.float32:  # of upstream's sums, too
        reasons.append(f"the default dtype is {torch.get_default_dtype()}, not float32")
    if type(task.sample_len) is not int or task.sample_len < 1:
        reasons.append(f"sample_len is {task.sample_len!r}")
    reasons += function_changes("whisper.decoding", ("log_softmax",))
    reasons += [f"{name} filters the logits" for name in foreign_filters(task.logit_filters)]
    if not in_stock_order(task.logit_filters, task.sample_begin):
        reasons.append("the logit filters are not in upstream's order")
    return reasons


def _differ(found: Decoded, expected: Decoded) -> str | None:
    if found[0].tolist() != expected[0].tolist():
        return f"tokens {found[0].tolist()} for {expected[0].tolist()}"
    return None
