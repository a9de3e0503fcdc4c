"""Self-attention caches, written in place: a step touches what it changes, not all of them."""

import extensibility
from extensibility import InputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from layout import Coord
from max.algorithm import elementwise
from max.gpu.host import DeviceContext
from std.utils import IndexList

comptime MOST_BEAMS = 8
"""So many rows of a window can exchange what they hold: a thread keeps a part of each."""

comptime WIDTH = 8
"""Numbers of one head that a thread moves together: 16 bytes in half precision."""


@extensibility.register("whisper_append")
struct Append:
    """Puts new tokens behind what rows hold, or behind what other rows of their window hold.

    keys, values : the caches, shape = (windows, beams, heads, places, 64)
    new_keys, new_values : shape = (windows * beams, tokens, heads, 64)
    positions : places of the new tokens, consecutive, shape = (tokens,)
    parents : flat number of the row that each row continues, of the same window; where there are
        more beams than MOST_BEAMS, the row itself; shape = (windows, beams)
    """

    @staticmethod
    def execute[
        dtype: DType, //, target: StaticString
    ](
        keys: MutableInputTensor[dtype=dtype, rank=5, ...],
        values: MutableInputTensor[dtype=dtype, rank=5, ...],
        new_keys: InputTensor[dtype=dtype, rank=4, ...],
        new_values: InputTensor[dtype=dtype, rank=4, ...],
        positions: InputTensor[dtype=.int32, rank=1, ...],
        parents: InputTensor[dtype=.int32, rank=2, ...],
        ctx: DeviceContext,
    ) capturing raises:
        var beams = keys.dim_size(1)
        var count = new_keys.dim_size(1)

        # One place of one head, of all beams: nobody else reads or writes it.
        def write[
            width: Int, alignment: Int = 1
        ](
            index: Coord
        ) {
            var keys,
            var values,
            var new_keys,
            var new_values,
            var positions,
            var parents,
            var beams,
            var count,
        }:
            var window = Int(index[0].value())
            var head = Int(index[1].value())
            var place = Int(index[2].value())
            var i = Int(index[3].value())
            var first = window * beams
            var token = place - Int(positions[0])
            if token >= count:
                return
            if token >= 0:
                for beam in range(beams):
                    var source = IndexList[4](first + beam, token, head, i)
                    var there = IndexList[5](window, beam, head, place, i)
                    keys.store[width=width](there, new_keys.load[width=width](source))
                    values.store[width=width](there, new_values.load[width=width](source))
                return

            var moved = False
            for beam in range(beams):
                moved = moved or Int(parents[window, beam]) != first + beam
            if not moved:
                return
            var old_keys = Array[SIMD[dtype, width], MOST_BEAMS](fill=SIMD[dtype, width](0))
            var old_values = Array[SIMD[dtype, width], MOST_BEAMS](fill=SIMD[dtype, width](0))
            comptime for beam in range(MOST_BEAMS):
                if beam < beams:
                    var parent = Int(parents[window, beam]) - first
                    var here = IndexList[5](window, parent, head, place, i)
                    old_keys[beam] = keys.load[width=width](here)
                    old_values[beam] = values.load[width=width](here)
            comptime for beam in range(MOST_BEAMS):
                if beam < beams:
                    var there = IndexList[5](window, beam, head, place, i)
                    keys.store[width=width](there, old_keys[beam])
                    values.store[width=width](there, old_values[beam])

        elementwise[simd_width=WIDTH, target=target](
            write,
            Coord(
                IndexList[4](
                    keys.dim_size(0), keys.dim_size(2), keys.dim_size(3), keys.dim_size(4)
                )
            ),
            ctx,
        )
