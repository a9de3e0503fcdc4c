"""Keys and values of one head as attention reads them.

Keys are packed like weights: panels of 32 frames, `[frames / 32, 64, 32]`. Values are two panels
of 32 channels, `[2, frames, 32]`, frames padded to a multiple of 32 with zeros. Panels of bfloat16
hold pairs (products.mojo). For matrix tiles both hold one bfloat16 or two for each number
(tiles.mojo).
"""

from std.math import align_up
from std.memory import unsafe_stack_allocation

from .gemm import F32, PANEL, Floats, Packed, raw
from .packing import LINES, store_transposed
from .products import BF16, Words, store_bfloat16, store_pairs, words_of
from .tiles import parts_of

comptime HEAD_DIM = 64


@always_inline
def padded(frames: Int) -> Int:
    """Frames rounded up to whole panels."""
    return align_up(frames, PANEL)


@always_inline
def head_size(frames: Int) -> Int:
    """Elements of one head's packed keys, and of its packed values."""
    return padded(frames) * HEAD_DIM


def pack_keys[
    type: DType, //, tiles: Bool
](source: Floats, row_stride: Int, frames: Int, to: Packed[type]):
    """Packs the keys of one head; frame `f` of the source starts at `f * row_stride`."""
    comptime if tiles or type == BF16:
        pack_key_pairs[parts_of[type, tiles]()](source, row_stride, frames, words_of(to))
        return
    for first in range(0, frames, PANEL):
        for d in range(0, HEAD_DIM, LINES):
            var block = Array[SIMD[type, LINES], PANEL](fill=0)
            for i in range(min(PANEL, frames - first)):
                block[i] = (
                    source.unsafe_offset((first + i) * row_stride + d)
                    .unsafe_load[width=LINES]()
                    .cast[type]()
                )
            store_transposed(block, to.unsafe_offset(first * HEAD_DIM + d * PANEL))


def pack_key_pairs[
    parts: Int
](source: Floats, row_stride: Int, frames: Int, to: Words):
    """Packs keys as pairs: two neighbours of a key are one word, and frames lie side by side."""
    comptime pairs = parts * HEAD_DIM // 2
    var keys = unsafe_stack_allocation[PANEL * 2 * pairs, Scalar[BF16], alignment=64]()
    var words = words_of(raw(keys))
    for first in range(0, frames, PANEL):
        for i in range(min(PANEL, frames - first)):
            store_bfloat16[parts](
                source.unsafe_offset((first + i) * row_stride),
                raw(keys).unsafe_offset(i * 2 * pairs),
                HEAD_DIM,
            )
        for pair in range(0, pairs, LINES):
            var block = Array[SIMD[DType.uint32, LINES], PANEL](fill=0)
            for i in range(min(PANEL, frames - first)):
                block[i] = words.unsafe_offset(i * pairs + pair).unsafe_load[width=LINES]()
            store_transposed(block, to.unsafe_offset(first * pairs + pair * PANEL))


def pack_value_pairs[
    parts: Int
](source: Floats, row_stride: Int, frames: Int, to: Packed[BF16], length: Int):
    """Packs values as pairs of frames."""
    for half in range(HEAD_DIM // PANEL):
        for frame in range(0, padded(frames), 2):
            var first = SIMD[F32, PANEL](0)
            var second = SIMD[F32, PANEL](0)
            var at = source.unsafe_offset(frame * row_stride + half * PANEL)
            if frame < frames:
                first = at.unsafe_load[width=PANEL]()
            if frame + 1 < frames:
                second = at.unsafe_offset(row_stride).unsafe_load[width=PANEL]()
            store_pairs[parts](
                first, second, to.unsafe_offset(half * parts * length * PANEL), frame
            )


def pack_values[
    type: DType, //, width: Int, tiles: Bool
](source: Floats, row_stride: Int, frames: Int, to: Packed[type], length: Int):
    """Packs the values of one head, or of a run of its frames, of which panels hold `length`."""
    comptime if tiles or type == BF16:
        pack_value_pairs[parts_of[type, tiles]()](
            source, row_stride, frames, Packed[BF16](unsafe_from_address=Int(to)), length
        )
        return
    for half in range(HEAD_DIM // PANEL):
        for frame in range(padded(frames)):
            var line = to.unsafe_offset((half * length + frame) * PANEL)
            comptime for lane in range(0, PANEL, width):
                var x = SIMD[F32, width](0)
                if frame < frames:
                    x = source.unsafe_offset(
                        frame * row_stride + half * PANEL + lane
                    ).unsafe_load[width=width]()
                line.unsafe_offset(lane).unsafe_store(x.cast[type]())
