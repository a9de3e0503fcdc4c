"""What both attention kernels know of their operands, and of softmax."""

comptime HEAD_DIM = 64
"""Numbers of one head."""
comptime WARP = 32
"""Lanes of a warp."""

comptime SCALE: Float32 = 0.125
"""1 / sqrt(HEAD_DIM), by which scores are multiplied."""
comptime SCALE_LOG2E: Float32 = SCALE * 1.4426950408889634
"""The same for powers of two instead of e."""
comptime LOWEST: Float32 = -1.0e30
"""The highest score before there is one: below all, and finite, so that differences are."""
comptime MASKED: Float32 = -3.0e38
"""The score of a key that a query does not see. Its weight is 0."""


@fieldwise_init
struct Extent(ImplicitlyCopyable):
    """Which sequences there are, and where: queries lie as (batch, queries, heads, 64)."""

    var queries: Int
    var keys: Int
    var heads: Int
    var key_stride: Int
    """From one key or value of a head to the next, in numbers."""
    var head_stride: Int
    """From one head of keys or values to the next."""

    @always_inline
    def query(self, batch: Int, query: Int, head: Int) -> Int:
        """Where a query of a head begins, and its result."""
        return ((batch * self.queries + query) * self.heads + head) * HEAD_DIM

    @always_inline
    def key(self, batch: Int, head: Int) -> Int:
        """Where the keys of a head begin; values lie as keys do."""
        return batch * self.keys * self.heads * HEAD_DIM + head * self.head_stride
