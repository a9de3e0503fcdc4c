"""Peers that are loaded together and take turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from .inputs import Inputs
from .interleaving import interleave
from .peers import BASELINE, Entry
from .peers.interface import NotOffered, Outcome
from .results import NOT_OFFERED, Measurement
from .scenarios import Scenario
from .worker_process import PeerFailed, WorkerProcess

Member = tuple[str, int]
"""A peer's name and its number of threads."""

WORD_TOLERANCE = 0.02
"""Seconds by which word times may differ and count as the same: one audio frame."""


class Party:
    """A context in which the peers' processes live, each with the same model.

    members : peers and how many threads each has
    work : folder of models and inputs
    say : is told what happens
    """

    def __init__(
        self,
        members: Iterable[tuple[Entry, int]],
        model: str,
        work: Path,
        say: Callable[[str], None],
    ) -> None:
        self.model = model
        self.inputs = Inputs(work)
        self.workers: dict[Member, WorkerProcess] = {}
        self.failed: dict[Member, str] = {}
        self._members = list(members)
        self._say = say

    def __enter__(self) -> Party:
        for entry, threads in self._members:
            self._say(f"loading {entry.label}, {self.model}, {threads} threads")
            member = (entry.name, threads)
            try:
                self.workers[member] = WorkerProcess(entry, self.model, threads, self.inputs.work)
            except PeerFailed as failed:
                self._fail(member, str(failed))
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def measure(self, scenario: Scenario) -> list[Measurement]:
        """All members in turns; one measurement for each, in the members' order."""
        self._say(f"{scenario.title}, {self.model}")
        missing = dict(self.failed)
        ready: dict[Member, WorkerProcess] = {}
        for member, worker in self.workers.items():
            try:
                worker.prepare(scenario)
                ready[member] = worker
            except NotOffered as reason:
                missing[member] = f"{NOT_OFFERED}: {reason}"
            except PeerFailed as failed:
                missing[member] = self._fail(member, str(failed))
        outcomes, failures = interleave(
            {member: worker.run for member, worker in ready.items()},
            scenario.rounds,
            scenario.seconds,
        )
        for member, why in failures.items():
            missing[member] = self._fail(member, why)

        measurements = []
        for entry, threads in self._members:
            member = (entry.name, threads)
            one = Measurement(scenario.name, self.model, *member)
            one.audio_seconds = self._audio_seconds(scenario)
            if member in outcomes:
                baseline = outcomes.get((BASELINE, threads))
                fill(one, outcomes[member], baseline, scenario.forced_tokens)
                one.remarks = self.workers[member].usage()["remarks"]
            else:
                one.missing = missing[member]
            measurements.append(one)
        return measurements

    def compile_seconds(self) -> dict[str, float]:
        """How long compiling took, by peer, of those that compile."""
        seconds = {
            name: worker.usage()["compile_seconds"] for (name, _), worker in self.workers.items()
        }
        return {name: value for name, value in seconds.items() if value is not None}

    def _fail(self, member: Member, why: str) -> str:
        self.failed[member] = f"failed: {why}"
        self._say(f"{member[0]} {self.failed[member]}")
        worker = self.workers.pop(member, None)
        if worker is not None:
            worker.close()
        return self.failed[member]

    def _audio_seconds(self, scenario: Scenario) -> float:
        if scenario.operation == "window":
            return 30.0
        if scenario.operation == "speech":
            return self.inputs.seconds(str(scenario.arguments["audio"]))
        if scenario.operation == "recordings":
            return sum(map(self.inputs.seconds, self.inputs.bundled))
        return 0.0


def fill(
    measurement: Measurement,
    outcomes: list[Outcome],
    baseline: list[Outcome] | None,
    forced_tokens: int,
) -> None:
    """Writes outcomes into a measurement, or why they do not count.

    baseline : the outcomes of unpatched openai-whisper in the same rounds, if it took part
    forced_tokens : what each outcome must have, 0 for any number
    """
    counts = [sum(len(tokens) for tokens in outcome.tokens) for outcome in outcomes]
    wrong = sorted({count for count in counts if forced_tokens and count != forced_tokens})
    if wrong:
        decoded = ", ".join(map(str, wrong))
        measurement.missing = f"failed: it decoded {decoded} tokens in place of {forced_tokens}"
        return
    measurement.samples = [round(outcome.seconds, 7) for outcome in outcomes]
    measurement.tokens = round(sum(counts) / len(counts))
    if baseline is not None and measurement.audio_seconds:
        measurement.identical = all(map(same_result, outcomes, baseline))


def same_result(outcome: Outcome, expected: Outcome) -> bool:
    """Whether tokens are the same, and words and their times within `WORD_TOLERANCE`."""
    if outcome.tokens != expected.tokens:
        return False
    if outcome.words is None or expected.words is None:
        return True
    return len(outcome.words) == len(expected.words) and all(
        word == other and max(abs(start - first), abs(end - last)) <= WORD_TOLERANCE + 1e-6
        for (start, end, word), (first, last, other) in zip(outcome.words, expected.words)
    )
