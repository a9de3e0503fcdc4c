"""Transcribe with whisper-timestamped, and print words with confidences."""

import json
import sys

import whisper_timestamped

checkpoint, audio, output = sys.argv[1:]

samples = whisper_timestamped.load_audio(audio)
model = whisper_timestamped.load_model(checkpoint, device="cpu")
result = whisper_timestamped.transcribe(model, samples, language="en", fp16=False, verbose=None)
words = [segment["words"] for segment in result["segments"]]
print(result["text"])
print(json.dumps(words, indent=2, ensure_ascii=False))
with open(f"{output}/words.json", "w") as file:
    json.dump(words, file)
