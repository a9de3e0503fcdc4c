"""Encode in this process, on MAX, and then in the workers of a torch DataLoader.

    python loader.py fork|spawn         prints the largest difference, and what ran where, as JSON
"""

from __future__ import annotations

import json
import sys

import torch
import whisper
from torch.utils.data import DataLoader, Dataset

import whisper_max
from whisper_max import demo, report


class Windows(Dataset):
    """Features of short pieces of the demonstration, with what ran where in the worker."""

    def __init__(self, model) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    @torch.no_grad()
    def __getitem__(self, i: int) -> tuple[torch.Tensor, str]:
        report.reset()
        piece = torch.from_numpy(demo.read_wav(demo.RECORDING))[i * 16000 : (i + 2) * 16000]
        mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(piece))
        features = self.model.encoder(mel[None])[0]
        return features, json.dumps(whisper_max.status().to_dict()["targets"]["encoder"])


def main(method: str) -> None:
    whisper_max.patch(compile="blocking")
    windows = Windows(whisper.load_model(str(demo.CHECKPOINT), device="cpu"))
    expected = [windows[i] for i in range(len(windows))]
    found = list(DataLoader(windows, None, num_workers=2, multiprocessing_context=method))
    worst = max((a - b).abs().max().item() for (a, _), (b, _) in zip(found, expected))
    parent, workers = ([json.loads(told) for _, told in each] for each in (expected, found))
    print(json.dumps({"worst": worst, "parent": parent, "workers": workers}))


if __name__ == "__main__":
    main(sys.argv[1])
