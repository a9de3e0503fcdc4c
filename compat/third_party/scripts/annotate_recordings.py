"""Annotate recordings with lhotse's whisper workflow, and write a manifest."""

import sys

from lhotse import CutSet, Recording, RecordingSet, annotate_with_whisper

checkpoint, audio, output = sys.argv[1:]

recordings = RecordingSet.from_recordings([Recording.from_file(audio)])
with CutSet.open_writer(f"{output}/cuts.jsonl") as writer:
    for cut in annotate_with_whisper(recordings, model_name=checkpoint, device="cpu", fp16=False):
        writer.write(cut)
        for supervision in cut.supervisions:
            print(supervision.language, supervision.start, supervision.end, supervision.text)
