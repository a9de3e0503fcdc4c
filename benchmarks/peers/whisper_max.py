"""openai-whisper patched by whisper_max, in the precision that the variant names."""

from __future__ import annotations

import json

import whisper_max
from whisper_max import report

from .interface import Setup
from .openai_whisper import OpenAIWhisper


class WhisperMax(OpenAIWhisper):
    """The same calls as the baseline's; patched before the model is loaded, as in a script."""

    def __init__(self, setup: Setup) -> None:
        whisper_max.patch(precision=setup.variant, compile="blocking")
        super().__init__(setup)

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
