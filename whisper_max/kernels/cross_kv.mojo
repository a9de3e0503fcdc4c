"""Cross-attention keys and values of all layers of the decoder, in one op."""

import extensibility
from extensibility import InputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from std.math import align_up, ceildiv
from std.memory.alloc import unsafe_alloc

from .gemm import F32, PANEL, Floats, Packed, copy, raw
from .keys_and_values import HEAD_DIM, pack_keys, pack_values, padded
from .layers import Weights, linear
from .norm import Norm, sum_of_squares
from .phases import Phases, team_size
from .projection import PACKED_ROWS, Projection


@fieldwise_init
struct CrossCaches[
    type: DType, cache_type: DType, width: Int, product: DType, tiles: Bool
](ImplicitlyCopyable):
    """Cross-attention keys and values of all layers, from the encoder's features."""

    comptime Layer = Projection[Self.type, Self.width, Self.product, Self.tiles]
    comptime Left = Self.Layer.Left
    comptime Right = Self.Layer.Right

    var keys: Packed[Self.cache_type]
    """[layers, windows, heads, packed]."""
    var values: Packed[Self.cache_type]
    """[layers, windows, heads, packed]."""
    var copies: Floats
    """[copied rows, n_state], what was read of the first rows."""
    var copied: Int
    """Rows of the features, which are [windows * frames, n_state]."""
    var squares: Floats
    """[windows * frames], squared norms."""
    var features: Floats
    var left: Self.Left
    """The features, packed; windows begin with whole tiles, so that tiles are of one window."""
    var weights: Weights[Self.type]
    """Of keys and of values, of all heads: 2 * n_state columns."""
    var layers: Int
    var windows: Int
    var frames: Int
    var heads: Int
    var elements: Int
    """Numbers in a head's packed keys."""

    @always_inline
    def none(self) -> Norm:
        """The norm of features: they have none."""
        return Norm(self.features, self.features, 0)

    @staticmethod
    def window_rows(frames: Int) -> Int:
        """Packed rows of a window."""
        return align_up(frames, Self.Left.at_once)

    @always_inline
    def blocks(self) -> Int:
        """Into how many blocks the frames of a window are cut."""
        return ceildiv(self.frames, Self.Left.rows_in_cache)

    @always_inline
    def pack(self, chunk: Int):
        """Packs some frames of the features."""
        var n = self.heads * HEAD_DIM
        var first = chunk * PACKED_ROWS
        for row in range(first, min(first + PACKED_ROWS, self.windows * self.frames)):
            var frame = self.features.unsafe_offset(row * n)
            if row < self.copied:  # once: another thread may be writing there
                copy[Self.width](frame, self.copies.unsafe_offset(row * n), n)
                frame = self.copies.unsafe_offset(row * n)
            var window = row // self.frames
            self.left.pack(
                window * Self.window_rows(self.frames) + row % self.frames, frame, self.none()
            )
            self.squares.unsafe_offset(row).unsafe_store(sum_of_squares[Self.width](frame, n))

    @always_inline
    def fill(self, chunk: Int, right: Self.Right, projected: Floats):
        """Keys or values of one head of a layer, of a block of a window's frames.

        All heads and layers of a block follow each other: its features are in the cache. A worker
        has a panel `right` of its own, and `projected`, [rows in cache, 64].
        """
        comptime panels = HEAD_DIM // PANEL
        var of_block = 2 * self.heads * self.layers
        var window = chunk // of_block // self.blocks()
        var first = chunk // of_block % self.blocks() * Self.Left.rows_in_cache
        var rows = min(Self.Left.rows_in_cache, self.frames - first)
        var layer = chunk % of_block // (2 * self.heads)
        var of_values = chunk // self.heads % 2
        var head = chunk % self.heads
        var part = linear[Self.width, Self.product, Self.tiles](
            self.features, self.features, rows, self.weights, layer, self.none()
        ).panels_from((of_values * self.heads + head) * panels, panels, projected)
        var from_row = window * Self.window_rows(self.frames) + first
        comptime for panel in range(panels):
            part.block(self.left, right, from_row, 0, rows, panel)
        var to = ((layer * self.windows + window) * self.heads + head) * self.elements
        if of_values == 1:
            pack_values[Self.width, False](
                projected,
                HEAD_DIM,
                rows,
                self.values.unsafe_offset(to + first * PANEL),
                padded(self.frames),
            )
        else:
            pack_keys[False](
                projected, HEAD_DIM, rows, self.keys.unsafe_offset(to + first * HEAD_DIM)
            )


