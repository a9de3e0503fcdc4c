"""What is measured: the scenarios as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from .models import GROWN, TRAINED

FORCED_TOKENS = 100
LONG_SPEECH = 600
"""Seconds of the long recording: the bundled ones, repeated."""

SHORTER_SPEECH = 60
"""Seconds of what the grown model transcribes, which takes longer."""


@dataclass(frozen=True)
class Scenario:
    """One thing to do, for every peer.

    operation : the method of `peers.interface.Peer` that prepares it
    arguments : of that method
    warm_up : arguments that differ in the first runs, which are not measured; None for no such runs
    model : the one of `models.WITH_WORDS` that transcribes; None for random weights of each size
    rounds : how many times each peer takes its turn
    seconds : no further round starts after this long, once there were three
    """

    name: str
    title: str
    operation: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    warm_up: Mapping[str, object] | None = field(default_factory=dict)
    model: str | None = None
    rounds: int = 10
    seconds: float = 30.0

    @property
    def forced_tokens(self) -> int:
        """How many tokens every peer must produce, 0 where it is theirs to say."""
        return int(self.arguments.get("tokens", 0))


def _part(name: str, title: str, operation: str, **arguments: int) -> Scenario:
    """A part of a window, of which every round counts."""
    return Scenario(name, title, operation, arguments, seconds=300.0)


def _window(name: str, title: str, beams: int, words: bool, seconds: float) -> Scenario:
    arguments = {"tokens": FORCED_TOKENS, "beams": beams, "words": words}
    return Scenario(name, title, "window", arguments, warm_up={"tokens": 4}, seconds=seconds)


def _speech(
    name: str, title: str, model: str, audio: str, words: bool = False, **limits: float
) -> Scenario:
    # Without retries at higher temperatures: how many there are is chance, and each engine's own.
    retries = audio in ("clip", "silence")
    arguments = {"audio": audio, "beams": 1, "words": words, "retries": retries}
    return Scenario(
        name, title, "speech", arguments, warm_up={"audio": "clip"}, model=model, **limits
    )


_FEW = {"rounds": 5, "seconds": 20.0}

SCENARIOS = (
    _part("encoder", "encoder, 30 s window", "encoder"),
    _part("step", "decoder step, 100 tokens in", "step", rows=1),
    _part("step_beam5", "decoder step, 5 beams, 100 tokens in", "step", rows=5),
    _part("prefill", "cross keys and values, and prefill", "prefill"),
    _window("window", f"30 s window, {FORCED_TOKENS} tokens, greedy", 1, False, 20.0),
    _window("window_beam5", f"30 s window, {FORCED_TOKENS} tokens, beam 5", 5, False, 20.0),
    _window("window_words", f"30 s window, {FORCED_TOKENS} tokens, word times", 1, True, 15.0),
    _speech("clip", "a clip of 3 s, end to end", TRAINED, "clip", seconds=10.0),
    _speech("silence", "8 s of silence, end to end", TRAINED, "silence", seconds=10.0),
    Scenario(
        "recordings",
        "the bundled recordings, one by one",
        "recordings",
        {"beams": 1},
        model=TRAINED,
        rounds=5,
        seconds=20.0,
    ),
    _speech("speech", "10 minutes of speech, end to end", TRAINED, "speech", **_FEW),
    _speech("speech_words", "10 minutes of speech, word times", TRAINED, "speech", True, **_FEW),
    _speech("grown_clip", "a clip of 3 s, end to end", GROWN, "clip", seconds=10.0),
    _speech("grown_speech", "1 minute of speech, end to end", GROWN, "shorter_speech", **_FEW),
    _speech(
        "grown_words", "1 minute of speech, word times", GROWN, "shorter_speech", True, **_FEW
    ),
)
SCENARIO = MappingProxyType({scenario.name: scenario for scenario in SCENARIOS})

FURTHER = MappingProxyType(
    {
        "start": "a fresh process: imports, loading, the first window, peak memory",
        "overhead": "what a token costs outside of MAX",
        "threads": "the encoder, a step and a window, with 1 thread and more",
        "accuracy": "word error rates and tokens on the bundled recordings",
        "first_run": "the first run of a script, with graphs compiled beside it",
    }
)
"""Scenarios that are measured in their own ways."""

NAMES = (*SCENARIO, *FURTHER)


def shortened(scenario: Scenario, repeats: int | None, quick: bool) -> Scenario:
    """With another number of rounds; `quick` also makes each of them short."""
    if quick:
        arguments = dict(scenario.arguments)
        if "tokens" in arguments:
            arguments["tokens"] = 8
        if "speech" in arguments.get("audio", ""):
            arguments["audio"] = "short_speech"
        scenario = replace(scenario, arguments=arguments, rounds=2, seconds=0.0)
    return scenario if repeats is None else replace(scenario, rounds=repeats)
