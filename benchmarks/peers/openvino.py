"""OpenVINO, in the inference precision that the variant names."""

from __future__ import annotations

import openvino
import torch
import whisper

from .interface import Alternating, Operation, Outcome, Peer, Setup, Stopwatch


class OpenVINO(Peer):
    """openai-whisper's encoder, converted. OpenVINO itself has no decoding loop."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        model = whisper.load_model(str(setup.model.checkpoint), device="cpu")
        mel = torch.zeros(1, setup.model.n_mels, 3000)
        with torch.no_grad():
            converted = openvino.convert_model(model.encoder, example_input=mel)
        compiled = openvino.Core().compile_model(
            converted,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": setup.variant,
                "INFERENCE_NUM_THREADS": setup.threads,
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
        self.request = compiled.create_infer_request()

    def encoder(self) -> Operation:
        mels = Alternating([mel[None] for mel in self.setup.inputs.mels(self.setup.model.n_mels)])

        def run() -> Outcome:
            mel = mels.next()
            with Stopwatch() as watch:
                self.request.infer({0: mel}, share_inputs=True)
            return Outcome(watch.seconds)

        return run
