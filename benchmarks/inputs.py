"""What every peer is given: windows, recordings and tokens, the same for all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .places import RECORDINGS
from .scenarios import LONG_SPEECH, SHORTER_SPEECH

SAMPLE_RATE = 16000
WINDOW = 30 * SAMPLE_RATE
VARIANTS = 2
"""How many there are of each window and recording. Peers take them in turn: a peer may remember
the last one it has met, as a script that transcribes a recording once never lets it."""

DELAY = SAMPLE_RATE // 50
"""Samples of silence before the second variant of a recording: 20 ms."""

SHORT_SPEECH = 40  # seconds, for quick runs

# Of the multilingual vocabularies. Behind the languages, from _ENGLISH on, comes the task.
LANGUAGE = "en"
END_OF_TEXT = 50257
_START, _ENGLISH = 50258, 50259
_TRANSCRIBE, _PREVIOUS, _NO_TIMESTAMPS = 1, 3, 5  # tokens behind the last language
PROMPT_TOKENS = 4
_TOKENS_IN = 100

FIRST_RUN = ("en02", "en03", "en04", "en05", "en06")
"""What the script of the first run transcribes, again and again."""

_LONG, _CLIP, _SILENCE = "en_long01", "en01", "silence01"


@dataclass(frozen=True)
class Inputs:
    """Inputs as files in the work folder: processes without openai-whisper read them too."""

    work: Path

    @property
    def folder(self) -> Path:
        """Of all inputs."""
        return self.work / "inputs"

    def prompt(self, languages: int) -> list[int]:
        """The tokens that a window without a past begins with.

        languages : how many the vocabulary has
        """
        behind = _ENGLISH + languages
        return [_START, _ENGLISH, behind + _TRANSCRIBE, behind + _NO_TIMESTAMPS]

    def history(self, languages: int) -> list[int]:
        """100 tokens: some of the window before, and the prompt."""
        past = np.random.default_rng(0).integers(1000, 50000, _TOKENS_IN - PROMPT_TOKENS - 1)
        before = _ENGLISH + languages + _PREVIOUS
        return [before, *past.tolist(), *self.prompt(languages)]

    def mels(self, n_mels: int) -> np.ndarray:
        """Log-mel spectrograms, shape = (2, n_mels, 3000), float32."""
        return np.load(self.folder / f"mel-{n_mels}.npy")

    def audio(self, name: str) -> list[np.ndarray]:
        """Both variants of a recording of `recordings`: samples at 16 kHz, (samples,), float32."""
        samples = np.load(self.folder / f"{name}.npy")
        return [samples, np.concatenate([np.zeros(DELAY, np.float32), samples])]

    @property
    def bundled(self) -> list[str]:
        """The names of the bundled recordings."""
        return list(references())

    def seconds(self, name: str) -> float:
        """Duration of a recording."""
        return len(self.audio(name)[0]) / SAMPLE_RATE


def references() -> dict[str, str | None]:
    """What is said in each bundled recording, by its name; None where that is not known."""
    known = json.loads((RECORDINGS / "references.json").read_text(encoding="utf-8"))
    names = sorted(path.name for path in RECORDINGS.glob("*.flac"))
    return {Path(name).stem: known[name]["text"] if name in known else None for name in names}


def prepare(inputs: Inputs, n_mels: int, say: Callable[[str], None]) -> None:
    """Writes the files that are missing. Needs openai-whisper and soundfile."""
    names = {f"mel-{n_mels}", *recordings({name: _nothing() for name in references()})}
    if all((inputs.folder / f"{name}.npy").exists() for name in names):
        return
    say("reading the bundled recordings")
    inputs.folder.mkdir(parents=True, exist_ok=True)
    bundled = {name: _read(RECORDINGS / f"{name}.flac") for name in references()}
    for name, samples in recordings(bundled).items():
        np.save(inputs.folder / f"{name}.npy", samples)
    np.save(inputs.folder / f"mel-{n_mels}.npy", _mels(bundled[_LONG], n_mels))


def recordings(bundled: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The bundled recordings, and those made of them: by name, shape = (samples,) each."""
    spoken = [samples for name, samples in sorted(bundled.items()) if name.startswith("en")]
    return {
        **bundled,
        "clip": bundled[_CLIP],
        "silence": bundled[_SILENCE],
        "speech": np.resize(np.concatenate(spoken), LONG_SPEECH * SAMPLE_RATE),
        "shorter_speech": np.resize(np.concatenate(spoken), SHORTER_SPEECH * SAMPLE_RATE),
        "short_speech": np.resize(np.concatenate(spoken), SHORT_SPEECH * SAMPLE_RATE),
    }


def _nothing() -> np.ndarray:
    return np.zeros(1, np.float32)


def _read(path: Path) -> np.ndarray:
    import soundfile

    samples, rate = soundfile.read(path, dtype="float32")
    if rate != SAMPLE_RATE or samples.ndim != 1:
        raise ValueError(f"{path} has {rate} Hz, shape {samples.shape}; expected 16000 Hz, mono")
    return samples


def _mels(samples: np.ndarray, n_mels: int) -> np.ndarray:
    from whisper.audio import log_mel_spectrogram

    windows = [samples[i * WINDOW : (i + 1) * WINDOW] for i in range(VARIANTS)]
    return np.stack([log_mel_spectrogram(window, n_mels).numpy() for window in windows])
