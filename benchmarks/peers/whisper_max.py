"""openai-whisper patched by whisper_max, in the precision that the variant names."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator

import whisper
import whisper_max
from whisper_max import report

from .interface import Operation, Outcome, Setup, Stopwatch
from .openai_whisper import OpenAIWhisper, forced


class WhisperMax(OpenAIWhisper):
    """The same calls as the baseline's; patched before the model is loaded, as in a script."""

    def __init__(self, setup: Setup) -> None:
        whisper_max.patch(precision=setup.variant, compile="blocking")
        super().__init__(setup)

    def overhead(self, tokens: int, beams: int) -> Operation:
        """All but the execution of graphs: of prompt, session and steps, for each token."""
        features = self._features()
        options = forced(tokens, beams)

        def run() -> Outcome:
            window = features.next()[0]
            with executions() as seconds, Stopwatch() as watch:
                decoded = whisper.decode(self.model, window, options).tokens
            return Outcome((watch.seconds - sum(seconds)) / tokens, [decoded])

        return run

    def compile_seconds(self) -> float | None:
        """Of the graphs in the cache, as recorded when they were compiled."""
        (graphs,) = whisper_max.compile(precision=self.setup.variant, progress=False)
        record = json.loads(graphs.with_suffix(".json").read_text(encoding="utf-8"))
        return record["compile_seconds"]

    def remarks(self) -> list[str]:
        """What PyTorch did in place of MAX since this was asked last, and why."""
        remarks = [
            f"{target} on PyTorch: {reason}"
            for target, counted in whisper_max.status().targets.items()
            for reason in counted.reasons
        ]
        report.reset()
        return remarks


@contextlib.contextmanager
def executions() -> Iterator[list[float]]:
    """How long each execution of a graph takes, inside the block."""
    from whisper_max.runtime.engine import Engine

    seconds: list[float] = []
    execute = Engine.execute

    def timed(engine: Engine, *call: object) -> object:
        begin = time.perf_counter()
        try:
            return execute(engine, *call)
        finally:
            seconds.append(time.perf_counter() - begin)

    Engine.execute = timed
    try:
        yield seconds
    finally:
        Engine.execute = execute
