"""Hugging Face transformers, in float32 with PyTorch's fused attention."""

from __future__ import annotations

import torch
import transformers
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ..inputs import LANGUAGE, SAMPLE_RATE
from .interface import (
    STEPS,
    TEMPERATURES,
    UNTIMED_STEPS,
    Alternating,
    NotOffered,
    Operation,
    Outcome,
    Peer,
    Setup,
    Stopwatch,
)

FRAMES = 3000

# What openai-whisper's transcribe() does unasked.
_LIKE_UPSTREAM = {
    "compression_ratio_threshold": 2.4,
    "logprob_threshold": -1.0,
    "no_speech_threshold": 0.6,
    "condition_on_prev_tokens": True,
}


class Transformers(Peer):
    """Through `generate`, with a dynamic cache."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        torch.set_num_threads(setup.threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        folder = setup.model.transformers
        self.model = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
        self.extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
        self.tokenizer = transformers.WhisperTokenizerFast.from_pretrained(folder)

    def encoder(self) -> Operation:
        mels = self._mels()

        def run() -> Outcome:
            mel = mels.next()
            with torch.no_grad(), Stopwatch() as watch:
                self.model.get_encoder()(mel)
            return Outcome(watch.seconds)

        return run

    def step(self, rows: int) -> Operation:
        features = self._features().next().repeat_interleave(rows, dim=0)  # as generate() does
        history = torch.tensor([self.setup.history] * rows)

        def run() -> Outcome:
            cache = _empty_cache()
            with torch.no_grad():
                self._decode(history, features, cache)
                for _ in range(UNTIMED_STEPS):
                    self._decode(history[:, -1:], features, cache)
                with Stopwatch() as watch:
                    for _ in range(STEPS):
                        self._decode(history[:, -1:], features, cache)
            return Outcome(watch.seconds / STEPS)

        return run

    def prefill(self) -> Operation:
        windows = self._features()
        tokens = torch.tensor([self.setup.prompt])

        def run() -> Outcome:
            features = windows.next()
            with torch.no_grad(), Stopwatch() as watch:
                self._decode(tokens, features, _empty_cache())
            return Outcome(watch.seconds)

        return run

    def window(self, tokens: int, beams: int, words: bool) -> Operation:
        if words:
            raise NotOffered("its word times come with other segments")
        mels = self._mels()

        def run() -> Outcome:
            mel = mels.next()
            with Stopwatch() as watch:
                decoded = self.model.generate(
                    mel,
                    language=LANGUAGE,
                    task="transcribe",
                    num_beams=beams,
                    do_sample=False,
                    min_new_tokens=tokens,
                    max_new_tokens=tokens,
                )
            return Outcome(watch.seconds, [decoded[0].tolist()])

        return run

    def speech(self, audio: str, beams: int, words: bool, retries: bool = True) -> Operation:
        if words:
            raise NotOffered("its word times come with other segments")
        variants = Alternating(self.setup.inputs.audio(audio))

        def run() -> Outcome:
            samples = variants.next()
            with Stopwatch() as watch:
                # Up to one window it wants exactly one, else all frames there are.
                long = len(samples) > SAMPLE_RATE * FRAMES // 100
                how = {"truncation": False, "padding": "longest"} if long else {}
                features = self.extractor(
                    samples,
                    sampling_rate=SAMPLE_RATE,
                    return_tensors="pt",
                    return_attention_mask=True,
                    **how,
                )
                decoded = self.model.generate(
                    **features,
                    task="transcribe",
                    num_beams=beams,
                    return_timestamps=True,
                    return_segments=True,
                    temperature=TEMPERATURES if retries else 0.0,
                    **_LIKE_UPSTREAM,
                )
                tokens = [segment["tokens"].tolist() for segment in decoded["segments"][0]]
                text = self.tokenizer.decode(sum(tokens, []), skip_special_tokens=True)
            return Outcome(watch.seconds, tokens, text.strip())

        return run

    def _decode(
        self, tokens: torch.Tensor, features: torch.Tensor, cache: EncoderDecoderCache
    ) -> torch.Tensor:
        hidden = self.model.model.decoder(
            input_ids=tokens,
            encoder_hidden_states=features,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self.model.proj_out(hidden)  # (rows, new tokens, n_vocab)

    def _mels(self) -> Alternating:
        mels = self.setup.inputs.mels(self.setup.model.n_mels)
        return Alternating([torch.from_numpy(mel)[None] for mel in mels])

    def _features(self) -> Alternating:
        mels = self._mels()
        encoder = self.model.get_encoder()
        with torch.no_grad():
            return Alternating([encoder(mels.next()).last_hidden_state for _ in range(2)])


def _empty_cache() -> EncoderDecoderCache:
    return EncoderDecoderCache(DynamicCache(), DynamicCache())
