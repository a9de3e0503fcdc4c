"""Transcribe the demonstration as a patched program does; prints text and status as JSON."""

from __future__ import annotations

import json

import whisper

import whisper_max
from whisper_max import demo

whisper_max.patch(compile="blocking")
model = whisper.load_model(str(demo.CHECKPOINT), device="cpu")
text = model.transcribe(demo.read_wav(demo.RECORDING), fp16=False)["text"]
print(json.dumps({"text": text, "status": whisper_max.status().to_dict()}))
