"""The demonstration: a bundled recording, transcribed by plain whisper and then patched.

    python -m whisper_max.demo

It shows both texts, whether they are identical, how long each took, and what ran where. The
checkpoint and the recording are bundled, so nothing is downloaded and ffmpeg is not needed.
"""

from __future__ import annotations

import statistics
import sys
import time
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import whisper

import whisper_max

DATA = Path(__file__).with_name("data")
CHECKPOINT = DATA / "micro.pt"
RECORDING = DATA / "en04.wav"
REPETITIONS = 3


@dataclass(frozen=True)
class Transcription:
    """What one way of running whisper made of the recording, and how long it took.

    text : the text of the last run
    tokens : its tokens, segment by segment
    first_seconds : the first run, with everything that happens once, compilation included
    later_seconds : median of the runs after it
    """

    text: str
    tokens: list[list[int]]
    first_seconds: float
    later_seconds: float


def main() -> int:
    """Run the demonstration; return the exit code, 1 when the two texts or tokens differ."""
    audio = read_wav(RECORDING)
    duration = len(audio) / whisper.audio.SAMPLE_RATE
    print(f"{RECORDING.name}, {duration:.1f} s of speech, checkpoint {CHECKPOINT.name}")

    plain = transcribe(audio)
    print(f"\nplain whisper: {plain.text}", flush=True)

    whisper_max.patch(compile="blocking")
    try:
        patched = transcribe(audio)
        status = whisper_max.status()  # before unpatch(), which would show as "not patched"
    finally:
        whisper_max.unpatch()
    print(f"patched:       {patched.text}")

    identical = (plain.text, plain.tokens) == (patched.text, patched.tokens)
    print(f"\nidentical: {'yes' if identical else 'no'}\n")
    print(timing_table({"plain whisper": plain, "patched": patched}, duration))

    print(f"\n{status}")
    if not any(target.max_calls for target in status.targets.values()):
        print("\nNothing ran on MAX; the table says why.")
    return 0 if identical else 1


def read_wav(path: Path) -> np.ndarray:
    """Samples of a 16-bit mono recording at whisper's sampling rate, as whisper.load_audio
    would give them.

    Returns an array, shape = (samples,), float32 in [-1, 1). Raises ValueError for any other
    kind of WAV file.
    """
    with wave.open(str(path)) as recording:
        form = (recording.getnchannels(), recording.getsampwidth(), recording.getframerate())
        if form != (1, 2, whisper.audio.SAMPLE_RATE):
            raise ValueError(
                f"{path} has (channels, bytes per sample, rate) {form}; "
                f"convert it to {(1, 2, whisper.audio.SAMPLE_RATE)}"
            )
        samples = recording.readframes(recording.getnframes())
    return np.frombuffer(samples, dtype="<i2").astype(np.float32) / 32768


def transcribe(audio: np.ndarray) -> Transcription:
    """Load the checkpoint and transcribe `audio`, shape = (samples,), as a script would."""
    # Loaded anew each time: a script that patches first finds whisper's classes replaced.
    model = whisper.load_model(str(CHECKPOINT), device="cpu")
    seconds = []
    for _ in range(1 + REPETITIONS):
        start = time.perf_counter()
        result = model.transcribe(audio, fp16=False)
        seconds.append(time.perf_counter() - start)
    return Transcription(
        text=result["text"].strip(),
        tokens=[segment["tokens"] for segment in result["segments"]],
        first_seconds=seconds[0],
        later_seconds=statistics.median(seconds[1:]),
    )


def timing_table(transcriptions: dict[str, Transcription], duration: float) -> str:
    """Both times of each way, and its real-time factor: seconds spent per second of audio.

    duration : seconds of audio
    """
    row = "{:<14} {:>10} {:>10} {:>17}".format
    lines = [row("", "first run", "later runs", "real-time factor")]
    for name, result in transcriptions.items():
        lines.append(
            row(
                name,
                f"{result.first_seconds:.2f} s",
                f"{result.later_seconds:.3f} s",
                f"{result.later_seconds / duration:.4f}",
            )
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
