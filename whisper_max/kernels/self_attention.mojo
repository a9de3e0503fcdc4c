"""Self-attention of a decoding step."""

from std.math import align_up
from std.memory.alloc import unsafe_alloc

from .attention import SCALE
from .gemm import F32, PANEL, Floats
from .keys_and_values import HEAD_DIM
from .softmax import highest_of, mask, softmax


@fieldwise_init
struct SelfAttention[width: Int](ImplicitlyCopyable):
    """Causal self-attention of the decoder over an append-only cache.

    `cache` is one layer's `[2, rows, heads, context, 64]`, keys then values. A row that branched
    off another (beam search) owns only what it appended: the key of position `p` of row `b`
    stands in row `source[b, p]` of the cache.
    """

    var output: Floats
    var qkv: Floats
    var cache: Floats
    var source: Pointer[Int32, MutUntrackedOrigin]
    var cache_rows: Int
    var heads: Int
    var context: Int
    var offset: Int
    var tokens: Int

    @always_inline
    def at(self, kind: Int, row: Int, head: Int, position: Int) -> Floats:
        """One position of one head: 64 floats of the keys (`kind` 0) or the values (1)."""
        return self.cache.unsafe_offset(
            (((kind * self.cache_rows + row) * self.heads + head) * self.context + position)
            * HEAD_DIM
        )

    def append(self, row: Int, head: Int):
        """Writes the new keys and values of one row and head into the cache."""
        var n = self.heads * HEAD_DIM
        for i in range(self.tokens):
            var new = self.qkv.unsafe_offset((row * self.tokens + i) * 3 * n + head * HEAD_DIM)
            for kind in range(2):
                comptime for d in range(0, HEAD_DIM, Self.width):
                    self.at(kind, row, head, self.offset + i).unsafe_offset(d).unsafe_store(
                        new.unsafe_offset((kind + 1) * n + d).unsafe_load[width=Self.width]()
                    )

    def run(self, row: Int, head: Int):
        """Appends, then attends with every new token of one row and head."""
        comptime vectors = HEAD_DIM // Self.width
        var n = self.heads * HEAD_DIM
        self.append(row, head)
        var scores = unsafe_alloc[Float32](
            align_up(self.offset + self.tokens, PANEL), alignment=64
        )
        for i in range(self.tokens):
            var query = self.qkv.unsafe_offset((row * self.tokens + i) * 3 * n + head * HEAD_DIM)
            var q = Array[SIMD[F32, Self.width], vectors](fill=SIMD[F32, Self.width](0))
            comptime for v in range(vectors):
                q[v] = query.unsafe_offset(v * Self.width).unsafe_load[width=Self.width]()
            var count = self.offset + i + 1
            for p in range(count):
                var key = self.at(0, self.row_of(row, p), head, p)
                var product = SIMD[F32, Self.width](0)
                comptime for v in range(vectors):
                    product = q[v].fma(
                        key.unsafe_offset(v * Self.width).unsafe_load[width=Self.width](), product
                    )
                scores.unsafe_offset(p).unsafe_store(product.reduce_add() * SCALE)
            var length = align_up(count, PANEL)
            mask(scores, count, length)
            var total = softmax[Self.width](scores, length, highest_of(scores, length))
            var sums = Array[SIMD[F32, Self.width], vectors](fill=SIMD[F32, Self.width](0))
            for p in range(count):
                var value = self.at(1, self.row_of(row, p), head, p)
                var weight = SIMD[F32, Self.width](scores.unsafe_offset(p).unsafe_load())
                comptime for v in range(vectors):
                    sums[v] = weight.fma(
                        value.unsafe_offset(v * Self.width).unsafe_load[width=Self.width](), sums[v]
                    )
            comptime for v in range(vectors):
                self.output.unsafe_offset(
                    (row * self.tokens + i) * n + head * HEAD_DIM + v * Self.width
                ).unsafe_store(sums[v] / total)
        scores.unsafe_free()

    @always_inline
    def row_of(self, row: Int, position: Int) -> Int:
        """The cache row that holds a position: the new tokens of a row are its own."""
        if position >= self.offset:
            return row
        return Int(self.source.unsafe_offset(row * self.context + position).unsafe_load())
