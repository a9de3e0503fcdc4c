"""Recognize an audio file with SpeechRecognition and whisper."""

import sys

import speech_recognition

checkpoint, audio, output = sys.argv[1:]

recognizer = speech_recognition.Recognizer()
with speech_recognition.AudioFile(audio) as source:
    recorded = recognizer.record(source)
print(recognizer.recognize_whisper(recorded, model=checkpoint, load_options={"device": "cpu"}))
details = recognizer.recognize_whisper(
    recorded, model=checkpoint, language="english", show_dict=True
)
for segment in details["segments"]:
    print(f"{segment['start']:.2f} {segment['end']:.2f}{segment['text']}")
with open(f"{output}/text.txt", "w") as file:
    file.write(details["text"])
