"""openai-whisper in bfloat16, through PyTorch's autocast."""

from __future__ import annotations

import contextlib

import torch

from .interface import Setup
from .openai_whisper import OpenAIWhisper


class TorchAutocast(OpenAIWhisper):
    """Matrix products in bfloat16; needs a CPU that has such products."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        # Upstream's decode() refuses features that are not what its fp16 option says.
        self.model.encoder.register_forward_hook(lambda module, inputs, output: output.float())

    def arithmetic(self) -> contextlib.AbstractContextManager:
        return torch.autocast("cpu", torch.bfloat16)
