"""One run of the benchmarks: everything that was asked for, in order, into one `Results`."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from whisper_max.runtime.hardware import cpu_flags
from whisper_max.runtime.limits import threads as available_threads

from . import machine
from .accuracy import measure_accuracy
from .first_run import measure_first_run
from .fresh_starts import first_window, measure_starts
from .models import TRAINED, WITH_WORDS, Model
from .overhead import measure_overhead
from .party import Party
from .peers import BASELINE, PEERS, Entry
from .places import ROOT
from .preparation import prepare
from .results import Measurement, Results
from .scenarios import FURTHER, SCENARIO, SCENARIOS, Scenario, shortened
from .worker_process import PeerFailed, environment

# What shows how peers scale with threads, and which peers do.
SCALING_SCENARIOS = ("encoder", "step", "window")
SCALING_PEERS = (BASELINE, "whisper_max-high", "faster-whisper-fp32")
SCALING_ROUNDS = 5

START_ROUNDS = 5
OVERHEAD_ROUNDS = 10
FIRST_RUN_ROUNDS = 4
FIRST_RUN_TRANSCRIPTIONS = 60
QUICK_TRANSCRIPTIONS = 5
QUICK_RECORDINGS = ["en01", "silence01"]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    scenarios : names, of `scenarios.NAMES`
    models : sizes, of `models.SIZES`
    peers : names, of `peers.PEER`
    threads : for every peer, as far as the machine has so many CPUs
    repeats : rounds, where not the scenario's own
    quick : to see that everything works; the figures mean nothing
    work : folder of weights, conversions and logs
    """

    scenarios: tuple[str, ...]
    models: tuple[str, ...]
    peers: tuple[str, ...]
    threads: int
    repeats: int | None
    quick: bool
    work: Path

    def entries(self) -> list[Entry]:
        """The peers, in the order in which they take their turns."""
        return [entry for entry in PEERS if entry.name in self.peers]

    def sized(self) -> list[Scenario]:
        """The scenarios with random weights."""
        return self.of_model(None)

    def of_model(self, model: str | None) -> list[Scenario]:
        """The scenarios with a model that transcribes; those of None have random weights."""
        return [
            shortened(scenario, self.repeats, self.quick)
            for scenario in SCENARIOS
            if scenario.name in self.scenarios and scenario.model == model
        ]


def begin(plan: Plan) -> Results:
    """Results in which nothing is measured yet."""
    return Results(
        machine=machine.describe(),
        versions=machine.versions(),
        measured=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        threads=min(plan.threads, available_threads()),
    )


def run(
    plan: Plan, results: Results, say: Callable[[str], None], keep: Callable[[], None]
) -> None:
    """Prepares what is missing, and measures.

    results : is filled
    say : is told what happens
    keep : is called whenever a part is done, so that a run that is stopped leaves what it has
    """
    present, results.absent = attendance(plan.entries())
    for name, why in results.absent.items():
        say(f"{name} is absent: {why}")
    prepare(plan.models, present, results.threads, plan.work, say)
    start = time.monotonic()
    if (results.machine["busy_cpus"] or 0) > machine.BUSY:
        say(machine.WARNING)
    results.ceilings = _ceilings(results.threads)
    for _ in _parts(plan, present, results, say):
        results.minutes = round((time.monotonic() - start) / 60, 1)
        keep()


def _parts(
    plan: Plan, present: list[Entry], results: Results, say: Callable[[str], None]
) -> Iterator[None]:
    """Measures, and pauses after each part."""
    for model in plan.models:
        results.models[model] = Model(model, plan.work).dimensions()
        yield _measure_sized(plan, model, present, results, say)
    for model in WITH_WORDS:
        yield _measure_with_words(plan, model, present, results, say)
    if "threads" in plan.scenarios:
        results.thread_scaling = _scaling(plan, present, say)
        yield
    if "first_run" in plan.scenarios:
        yield _measure_first_run(plan, results, say)


def attendance(entries: Iterable[Entry]) -> tuple[list[Entry], dict[str, str]]:
    """Who can take part, and why the others cannot."""
    flags = cpu_flags()
    reasons = {entry: entry.why_absent(flags) for entry in entries}
    present = [entry for entry, why in reasons.items() if not why]
    return present, {entry.name: why for entry, why in reasons.items() if why}


def _measure_sized(
    plan: Plan, model: str, present: list[Entry], results: Results, say: Callable[[str], None]
) -> None:
    if plan.sized() or "overhead" in plan.scenarios:
        members = [(entry, results.threads) for entry in present]
        with Party(members, model, plan.work, say) as party:
            for name, seconds in party.compile_seconds().items():
                results.compile_seconds.setdefault(name, {})[model] = seconds
            for scenario in plan.sized():
                results.measurements += party.measure(scenario)
            if "overhead" in plan.scenarios:
                say(f"{FURTHER['overhead']}, {model}")
                rounds = 2 if plan.quick else plan.repeats or OVERHEAD_ROUNDS
                results.overheads += measure_overhead(party, rounds)
    if "start" in plan.scenarios and model == plan.models[-1]:
        rounds = 1 if plan.quick else plan.repeats or START_ROUNDS
        window = shortened(first_window(), None, plan.quick)
        results.starts += measure_starts(
            present, model, results.threads, plan.work, rounds, window, say
        )


def _measure_with_words(
    plan: Plan, model: str, present: list[Entry], results: Results, say: Callable[[str], None]
) -> None:
    scenarios = plan.of_model(model)
    count_words = model == TRAINED and "accuracy" in plan.scenarios
    if not scenarios and not count_words:
        return
    members = [(entry, results.threads) for entry in present if not entry.compiles_long]
    with Party(members, model, plan.work, say) as party:
        if count_words:
            say("word error rates")
            results.accuracy = measure_accuracy(party, QUICK_RECORDINGS if plan.quick else None)
        for scenario in scenarios:
            results.measurements += party.measure(scenario)


def _scaling(
    plan: Plan, present: list[Entry], say: Callable[[str], None]
) -> list[Measurement]:
    """With 1, 2, 4, … threads, all in the same turns."""
    most = available_threads()
    counts = [1 << power for power in range(most.bit_length()) if 1 << power <= most]
    entries = [entry for entry in present if entry.name in SCALING_PEERS]
    members = [(entry, count) for entry in entries for count in counts]
    with Party(members, plan.models[0], plan.work, say) as party:
        return [
            measurement
            for name in SCALING_SCENARIOS
            for measurement in party.measure(
                shortened(SCENARIO[name], plan.repeats or SCALING_ROUNDS, plan.quick)
            )
        ]


def _measure_first_run(plan: Plan, results: Results, say: Callable[[str], None]) -> None:
    count = QUICK_TRANSCRIPTIONS if plan.quick else FIRST_RUN_TRANSCRIPTIONS
    rounds = 1 if plan.quick else FIRST_RUN_ROUNDS
    try:
        results.first_run = measure_first_run(
            TRAINED, results.threads, plan.work, count, rounds, say
        )
    except PeerFailed as failed:
        say(f"first run: {failed}")


def _ceilings(threads: int) -> dict[str, float | None]:
    """In a process of its own, whose thread pool is gone afterwards."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ceilings", str(threads)],
        cwd=ROOT,
        env=environment(threads),
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)
