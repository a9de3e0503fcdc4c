"""Transcribe with whisper-timestamped as its README recommends for accuracy: with beam search."""

import sys

import whisper_timestamped

checkpoint, audio, output = sys.argv[1:]

model = whisper_timestamped.load_model(checkpoint, device="cpu")
options = {"beam_size": 5, "best_of": 5, "temperature": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)}
result = whisper_timestamped.transcribe(
    model, audio, language="en", fp16=False, verbose=None, **options
)
for segment in result["segments"]:
    for word in segment["words"]:
        print(word["start"], word["end"], word["text"])
