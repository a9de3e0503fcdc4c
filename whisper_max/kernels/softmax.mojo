"""Scores into weights: the highest score, powers of two, and their sum."""

from std.math import exp
from std.sys import llvm_intrinsic

from .gemm import F32, PANEL, Floats, Packed
from .products import BF16, WORDS
from .tiles import TILE_ROWS

comptime LOG2_E: Float32 = 1.44269504
comptime FLOOR = 1
comptime CURRENT_ROUNDING = 4
"""How AVX-512's instructions are told to round: down; and as the thread does otherwise."""

comptime MASKED: Float32 = -3.0e38
"""A score that softmax turns into zero."""


@always_inline
def higher[width: Int](a: SIMD[F32, width], b: SIMD[F32, width]) -> SIMD[F32, width]:
    """The higher of each two; where one is not a number, `b`: one instruction, unlike `max`."""
    return a.gt(b).select(a, b)


@always_inline
def highest_of(scores: Floats, length: Int) -> Float32:
    """The highest of `length` scores, a multiple of a panel."""
    var highest = SIMD[F32, PANEL](MASKED)
    for i in range(0, length, PANEL):
        highest = higher[PANEL](scores.unsafe_offset(i).unsafe_load[width=PANEL](), highest)
    return highest.reduce_max()


@always_inline
def mask(scores: Floats, count: Int, length: Int):
    """Leaves out the scores from `count` on."""
    for i in range(count, length):
        scores.unsafe_offset(i).unsafe_store(MASKED)


@always_inline
def softmax[
    width: Int, rounded: Bool = False
](scores: Floats, length: Int, highest: Float32) -> Float32:
    """Exponentiates `scores[:length]` less the highest of them; returns the sum.

    `length` is a multiple of a panel, so that vectors overlap. Where `rounded`, what is stored is
    bfloat16, from the beginning of the scores on.
    """
    var to = Packed[BF16](unsafe_from_address=Int(scores))
    var total = SIMD[F32, PANEL](0)
    for i in range(0, length, PANEL):
        var x = scores.unsafe_offset(i).unsafe_load[width=PANEL]() - highest
        var e = SIMD[F32, PANEL](0)
        comptime if width == WORDS:
            comptime for half in range(0, PANEL, WORDS):
                e = e.insert[offset=half](exp_by_scaling[rounded](x.slice[WORDS, offset=half]()))
        else:
            e = exp(x)
        comptime if rounded:
            to.unsafe_offset(i).unsafe_store(e.cast[BF16]())
        else:
            scores.unsafe_offset(i).unsafe_store(e)
        total += e
    return total.reduce_add()


@always_inline
def exp_by_scaling[rough: Bool](x: SIMD[F32, WORDS]) -> SIMD[F32, WORDS]:
    """The exponential of numbers that are not positive, with AVX-512, in half the instructions."""
    return power_of_two[rough](x * LOG2_E)


@always_inline
def power_of_two[rough: Bool](power: SIMD[F32, WORDS]) -> SIMD[F32, WORDS]:
    """2^p with AVX-512, infinite from 2^128 on.

    It is 2^floor(p), by which `vscalefps` scales, times a polynomial of what floor takes away.
    Relative error below 2 / 2^24, and none for whole p. Rounding p beforehand adds ln 2 |p| / 2^24:
    little where p is a score less the highest and next to it, up to 2^-18 in tiles, whose levels
    may lie 64 below. Where `rough`, below 1e-4, a 20th of that of rounding to bfloat16.
    Coefficients by weighted least squares.
    """
    var rest = llvm_intrinsic["llvm.x86.avx512.mask.reduce.ps.512", SIMD[F32, WORDS]](
        power, Int32(FLOOR), power, Int16(-1), Int32(CURRENT_ROUNDING)
    )
    var y: SIMD[F32, WORDS]
    comptime if rough:
        y = SIMD[F32, WORDS](0.07802452)
        y = y.fma(rest, 0.22606718)
        y = y.fma(rest, 0.69583352)
        y = y.fma(rest, 0.99992523)
    else:
        y = SIMD[F32, WORDS](0.0002161291631637141)
        y = y.fma(rest, 0.0012467845808714628)
        y = y.fma(rest, 0.009675451554358006)
        y = y.fma(rest, 0.055485282093286514)
        y = y.fma(rest, 0.2402293086051941)
        y = y.fma(rest, 0.6931470632553101)
        y = y.fma(rest, 1.0)
    return llvm_intrinsic["llvm.x86.avx512.mask.scalef.ps.512", SIMD[F32, WORDS]](
        y, power, y, Int16(-1), Int32(CURRENT_ROUNDING)
    )


@always_inline
def look_for_highest(block: Floats, highest: Floats):
    """Raises the highest scores of 16 rows, `[16, 16]`, by those of a block, `[16, 32]`."""
    for r in range(TILE_ROWS):
        var at = block.unsafe_offset(r * PANEL)
        var left = at.unsafe_load[width=WORDS]()
        var right = at.unsafe_offset(WORDS).unsafe_load[width=WORDS]()
        var high = highest.unsafe_offset(r * WORDS)
        var both = higher[WORDS](left, right)
        high.unsafe_store(higher[WORDS](both, high.unsafe_load[width=WORDS]()))


@always_inline
def weigh_row[
    parts: Int
](scores: Floats, level: Float32, to: Packed[BF16], totals: Floats):
    """Makes weights of the scores of a row with a panel: 2 to their power, less the row's level.

    They are a row of a tile of bfloat16, or of two of parts side by side, and are added to 16
    totals.
    """
    var total = totals.unsafe_load[width=WORDS]()
    var powers = scores.unsafe_load[width=PANEL]() - level
    comptime for half in range(0, PANEL, WORDS):
        var weight = power_of_two[parts == 1](powers.slice[WORDS, offset=half]())
        var rounded = weight.cast[BF16]()
        to.unsafe_offset(half).unsafe_store(rounded)
        comptime if parts == 2:
            to.unsafe_offset(PANEL + half).unsafe_store(
                (weight - rounded.cast[F32]()).cast[BF16]()
            )
        total += weight
    totals.unsafe_store(total)


@always_inline
def total_of(totals: Floats, row: Int) -> Float32:
    """The sum of a row's weights, of which `totals` hold 16 parts."""
    return totals.unsafe_offset(row * WORDS).unsafe_load[width=WORDS]().reduce_add()
