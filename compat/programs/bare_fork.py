"""Transcribe on MAX, then in a child of os.fork() that ends by sys.exit(3), as servers' workers do.

Prints the parent's text, the child's, and the status that the child ended with.
"""

from __future__ import annotations

import os
import sys

import whisper

import whisper_max
from whisper_max import demo

whisper_max.patch(compile="blocking")
model = whisper.load_model(str(demo.CHECKPOINT), device="cpu")
audio = demo.read_wav(demo.RECORDING)
print(model.transcribe(audio, fp16=False)["text"], flush=True)
child = os.fork()
if child == 0:
    print(model.transcribe(audio, fp16=False)["text"])
    sys.exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
