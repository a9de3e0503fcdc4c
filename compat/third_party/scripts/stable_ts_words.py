"""Transcribe with stable-ts, print segments and words, write subtitles."""

import sys

import stable_whisper

checkpoint, audio, output = sys.argv[1:]

model = stable_whisper.load_model(checkpoint, device="cpu")
result = model.transcribe(audio, fp16=False, verbose=None)
for segment in result:
    print(f"{segment.start:.2f} {segment.end:.2f}{segment.text}")
    for word in segment.words:
        print(f"    {word.start:.2f} {word.end:.2f}{word.word}")
result.to_srt_vtt(f"{output}/words.srt", word_level=True)
