"""The results as data: one JSON file for each machine, from which everything else is made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT = 2

NOT_OFFERED = "not offered"
"""How the reason of a peer begins that has no such operation; others begin with "failed"."""


@dataclass
class Measurement:
    """One peer in one scenario.

    model : of `models.SIZES`, with random weights, or of `models.WITH_WORDS`
    samples : seconds, one for each round; those of peers of one scenario pair up
    audio_seconds : of the audio that one sample is the time of, 0 for a part of a window's work
    tokens : how many one run produced, 0 where none are chosen
    identical : whether tokens and words were those of unpatched openai-whisper in every round;
        None where there are none to compare
    missing : why there are no samples
    remarks : what a reader must know
    """

    scenario: str
    model: str
    peer: str
    threads: int
    samples: list[float] = field(default_factory=list)
    audio_seconds: float = 0.0
    tokens: int = 0
    identical: bool | None = None
    missing: str = ""
    remarks: list[str] = field(default_factory=list)


@dataclass
class Start:
    """One peer in fresh processes, seconds and MiB; each list has one entry for each process.

    ready : from starting the process until the model is loaded
    first, second : the first window, and the next
    loaded_mib, peak_mib : the most memory held until then, and in the end
    """

    model: str
    peer: str
    ready: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    loaded_mib: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)
    missing: str = ""


@dataclass
class Overhead:
    """What a token costs outside of the graphs' execution.

    samples : seconds for each token, one for each window
    """

    model: str
    peer: str
    beams: int
    samples: list[float] = field(default_factory=list)
    missing: str = ""


@dataclass
class Accuracy:
    """One peer on the bundled recordings.

    word_errors : word error rate over all references, which have so many `words`
    identical : recordings with the tokens of unpatched openai-whisper, of `recordings`
    """

    peer: str
    beams: int
    word_errors: float = 0.0
    identical: int = 0
    recordings: int = 0
    words: int = 0
    missing: str = ""


@dataclass
class FirstRun:
    """A script that transcribes one recording after the other, plain and with patch() added.

    plain, patched : of each run, in turns: when each transcription was done, in seconds since the
        process was started; the last of `patched` goes on until some time after the change to MAX
    changed : the first transcription, by its place in that one, that ran on MAX altogether; -1 if
        there was none
    identical : whether all texts were the same
    sources : of whisper_max, where they are not those of the other results
    """

    model: str
    plain: list[list[float]]
    patched: list[list[float]]
    changed: int
    identical: bool
    sources: str = ""


@dataclass
class Results:
    """One run of the benchmarks on one machine.

    absent : why peers took no part, by name
    models : dimensions of the models measured, by name
    threads : how many every peer had, unless a measurement says otherwise
    ceilings : see `ceilings.measure`
    compile_seconds : by peer and model; models share the graphs of whisper_max
    minutes : how long measuring took
    """

    machine: dict[str, object]
    versions: dict[str, str]
    measured: str
    threads: int
    absent: dict[str, str] = field(default_factory=dict)
    models: dict[str, dict[str, int]] = field(default_factory=dict)
    ceilings: dict[str, float | None] = field(default_factory=dict)
    compile_seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    thread_scaling: list[Measurement] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    overheads: list[Overhead] = field(default_factory=list)
    accuracy: list[Accuracy] = field(default_factory=list)
    first_run: FirstRun | None = None
    minutes: float = 0.0
    format: int = FORMAT

    def find(self, scenario: str, model: str, peer: str) -> Measurement | None:
        """The measurement with samples, if there is one."""
        for one in self.measurements:
            if (one.scenario, one.model, one.peer) == (scenario, model, peer) and one.samples:
                return one
        return None

    def of_group(self, scenario: str, model: str) -> list[Measurement]:
        """All measurements that were taken in turns."""
        return [
            one for one in self.measurements if (one.scenario, one.model) == (scenario, model)
        ]


def save(results: DataclassInstance, path: Path) -> None:
    """Writes a results file, and the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(asdict(results), indent=1, ensure_ascii=False, default=_refuse)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(content + "\n", encoding="utf-8")
    unfinished.replace(path)


def load(path: Path) -> Results:
    """Reads a results file. Raises ValueError for a file of another format."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} has the format {content.get('format')!r}, expected {FORMAT}: measure again"
        )
    for name, cls in (
        ("measurements", Measurement),
        ("thread_scaling", Measurement),
        ("starts", Start),
        ("overheads", Overhead),
        ("accuracy", Accuracy),
    ):
        content[name] = [cls(**entry) for entry in content.get(name, ())]
    if content["first_run"] is not None:
        content["first_run"] = FirstRun(**content["first_run"])
    return Results(**content)


def load_all(folder: Path) -> dict[str, Results]:
    """Results by machine, in the order of their names."""
    return {path.stem: load(path) for path in sorted(folder.glob("*.json"))}


def _refuse(value: object) -> None:
    raise TypeError(f"{value!r} does not belong into results")
