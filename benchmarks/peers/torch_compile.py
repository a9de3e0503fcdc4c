"""openai-whisper with its encoder and decoder under torch.compile."""

from __future__ import annotations

import json
import os

from .interface import NotOffered, Operation, Setup, Stopwatch
from .openai_whisper import OpenAIWhisper

_ANEW = "it would compile anew, for minutes"


class TorchCompile(OpenAIWhisper):
    """Compiled when it is loaded, or taken from the folder of an earlier run."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        folder = setup.model.torch_compile
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
        self.model.encoder.compile()
        # The token axis grows with every step: one graph for all lengths.
        self.model.decoder.compile(dynamic=True)
        with Stopwatch() as watch:
            for operation in (self.encoder(), self.step(1), self.prefill()):
                operation()
        if not setup.model.compile_note.exists():
            setup.model.compile_note.write_text(json.dumps(round(watch.seconds, 1)))

    def step(self, rows: int) -> Operation:
        if rows > 1:
            raise NotOffered(f"more than one row: {_ANEW}")
        return super().step(rows)

    def window(self, tokens: int, beams: int, words: bool) -> Operation:
        if beams > 1 or words:
            raise NotOffered(f"more than one row, or other attention: {_ANEW}")
        return super().window(tokens, beams, words)

    def compile_seconds(self) -> float | None:
        return json.loads(self.setup.model.compile_note.read_text())
