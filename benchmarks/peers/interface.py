"""What a peer is: one way of running Whisper, loaded in a process of its own.

A method of `Peer` prepares one operation and returns it as a function to be called again and
again. What is timed is said in the method's docstring; preparing and checking are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..inputs import Inputs
from ..models import Model

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""What openai-whisper goes through unasked, until a window's text is probable."""

STEPS = 10
"""Decoder steps that are timed together; a time is their mean."""

UNTIMED_STEPS = 2


class NotOffered(Exception):
    """The peer has no such operation; the message says why."""


@dataclass
class Outcome:
    """One run of an operation.

    seconds : of what the operation is about
    tokens : what was decoded, one list for each segment or window
    text : what was said
    words : start, end (seconds) and word, of all segments; None where there are none to compare
    """

    seconds: float
    tokens: list[list[int]] = field(default_factory=list)
    text: str = ""
    words: list[tuple[float, float, str]] | None = None


Operation = Callable[[], Outcome]


@dataclass(frozen=True)
class Setup:
    """What a peer is made from.

    variant : which of the peer's ways, such as a precision; "" where there is one only
    """

    model: Model
    inputs: Inputs
    threads: int
    variant: str

    @property
    def prompt(self) -> list[int]:
        """The tokens that a window without a past begins with."""
        return self.inputs.prompt(self.model.languages)

    @property
    def history(self) -> list[int]:
        """100 tokens: some of the window before, and the prompt."""
        return self.inputs.history(self.model.languages)


class Peer:
    """A model, loaded, and its operations. What a peer does not override it does not offer."""

    def __init__(self, setup: Setup) -> None:
        """Loads the model. Windows alternate, so that no peer meets the same one twice in a row."""
        self.setup = setup

    def encoder(self) -> Operation:
        """Times encoding one window's mel spectrogram, shape = (1, n_mels, 3000)."""
        raise NotOffered("it has no encoder of its own")

    def step(self, rows: int) -> Operation:
        """Times one decoder step behind `Setup.history`, logits of `rows` sequences included."""
        raise NotOffered("it does not decode by itself")

    def prefill(self) -> Operation:
        """Times cross-attention keys and values and the first tokens, `Setup.prompt`."""
        raise NotOffered("it does not decode by itself")

    def window(self, tokens: int, beams: int, words: bool) -> Operation:
        """Times encoding and decoding one window to exactly `tokens` tokens.

        beams : 1 for greedy decoding
        words : with word timestamps
        """
        raise NotOffered("it does not decode by itself")

    def speech(self, audio: str, beams: int, words: bool, retries: bool = True) -> Operation:
        """Times transcribing a recording of `inputs`, mel spectrogram and language included.

        retries : at higher temperatures, where a window's text is improbable; the draws, and with
            them the work, are each engine's own
        """
        raise NotOffered("it does not transcribe by itself")

    def recordings(self, beams: int) -> Operation:
        """Times transcribing the bundled recordings, one call of `speech` for each."""
        calls = [self.speech(name, beams, words=False) for name in self.setup.inputs.bundled]

        def run() -> Outcome:
            outcomes = [call() for call in calls]
            return Outcome(
                sum(outcome.seconds for outcome in outcomes),
                [tokens for outcome in outcomes for tokens in outcome.tokens],
                "\n".join(outcome.text for outcome in outcomes),
            )

        return run

    def overhead(self, tokens: int, beams: int) -> Operation:
        """Times what a token of a window costs outside of MAX, when its features are there."""
        raise NotOffered("it does not run on MAX")

    def compile_seconds(self) -> float | None:
        """How long compiling took when it was done, None for a peer that does not compile."""
        return None

    def remarks(self) -> list[str]:
        """What a reader of the figures must know about the last runs."""
        return []


class Alternating:
    """Gives its items in turn, for ever."""

    def __init__(self, items: Sequence) -> None:
        self._items = items
        self._calls = 0

    def next(self):
        """The next one."""
        item = self._items[self._calls % len(self._items)]
        self._calls += 1
        return item


class Stopwatch:
    """Seconds between entering and leaving its block."""

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.perf_counter() - self._begin
