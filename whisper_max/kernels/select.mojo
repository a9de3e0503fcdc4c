"""Token selection: the logit filters of decoding, log-softmax and top-k in one op.

Python then sees a few numbers of each step instead of a row of the vocabulary.
"""

import extensibility
from extensibility import InputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from max.gpu.host import DeviceContext
from std.math import exp, log
from std.memory.alloc import unsafe_alloc
from std.utils.numerics import nan, neg_inf

from .softmax import MASKED
from .gemm import F32, Floats, raw
from .phases import in_one_phase, team_size

comptime MINUS_INFINITY = neg_inf[F32]()
comptime NOT_A_NUMBER = nan[F32]()
comptime REACHABLE: Float32 = -1.0e38
"""Below this a score is that of a suppressed token."""


@fieldwise_init
struct Row[width: Int](ImplicitlyCopyable):
    """One row of logits, and a scratch copy of it with suppressed tokens masked."""

    var logits: Floats
    var mask: Floats
    var masked: Floats

    def apply_mask(self, begin: Int, end: Int) -> Float32:
        """Fills the scratch between two tokens and returns the highest score there."""
        var highest = SIMD[F32, Self.width](MASKED)
        var i = begin
        while i + Self.width <= end:
            var x = (
                self.logits.unsafe_offset(i).unsafe_load[width=Self.width]()
                + self.mask.unsafe_offset(i).unsafe_load[width=Self.width]()
            )
            self.masked.unsafe_offset(i).unsafe_store(x)
            highest = max(highest, x)
            i += Self.width
        var result = highest.reduce_max()
        while i < end:
            var x = (
                self.logits.unsafe_offset(i).unsafe_load()
                + self.mask.unsafe_offset(i).unsafe_load()
            )
            self.masked.unsafe_offset(i).unsafe_store(x)
            result = max(result, x)
            i += 1
        return result

    def sum_exp(self, begin: Int, end: Int, shift: Float32) -> Float32:
        """The sum of exp(score - shift) between two tokens."""
        var total = SIMD[F32, Self.width](0)
        var i = begin
        while i + Self.width <= end:
            total += exp(self.masked.unsafe_offset(i).unsafe_load[width=Self.width]() - shift)
            i += Self.width
        var result = total.reduce_add()
        while i < end:
            result += exp(self.masked.unsafe_offset(i).unsafe_load() - shift)
            i += 1
        return result

    def rank(
        self,
        begin: Int,
        end: Int,
        count: Int,
        scores: Floats,
        tokens: Pointer[Int32, MutUntrackedOrigin],
    ):
        """Merges the tokens between two into the `count` highest, highest first."""
        var i = begin
        while i < end:
            var step = Self.width if i + Self.width <= end else 1
            if step == Self.width:
                var x = self.masked.unsafe_offset(i).unsafe_load[width=Self.width]()
                if x.reduce_max() <= scores.unsafe_offset(count - 1).unsafe_load():
                    i += step
                    continue
            for token in range(i, i + step):
                var score = self.masked.unsafe_offset(token).unsafe_load()
                var place = count
                # Equal scores keep the order of the tokens.
                while place > 0 and scores.unsafe_offset(place - 1).unsafe_load() < score:
                    place -= 1
                if place == count:
                    continue
                for j in range(count - 1, place, -1):
                    scores.unsafe_offset(j).unsafe_store(scores.unsafe_offset(j - 1).unsafe_load())
                    tokens.unsafe_offset(j).unsafe_store(tokens.unsafe_offset(j - 1).unsafe_load())
                scores.unsafe_offset(place).unsafe_store(score)
                tokens.unsafe_offset(place).unsafe_store(Int32(token))
            i += step


def first_not_in(tokens: Pointer[Int32, MutUntrackedOrigin], count: Int) -> Int32:
    """The lowest token that is not among the first `count` of these."""
    var token = Int32(0)
    var i = 0
    while i < count:
        if tokens.unsafe_offset(i).unsafe_load() == token:
            token += 1
            i = 0
        else:
            i += 1
    return token


@extensibility.register("whisper_select")
struct Select:
    @staticmethod
    def execute[
        target: StaticString, //, width: Int
    ](
        logprobs: MutableInputTensor[dtype=F32, rank=2, ...],
        tokens: MutableInputTensor[dtype=DType.int32, rank=2, ...],
        logits: InputTensor[dtype=F32, rank=3, ...],
        mask: InputTensor[dtype=F32, rank=1, ...],
        rules: InputTensor[dtype=DType.int32, rank=2, ...],
        threads: InputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """The most likely tokens of each row, and their log probabilities.

        logits: (rows, 1, vocabulary). mask: (vocabulary,), 0, or MASKED for a token that is never
        sampled. rules: (rows, 5), the text tokens [from, to) and the timestamps [from, to) that
        may follow, and whether timestamps together may outweigh text. logprobs and tokens: (rows,
        k); where fewer tokens may follow, the rest is minus infinity, with other tokens. Where
        none may follow, the log probabilities are NaN, as PyTorch's log_softmax has it.
        """
        var vocabulary = logits.dim_size(2)
        var count = logprobs.dim_size(1)
        var all_logits = raw(logits.unsafe_ptr())
        var bias = raw(mask.unsafe_ptr())
        var ranges = raw(rules.unsafe_ptr())
        var scores = raw(logprobs.unsafe_ptr())
        var best = raw(tokens.unsafe_ptr())

        def select(
            index: Int
        ) {
            var vocabulary, var count, var all_logits, var bias, var ranges, var scores, var best,
            imm
        }:
            var rule = ranges.unsafe_offset(index * 5)
            var text_from = Int(rule.unsafe_load())
            var text_to = Int(rule.unsafe_offset(1).unsafe_load())
            var time_from = Int(rule.unsafe_offset(2).unsafe_load())
            var time_to = Int(rule.unsafe_offset(3).unsafe_load())
            var row = Row[width](
                all_logits.unsafe_offset(index * vocabulary),
                bias,
                unsafe_alloc[Float32](vocabulary, alignment=64),
            )
            var highest_text = row.apply_mask(text_from, text_to)
            var highest_time = row.apply_mask(time_from, time_to)
            if rule.unsafe_offset(4).unsafe_load() == 1 and highest_time > REACHABLE:
                var all_times = highest_time + log(row.sum_exp(time_from, time_to, highest_time))
                if all_times > highest_text:
                    text_to = text_from
                    highest_text = MASKED
            var highest = max(highest_text, highest_time)
            var total = row.sum_exp(text_from, text_to, highest) + row.sum_exp(
                time_from, time_to, highest
            )
            var my_scores = scores.unsafe_offset(index * count)
            var my_tokens = best.unsafe_offset(index * count)
            for j in range(count):
                my_scores.unsafe_offset(j).unsafe_store(REACHABLE)
                my_tokens.unsafe_offset(j).unsafe_store(-1)
            row.rank(text_from, text_to, count, my_scores, my_tokens)
            row.rank(time_from, time_to, count, my_scores, my_tokens)
            var unreachable = MINUS_INFINITY if highest > REACHABLE else NOT_A_NUMBER
            for j in range(count):
                var score = my_scores.unsafe_offset(j).unsafe_load()
                if score > REACHABLE:
                    my_scores.unsafe_offset(j).unsafe_store((score - highest) - log(total))
                else:
                    my_scores.unsafe_offset(j).unsafe_store(unreachable)
                    my_tokens.unsafe_offset(j).unsafe_store(first_not_in(my_tokens, j))
            row.masked.unsafe_free()

        in_one_phase(logits.dim_size(0), team_size(threads), select)