@extensibility.register("whisper_cross_kv")
struct CrossKV:
    @staticmethod
    def execute[
        target: StaticString,
        type: DType,
        cache_type: DType,
        //,
        width: Int,
        product: DType,
        tiles: Bool,
    ](
        keys: MutableInputTensor[dtype=cache_type, rank=4, ...],
        values: MutableInputTensor[dtype=cache_type, rank=4, ...],
        copies: MutableInputTensor[dtype=F32, rank=3, ...],
        squares: MutableInputTensor[dtype=F32, rank=2, ...],
        features: InputTensor[dtype=F32, rank=3, ...],
        threads: InputTensor[dtype=DType.int32, rank=1, ...],
        kv_weight: InputTensor[dtype=type, rank=4, ...],
        kv_scale: InputTensor[dtype=F32, rank=2, ...],
        kv_bias: InputTensor[dtype=F32, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Cross-attention keys and values of all layers, packed into their caches.

        features: (windows, frames, n_state). keys and values: (layers, windows, heads, packed).
        copies: what is read of the first windows' features, of as many as there is room for.
        squares: (windows, frames), the squared norm of each frame's features.
        """
        var windows = features.dim_size(0)
        var frames = features.dim_size(1)
        var n = features.dim_size(2)
        var layers = kv_bias.dim_size(0)
        comptime Caches = CrossCaches[type, cache_type, width, product, tiles]
        comptime Left = Caches.Left
        var packed_rows = windows * Caches.window_rows(frames)
        var packed = unsafe_alloc[UInt8](Left.bytes(packed_rows, n), alignment=64)
        var caches = Caches(
            keys=raw(keys.unsafe_ptr()),
            values=raw(values.unsafe_ptr()),
            copies=raw(copies.unsafe_ptr()),
            copied=copies.dim_size(0) * frames,
            squares=raw(squares.unsafe_ptr()),
            features=raw(features.unsafe_ptr()),
            left=Left.at(raw(packed), packed_rows, n),
            weights=Weights[type].of(kv_weight, kv_scale, kv_bias),
            layers=layers,
            windows=windows,
            frames=frames,
            heads=n // HEAD_DIM,
            elements=keys.dim_size(3),
        )
        var pack_chunks = ceildiv(windows * frames, PACKED_ROWS)
        var fill_chunks = windows * caches.blocks() * 2 * caches.heads * layers
        var team = team_size(threads)
        var phases = Phases(2, team)

        def worker(index: Int) {var caches, var phases, var pack_chunks, var fill_chunks}:
            var phase = phases.of(index)
            var projected = unsafe_alloc[Float32](Left.rows_in_cache * HEAD_DIM, alignment=64)
            var panel = unsafe_alloc[UInt8](Caches.Right.bytes, alignment=64)
            var right = Caches.Right.at(raw(panel))

            @always_inline
            def pack(chunk: Int) {var caches}:
                caches.pack(chunk)

            @always_inline
            def fill(chunk: Int) {var caches, var right, var projected}:
                caches.fill(chunk, right, projected)

            phase.run(pack_chunks, pack)
            phase.run(fill_chunks, fill)
            panel.unsafe_free()
            projected.unsafe_free()

        sync_parallelize(worker, team)
        packed.unsafe_free()
        phases.free()
