"""openai-whisper as it is installed: the baseline, and the base of all that run through it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
import whisper
import whisper.decoding
import whisper.timing
from whisper.tokenizer import get_tokenizer

from ..inputs import END_OF_TEXT, LANGUAGE
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

WINDOW_SECONDS = 30.0
FRAMES = 3000


class OpenAIWhisper(Peer):
    """Float32, through upstream's own functions. Subclasses change how the model runs."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        torch.set_num_threads(setup.threads)
        self.model = whisper.load_model(str(setup.model.checkpoint), device="cpu")

    def arithmetic(self) -> contextlib.AbstractContextManager:
        """The context in which every operation runs."""
        return contextlib.nullcontext()

    def encoder(self) -> Operation:
        mels = self._mels()

        def run() -> Outcome:
            mel = mels.next()
            with torch.no_grad(), self.arithmetic(), Stopwatch() as watch:
                self.model.encoder(mel)
            return Outcome(watch.seconds)

        return run

    def step(self, rows: int) -> Operation:
        features = self._features().next()
        first = len(self.setup.history)
        last = first + UNTIMED_STEPS + STEPS
        # Which tokens follow does not matter to the time.
        following = [self.setup.history[-1]] * (last - first)
        tokens = torch.tensor([[*self.setup.history, *following]] * rows)

        def run() -> Outcome:
            with torch.no_grad(), self.arithmetic(), self._inference(first) as inference:
                inference.logits(tokens[:, :first], features)
                for count in range(first + 1, first + UNTIMED_STEPS + 1):
                    inference.logits(tokens[:, :count], features)
                with Stopwatch() as watch:
                    for count in range(first + UNTIMED_STEPS + 1, last + 1):
                        inference.logits(tokens[:, :count], features)
            return Outcome(watch.seconds / STEPS)

        return run

    def prefill(self) -> Operation:
        windows = self._features()
        tokens = torch.tensor([self.setup.prompt])

        def run() -> Outcome:
            features = windows.next()
            with torch.no_grad(), self.arithmetic():
                with self._inference(tokens.shape[1]) as inference, Stopwatch() as watch:
                    inference.logits(tokens, features)
            return Outcome(watch.seconds)

        return run

    def window(self, tokens: int, beams: int, words: bool) -> Operation:
        mels = self._mels()
        options = forced(tokens, beams)

        def run() -> Outcome:
            mel = mels.next()[0]
            timed = None
            with self.arithmetic(), Stopwatch() as watch:
                decoded = whisper.decode(self.model, mel, options).tokens
                if words:
                    timed = self._word_times(mel, decoded)
            return Outcome(watch.seconds, [decoded], words=timed)

        return run

    def speech(self, audio: str, beams: int, words: bool, retries: bool = True) -> Operation:
        variants = Alternating(self.setup.inputs.audio(audio))

        def run() -> Outcome:
            samples = variants.next()
            torch.manual_seed(0)  # for segments that upstream decodes again, by sampling
            with self.arithmetic(), Stopwatch() as watch:
                result = whisper.transcribe(
                    self.model,
                    samples,
                    beam_size=beams if beams > 1 else None,
                    word_timestamps=words,
                    fp16=False,
                    temperature=TEMPERATURES if retries else 0.0,
                )
            segments = result["segments"]
            return Outcome(
                watch.seconds,
                [segment["tokens"] for segment in segments],
                result["text"].strip(),
                _words(segments) if words else None,
            )

        return run

    @contextlib.contextmanager
    def _inference(self, prompt: int):
        # Looked up at each call: patching replaces it.
        inference = whisper.decoding.PyTorchInference(self.model, prompt)
        try:
            yield inference
        finally:
            inference.cleanup_caching()

    def _word_times(self, mel: torch.Tensor, tokens: list[int]) -> list[tuple[float, float, str]]:
        segment = {"seek": 0, "start": 0.0, "end": WINDOW_SECONDS, "tokens": tokens}
        whisper.timing.add_word_timestamps(
            segments=[segment],
            model=self.model,
            tokenizer=get_tokenizer(True, language=LANGUAGE, task="transcribe"),
            mel=mel,
            num_frames=FRAMES,
            last_speech_timestamp=0.0,
        )
        return _words([segment])

    def _mels(self) -> Alternating:
        mels = self.setup.inputs.mels(self.setup.model.n_mels)
        return Alternating([torch.from_numpy(mel)[None] for mel in mels])  # (1, n_mels, 3000)

    def _features(self) -> Alternating:
        mels = self._mels()
        with torch.no_grad(), self.arithmetic():
            return Alternating([self.model.encoder(mels.next()) for _ in range(2)])


def forced(tokens: int, beams: int, fp16: bool = False) -> whisper.DecodingOptions:
    """Options by which a window is decoded to exactly so many tokens."""
    return whisper.DecodingOptions(
        language=LANGUAGE,
        beam_size=beams if beams > 1 else None,
        sample_len=tokens,
        suppress_tokens=[-1, END_OF_TEXT],
        without_timestamps=True,
        fp16=fp16,
    )


def _words(segments: Iterable[dict]) -> list[tuple[float, float, str]]:
    return [
        (float(word["start"]), float(word["end"]), word["word"])
        for segment in segments
        for word in segment.get("words", ())
    ]
