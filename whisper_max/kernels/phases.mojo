"""A team of workers that walks through the phases of a network without being put to sleep.

A decoding step is some fifty short parallel loops. Handing each to the thread pool costs a
wake-up apiece, tens of microseconds each, as much as the work. Here the pool is entered once:
every worker claims chunks of the current phase and spins until the phase is complete. Chunks that
follow each other are one worker's, so that it reads weights as one long stream; who is done with
its own takes those that others have not begun. Whoever arrives late finds the chunks gone and goes
on; a single worker alone completes everything, so no schedule can deadlock.
"""

from std.atomic import Atomic
from std.math import align_up
from std.memory.alloc import unsafe_alloc
from std.ffi import external_call
from std.sys import CompilationTarget, llvm_intrinsic
from extensibility import InputTensor
from max.algorithm import sync_parallelize
from max.runtime.asyncrt import parallelism_level

comptime Counter = Atomic[Int32]
comptime LINE = 16
"""Counters per cache line: what several workers write stands alone on one, or they would fight for
it."""


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
    """For each phase how many chunks are done, and how many of each worker's share are claimed.

    Every worker goes through the phases with a copy of its own, see `of`.
    """

    var done: Pointer[Counter, MutUntrackedOrigin]
    """[phases, LINE]."""
    var claimed: Pointer[Counter, MutUntrackedOrigin]
    """[team, phases], filled up to whole lines: a worker's own stand together."""
    var stride: Int
    """From one worker's to the next one's."""
    var team: Int
    var worker: Int
    var phase: Int

    def __init__(out self, phases: Int, team: Int):
        self.stride = align_up(phases, LINE)
        self.team = team
        self.worker = 0
        self.phase = 0
        self.done = unsafe_alloc[Counter](LINE * phases + team * self.stride, alignment=64)
        self.claimed = self.done.unsafe_offset(LINE * phases)
        for i in range(phases):
            self.done.unsafe_offset(LINE * i).unsafe_write(Counter(0))
        for i in range(team * self.stride):
            self.claimed.unsafe_offset(i).unsafe_write(Counter(0))

    def of(self, worker: Int) -> Self:
        """The copy of one worker, of `team`."""
        var result = self
        result.worker = worker
        return result

    def free(self):
        """Releases the counters, once, after all workers have returned."""
        self.done.unsafe_free()

    @always_inline
    def run[Work: def(Int) -> None](mut self, chunks: Int, work: Work):
        """Takes part in the next phase: `work(chunk)` for the chunks that this worker claims."""
        ref done = self.done.unsafe_offset(LINE * self.phase)[]
        var finished = 0
        for turn in range(self.team):
            var share = (self.worker + turn) % self.team
            var begin = chunks * share // self.team
            var size = chunks * (share + 1) // self.team - begin
            ref claimed = self.claimed.unsafe_offset(share * self.stride + self.phase)[]
            # Looking before claiming leaves the line of a share that is gone where it is.
            while Int(claimed.load()) < size:
                var number = Int(claimed.fetch_add(1))
                if number >= size:
                    break
                work(begin + number)
                finished += 1
        if finished > 0:
            _ = done.fetch_add(Int32(finished))
        var spins = 0
        while Int(done.load()) < chunks:
            pause(spins)
            spins += 1
        self.phase += 1


def in_one_phase[Work: def(Int) -> None](chunks: Int, team: Int, work: Work):
    """An op of a single phase: `work(chunk)` for each of `chunks`, by `team` workers at most."""
    var workers = min(team, chunks)
    var phases = Phases(1, workers)

    def worker(index: Int) {var phases, var chunks, imm}:
        var phase = phases.of(index)
        phase.run(chunks, work)

    sync_parallelize(worker, workers)
    phases.free()


def team_size(limit: InputTensor[dtype=DType.int32, rank=1, ...]) -> Int:
    """Workers of one op: the thread pool's, as many as `limit[0]` allows.

    The pool has one for each CPU of the affinity mask. It does not know of a container's quota,
    beyond which spinning workers would only use up each other's time.
    """
    return max(1, min(parallelism_level(None), Int(limit.unsafe_ptr().unsafe_load())))
