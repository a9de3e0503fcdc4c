"""faster-whisper, on CTranslate2, in the compute type that the variant names."""

from __future__ import annotations

import ctranslate2
import faster_whisper

from ..inputs import END_OF_TEXT
from .interface import (
    STEPS,
    TEMPERATURES,
    UNTIMED_STEPS,
    Alternating,
    Operation,
    Outcome,
    Peer,
    Setup,
    Stopwatch,
)

FRAMES = 3000


class FasterWhisper(Peer):
    """Components through CTranslate2's own model, speech through faster-whisper."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.whisper = faster_whisper.WhisperModel(
            str(setup.model.ctranslate2),
            device="cpu",
            compute_type=setup.variant,
            cpu_threads=setup.threads,
            local_files_only=True,
        )
        self.model = self.whisper.model

    def encoder(self) -> Operation:
        mels = self._mels()

        def run() -> Outcome:
            mel = mels.next()
            with Stopwatch() as watch:
                self.model.encode(mel, to_cpu=False)
            return Outcome(watch.seconds)

        return run

    def step(self, rows: int) -> Operation:
        """As the others', but the choice of tokens is included: CTranslate2 offers no single step.

        The time is the difference between decoding more tokens and decoding few of them.
        """
        features = self.model.encode(self._mels().next(), to_cpu=False)
        history = self.setup.history

        def seconds(tokens: int) -> float:
            with Stopwatch() as watch:
                self._generate(features, history, tokens, rows)
            return watch.seconds

        def run() -> Outcome:
            few = seconds(UNTIMED_STEPS)
            return Outcome((seconds(UNTIMED_STEPS + STEPS) - few) / STEPS)

        return run

    def prefill(self) -> Operation:
        """As the others', but the choice of one token is included."""
        mels = self._mels()
        windows = Alternating([self.model.encode(mels.next(), to_cpu=False) for _ in range(2)])

        def run() -> Outcome:
            features = windows.next()
            with Stopwatch() as watch:
                self._generate(features, self.setup.prompt, 1, 1)
            return Outcome(watch.seconds)

        return run

    def window(self, tokens: int, beams: int, words: bool) -> Operation:
        mels = self._mels()
        prompt = self.setup.prompt

        def run() -> Outcome:
            mel = mels.next()
            with Stopwatch() as watch:
                features = self.model.encode(mel, to_cpu=False)
                decoded = self._generate(features, prompt, tokens, beams)
                if words:
                    self.model.align(features, prompt[:-1], [decoded], [FRAMES])
            return Outcome(watch.seconds, [decoded])

        return run

    def speech(self, audio: str, beams: int, words: bool, retries: bool = True) -> Operation:
        variants = Alternating(self.setup.inputs.audio(audio))

        def run() -> Outcome:
            samples = variants.next()
            with Stopwatch() as watch:
                segments, _ = self.whisper.transcribe(
                    samples,
                    beam_size=beams,
                    word_timestamps=words,
                    temperature=TEMPERATURES if retries else 0.0,
                )
                segments = list(segments)  # decoding happens as they are taken
            return Outcome(
                watch.seconds,
                [segment.tokens for segment in segments],
                "".join(segment.text for segment in segments).strip(),
                _words(segments) if words else None,
            )

        return run

    def _generate(
        self, features: ctranslate2.StorageView, prompt: list[int], tokens: int, beams: int
    ) -> list[int]:
        # CTranslate2 decodes at most half of max_length, and at most up to it.
        limit = max(2 * tokens, tokens + len(prompt))
        result = self.model.generate(
            features,
            [prompt],
            beam_size=beams,
            max_length=limit,
            suppress_blank=False,
            suppress_tokens=[-1, END_OF_TEXT],
        )
        return list(result[0].sequences_ids[0])

    def _mels(self) -> Alternating:
        mels = self.setup.inputs.mels(self.setup.model.n_mels)
        views = [ctranslate2.StorageView.from_array(mel[None].copy()) for mel in mels]
        return Alternating(views)


def _words(segments: list[faster_whisper.transcribe.Segment]) -> list[tuple[float, float, str]]:
    return [
        (float(word.start), float(word.end), word.word)
        for segment in segments
        for word in segment.words
    ]
