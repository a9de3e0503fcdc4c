"""Transcribe in this process, on MAX, and then in worker processes of multiprocessing.

    python pool.py fork|spawn|forkserver [patch]     prints what every process got, as JSON

With "patch", the workers patch whisper as well.
"""

from __future__ import annotations

import json
import multiprocessing
import sys

import torch
import whisper

import whisper_max
from whisper_max import demo, report


def transcribe(model, start: float) -> dict:
    """Text of the demonstration from `start` seconds on, and what ran where in this process."""
    report.reset()
    audio = demo.read_wav(demo.RECORDING)[int(start * 16000) :]
    text = model.transcribe(audio, fp16=False)["text"]
    return {"text": text, "targets": whisper_max.status().to_dict()["targets"]}


def patch() -> None:
    whisper_max.patch(compile="blocking")


def main(method: str, initializer=None) -> None:
    torch.set_num_threads(2)
    model = whisper.load_model(str(demo.CHECKPOINT), device="cpu")
    plain = [transcribe(model, start) for start in (0.0, 1.0)]
    patch()
    parent = [transcribe(model, start) for start in (0.0, 1.0)]
    with multiprocessing.get_context(method).Pool(2, initializer) as pool:
        workers = pool.starmap(transcribe, [(model, 0.0), (model, 1.0)], chunksize=1)
    after = transcribe(model, 0.0)
    print(json.dumps({"plain": plain, "parent": parent, "workers": workers, "after": after}))


if __name__ == "__main__":
    main(sys.argv[1], patch if sys.argv[2:] else None)
