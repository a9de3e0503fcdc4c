"""A user's script: load a model, transcribe one recording after the other. With patch(), or not.

    python -m benchmarks.first_run_script WORK MODEL THREADS STARTED COUNT SECONDS [patch]

Transcribes COUNT recordings, and, where SECONDS are not 0, goes on until so long after the change
to MAX. Then it lets the compile end. Prints one line of JSON for each: the time since STARTED,
which is in seconds since the epoch, the text, and whether all of it ran on MAX.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import torch
import whisper

from .inputs import FIRST_RUN, Inputs
from .models import Model
from .worker import use_cpus

LONGEST_SECONDS = 600.0  # by then the graphs are compiled, or never will be


def main(
    work: str, model: str, threads: str, started: str, count: str, seconds: str, patch: str = ""
) -> None:
    """The script."""
    use_cpus(int(threads))
    if patch:
        import whisper_max

        whisper_max.patch(compile="background")
    inputs = Inputs(Path(work))
    loaded = whisper.load_model(str(Model(model, Path(work)).checkpoint), device="cpu")
    audio = [inputs.audio(name)[0] for name in FIRST_RUN]
    changed = None
    for place in itertools.count():
        torch.manual_seed(0)
        text = whisper.transcribe(loaded, audio[place % len(audio)], fp16=False)["text"]
        now = time.time() - float(started)
        on_max = bool(patch) and _on_max()
        if on_max and changed is None:
            changed = now
        print(json.dumps({"time": round(now, 4), "text": text, "on_max": on_max}), flush=True)
        enough = not float(seconds) or (changed is not None and now > changed + float(seconds))
        if place + 1 >= int(count) and (enough or now > LONGEST_SECONDS):
            break
    if patch:
        whisper_max.compile()


def _on_max() -> bool:
    from whisper_max import report

    targets = report.status().targets.values()
    report.reset()
    return any(t.max_calls for t in targets) and not any(t.torch_calls for t in targets)


if __name__ == "__main__":
    main(*sys.argv[1:])
