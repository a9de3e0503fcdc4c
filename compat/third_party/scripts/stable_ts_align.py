"""Align a known text with stable-ts."""

import sys

import stable_whisper

checkpoint, audio, output = sys.argv[1:]

model = stable_whisper.load_model(checkpoint, device="cpu")
text = model.transcribe(audio, fp16=False, verbose=None, word_timestamps=False).text
result = model.align(audio, text, language="en", verbose=None)
result.to_srt_vtt(f"{output}/aligned.srt", segment_level=True, word_level=False)
for word in result.all_words():
    print(f"{word.start:.2f} {word.end:.2f}{word.word}")
