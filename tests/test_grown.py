"""Growing a model: the same function, at another size."""

from __future__ import annotations

import pytest
import torch
from whisper.model import ModelDimensions, Whisper

from benchmarks.grown import interpolation, grow

CANTONESE = 50358
SMALL = {
    "n_mels": 80,
    "n_audio_ctx": 12,
    "n_audio_state": 64,
    "n_audio_head": 2,
    "n_audio_layer": 2,
    "n_vocab": CANTONESE + 10,
    "n_text_ctx": 8,
    "n_text_state": 64,
    "n_text_head": 2,
    "n_text_layer": 1,
}
UNKNOWN = slice(100, 200)


def larger(times: int = 3, **others: int) -> dict[str, int]:
    names = ("n_audio_state", "n_audio_head", "n_text_state", "n_text_head")
    return {**SMALL, **{name: times * SMALL[name] for name in names}, **others}


@pytest.fixture(scope="module")
def small() -> Whisper:
    """With random numbers also where upstream begins with ones or zeros."""
    generator = torch.Generator().manual_seed(3)
    model = Whisper(ModelDimensions(**SMALL)).eval()
    for name, tensor in model.state_dict().items():
        if name != "encoder.positional_embedding":
            norm = 1.0 if name.endswith(("ln.weight", "ln_post.weight")) else 0.0
            tensor.copy_(norm + 0.15 * torch.randn(tensor.shape, generator=generator))
    model.decoder.token_embedding.weight.data[UNKNOWN] = 0
    return model


def grown(small: Whisper, dims: dict[str, int]) -> Whisper:
    model = Whisper(ModelDimensions(**dims)).eval()
    model.load_state_dict(grow(SMALL, small.state_dict(), dims))
    return model


@torch.no_grad()
def logits(model: Whisper) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    mel = torch.randn(1, SMALL["n_mels"], 2 * SMALL["n_audio_ctx"], generator=generator)
    return model(mel, torch.tensor([[1, 2, 300, 50000]]))


def test_wider_is_the_same_function(small):
    expected, found = logits(small), logits(grown(small, larger()))
    assert expected.std() > 0.5  # else they would agree on nothing
    assert (found - expected).abs().max() < 0.02 * expected.std()  # weights are float16


def test_deeper_is_nearly_the_same_function(small):
    expected = logits(small)
    found = logits(grown(small, larger(n_audio_layer=5, n_text_layer=4)))
    assert (found - expected).std() < 0.1 * expected.std()


def test_all_weights_differ_and_all_tokens_have_some(small):
    state = grow(SMALL, small.state_dict(), larger())
    for name, tensor in state.items():
        assert tensor.dtype == torch.float16
        # The first convolution sees frames, of which there are no copies; its channels are copies.
        if tensor.ndim > 1 and "positional" not in name and "conv1" not in name:
            rows = tensor.flatten(1).float()
            assert rows.any(1).all(), name
            assert len(rows.T.unique(dim=0)) == rows.shape[1], name
            assert len(rows.unique(dim=0)) == len(rows), name


def test_one_language_more(small):
    expected = logits(small)
    found = logits(grown(small, larger(n_vocab=SMALL["n_vocab"] + 1)))
    assert found.shape[-1] == expected.shape[-1] + 1
    assert found[..., CANTONESE].abs().max() < 0.02 * expected.std()
    without = torch.cat([found[..., :CANTONESE], found[..., CANTONESE + 1 :]], -1)
    assert (without - expected).abs().max() < 0.02 * expected.std()


def test_bands_of_mel_are_interpolated():
    matrix = interpolation(80, 128)
    assert matrix.shape == (80, 128)
    assert torch.allclose(matrix.sum(1), torch.ones(80))
    ramp = matrix @ (torch.arange(1, 129) / 129)
    assert torch.allclose(ramp, torch.arange(1, 81) / 81)
    assert torch.equal(interpolation(80, 80), torch.eye(80))


def test_growing_is_the_same_at_every_call(small):
    one, other = (grow(SMALL, small.state_dict(), larger(2)) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "wanted",
    [
        {**larger(), "n_audio_state": 100},
        {**larger(), "n_audio_head": 3},
        {**larger(), "n_text_state": 128},
        {**larger(), "n_vocab": SMALL["n_vocab"] - 1},
        {**larger(), "n_text_ctx": 448},
        {**larger(), "n_audio_layer": 1},
    ],
    ids=["width", "heads", "another width of text", "vocabulary", "context", "layers"],
)
def test_what_cannot_be_reached_is_refused(small, wanted):
    with pytest.raises(ValueError, match="do not grow to"):
        grow(SMALL, small.state_dict(), wanted)
