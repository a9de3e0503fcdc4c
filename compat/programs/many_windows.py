"""Transcribe window after window, and print what the process holds meanwhile, as JSON.

    python many_windows.py COUNT EVERY RECORDING …

One entry for each EVERY windows: resident memory in KiB, open files, threads.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from itertools import cycle
from pathlib import Path

import soundfile
import whisper

import whisper_max
from whisper_max import demo

WAYS = ({}, {"beam_size": 5}, {"word_timestamps": True}, {"temperature": 0.5, "best_of": 2})


def held() -> dict[str, int]:
    """What this process holds, by what Linux tells."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "memory": int(fields["VmRSS"].split()[0]),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": int(fields["Threads"]),
    }


def main(count: int, every: int, recordings: list[str]) -> None:
    whisper_max.patch(mode="strict", compile="blocking")
    model = whisper.load_model(str(demo.CHECKPOINT), device="cpu")
    audios = [soundfile.read(path, dtype="float32")[0] for path in recordings]
    # All recordings in every way, round and round; each is one window.
    work = cycle([(audio, way) for way in WAYS for audio in audios])
    seen = []
    for window, (audio, way) in zip(range(1, count + 1), work):
        model.transcribe(audio[: 30 * 16000], fp16=False, **way)
        if window % every == 0:
            seen.append(held())
    targets = whisper_max.status().to_dict()["targets"]
    print(json.dumps({"seen": seen, "targets": targets}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
