"""A team of workers that walks through the phases of a network without being put to sleep.

A decoding step is some fifty short parallel loops. Handing each to the thread pool costs a
wake-up apiece, tens of microseconds each, as much as the work. Here the pool is entered once:
every worker claims chunks of the current phase from a shared counter and spins until the phase
is complete. Whoever arrives late finds the chunks gone and goes on; a single worker alone
completes everything, so no schedule can deadlock.
"""

from std.atomic import Atomic
from std.memory.alloc import unsafe_alloc
from std.ffi import external_call
from std.sys import CompilationTarget, llvm_intrinsic
from extensibility import InputTensor
from max.algorithm import sync_parallelize
from max.runtime.asyncrt import parallelism_level

comptime Counter = Atomic[Int64]
comptime LINE = 8
"""Counters per cache line: each stands alone on one, or workers would fight for it."""


comptime SPINS_BEFORE_YIELD = 1000
"""Some tens of microseconds: longer than a phase is uneven, shorter than a lost time slice."""


@always_inline
def pause(spins: Int):
    """One turn of a spin loop: eases the core, and after a while lets other threads run."""
    if spins > SPINS_BEFORE_YIELD:
        _ = external_call["sched_yield", Int32]()
        return
    comptime if CompilationTarget.is_x86():
        llvm_intrinsic["llvm.x86.sse2.pause", NoneType]()


struct Phases(ImplicitlyCopyable):
    """Two counters per phase: chunks claimed, chunks done."""

    var counters: Pointer[Counter, MutUntrackedOrigin]
    var phase: Int

    def __init__(out self, phases: Int):
        self.phase = 0
        self.counters = unsafe_alloc[Counter](2 * LINE * phases)
        for i in range(2 * phases):
            self.counters.unsafe_offset(LINE * i).unsafe_write(Counter(0))

    def free(self):
        """Releases the counters, once, after all workers have returned."""
        self.counters.unsafe_free()

    @always_inline
    def run[Work: def(Int) -> None](mut self, chunks: Int, work: Work):
        """Takes part in the next phase: `work(chunk)` for the chunks that this worker claims."""
        ref claimed = self.counters.unsafe_offset(2 * LINE * self.phase)[]
        ref done = self.counters.unsafe_offset(2 * LINE * self.phase + LINE)[]
        var all = Int64(chunks)
        while True:
            var chunk = claimed.fetch_add(1)
            if chunk >= all:
                break
            work(Int(chunk))
            _ = done.fetch_add(1)
        var spins = 0
        while done.load() < all:
            pause(spins)
            spins += 1
        self.phase += 1


def in_one_phase[Work: def(Int) -> None](chunks: Int, team: Int, work: Work):
    """An op of a single phase: `work(chunk)` for each of `chunks`, by `team` workers at most."""
    var phases = Phases(1)

    def worker(index: Int) {var phases, var chunks, imm}:
        var phase = phases
        phase.run(chunks, work)

    sync_parallelize(worker, min(team, chunks))
    phases.free()


def team_size(limit: InputTensor[dtype=DType.int32, rank=1, ...]) -> Int:
    """Workers of one op: the thread pool's, as many as `limit[0]` allows.

    The pool has one for each CPU of the affinity mask. It does not know of a container's quota,
    beyond which spinning workers would only use up each other's time.
    """
    return max(1, min(parallelism_level(None), Int(limit.unsafe_ptr().unsafe_load())))
