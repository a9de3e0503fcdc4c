"""On an NVIDIA GPU: the order of work, float16, memory that runs out, several GPUs.

Everything here is skipped without one, and so far has never run. What needs no GPU is tried in
tests/test_gpu_session.py and, with `--device rehearsal`, in test_transcription.py.
"""

from __future__ import annotations

import pytest
import torch
import whisper

import whisper_max
from harness import exact
from recordings import samples
from whisper_max import demo, settings
from whisper_max.runtime import loading, model_state
from whisper_max.runtime.gpu import devices, state
from whisper_max.runtime.gpu.engine import Workspace
from whisper_max.runtime.gpu.state import GpuState, audio_sizes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

CLOCKS = 400_000_000  # of a GPU: a fifth of a second


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Instead of the CPU's graphs, which no test here runs."""


@pytest.fixture
def on_gpu():
    """Everything on MAX, on the GPU, or an error."""
    with whisper_max.patched(mode="strict", compile="blocking", device="cuda"):
        yield


def load(device: str = "cuda") -> whisper.Whisper:
    return whisper.load_model(str(demo.CHECKPOINT), device=device)


def mel_of(name: str, device: str = "cuda") -> torch.Tensor:
    return whisper.log_mel_spectrogram(whisper.pad_or_trim(samples(name)))[None].to(device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@torch.no_grad()
def test_errors_are_at_most_twice_pytorchs(dtype):
    mel = mel_of("en01")
    plain = load()
    tokens = torch.arange(1000, 1012, device="cuda")[None]
    in_float64 = exact(plain.encoder)(mel.double())
    features = in_float64.to(dtype)
    on_torch = plain.encoder(mel.to(dtype)), plain.decoder(tokens, features)
    reference = plain.decoder(tokens, in_float64.float())
    with whisper_max.patched(mode="strict", compile="blocking", device="cuda"):
        model = whisper_max.accelerate(load())
        found = model.encoder(mel.to(dtype)), model.decoder(tokens, features)
    assert found[0].dtype is dtype and found[0].device == mel.device
    for ours, theirs, truth in zip(found, on_torch, (in_float64, reference)):
        error, torch_error = (
            (part.double() - truth.double()).square().mean().sqrt().item()
            for part in (ours, theirs)
        )
        assert error <= 2 * torch_error + 2**-20 * truth.abs().max().item()


@pytest.mark.parametrize("options", [{}, {"beam_size": 5}, {"word_timestamps": True}], ids=str)
def test_texts_in_float16(on_gpu, options):
    with whisper_max.disabled():
        expected = load().transcribe(samples("en01"), **options)
    found = load().transcribe(samples("en01"), **options)
    assert found["text"] == expected["text"]


@torch.no_grad()
def test_max_comes_after_pytorchs_current_stream_and_pytorch_after_max(on_gpu):
    """Without the order MAX would encode zeros, or PyTorch would read what is not there yet.

    By the encoder's graph alone: the checks before it read results, and so would wait.
    """
    model, mel = load(), mel_of("en01")
    expected = model.encoder(mel)
    max_device = devices.cuda_device(mel.device)
    state = model_state.state_of(model.encoder, "encoder", GpuState)
    sizes = audio_sizes(model.encoder)
    ready = state.ready(model.encoder, settings.active(), max_device, sizes, mel.dtype)
    late = torch.zeros_like(mel)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(CLOCKS)
        late.copy_(mel)
        found = ready.encode(late) * 1
    torch.cuda.synchronize()
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_replayed_step_is_the_step(on_gpu):
    """Greedy, which replays, against the same decode without capture, in a workspace of its own."""
    replayed = []
    replay = Workspace._replay

    def noting(workspace, *given):
        replayed.append(workspace._captured is not None)
        return replay(workspace, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "_replay", noting)
        expected = load().transcribe(samples("en02"), temperature=0)["text"]
        assert replayed and all(replayed)
        replayed.clear()
        for engine in loading._engines.values():
            engine.workspaces.clear()
        patch.setattr(devices.CudaDevice, "captures", False)
        assert load().transcribe(samples("en02"), temperature=0)["text"] == expected
        assert replayed and not any(replayed)


@pytest.mark.allow_fallback
def test_where_memory_runs_out_pytorch_takes_over(monkeypatch):
    take = state._weights

    def take_in_little_memory(*arguments):
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        hoard = torch.empty(free - (8 << 20), dtype=torch.uint8, device="cuda")
        taken = take(*arguments)  # 16 MB of matrices, in half precision
        del hoard
        return taken

    monkeypatch.setattr(state, "_weights", take_in_little_memory)
    with whisper_max.disabled():
        expected = load().transcribe(samples("en01"))["text"]
    with whisper_max.patched(mode="auto", compile="blocking", device="cuda"):
        found = load().transcribe(samples("en01"))["text"]
        targets = whisper_max.status().targets.values()
    assert found == expected
    assert any("memory" in reason.lower() for target in targets for reason in target.reasons)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_each_model_runs_on_its_own_gpu(on_gpu):
    model = load("cuda:1")
    assert model.encoder(mel_of("en01", "cuda:1")).device == torch.device("cuda", 1)
    assert model.transcribe(samples("en01"))["text"] == load().transcribe(samples("en01"))["text"]
