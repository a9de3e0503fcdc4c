"""The official models' dimensions, and those of a checkpoint or a model."""

from __future__ import annotations

import base64
import gzip

import pytest
import torch
import whisper
from whisper.model import ModelDimensions, Whisper

from whisper_max import demo
from whisper_max.dimensions_of import OFFICIAL, dimensions_of


@pytest.mark.parametrize("name", whisper.available_models())
def test_official_models_agree_with_upstreams_alignment_heads(name):
    dims = ModelDimensions(**dimensions_of(name))
    heads = gzip.decompress(base64.b85decode(whisper._ALIGNMENT_HEADS[name]))
    assert len(heads) == dims.n_text_layer * dims.n_text_head
    assert dims.n_text_state == 64 * dims.n_text_head
    assert dims.n_audio_state == 64 * dims.n_audio_head
    assert (dims.n_vocab == 51864) == name.endswith(".en")


@pytest.mark.parametrize(
    ("name", "parameters"),
    # In millions, README.md of openai/whisper; there they are rounded upward.
    [("tiny", 39), ("base", 74), ("small", 244), ("medium", 769), ("large", 1550), ("turbo", 809)],
)
def test_official_models_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = Whisper.__new__(Whisper)
        torch.nn.Module.__init__(model)
        dims = ModelDimensions(**dimensions_of(name))
        model.encoder = whisper.model.AudioEncoder(
            dims.n_mels, 2, dims.n_audio_state, dims.n_audio_head, dims.n_audio_layer
        )
        model.decoder = whisper.model.TextDecoder(
            dims.n_vocab, 2, dims.n_text_state, dims.n_text_head, dims.n_text_layer
        )
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted / 1e6 == pytest.approx(parameters, rel=0.06)


def test_every_official_name_is_known_and_answers_are_not_shared():
    assert set(whisper.available_models()) <= set(OFFICIAL)
    dimensions_of("tiny")["n_mels"] = 0
    assert dimensions_of("tiny")["n_mels"] == 80


def test_a_checkpoint_and_its_model_have_the_same_dimensions():
    model = whisper.load_model(str(demo.CHECKPOINT), device="cpu")
    assert dimensions_of(model) == vars(model.dims)
    assert dimensions_of(demo.CHECKPOINT) == dimensions_of(str(demo.CHECKPOINT)) == vars(model.dims)


def test_an_unknown_name_is_told_with_the_known_ones():
    with pytest.raises(ValueError, match="'tyni' is neither an official model nor a file.*turbo"):
        dimensions_of("tyni")


@pytest.mark.parametrize("content", ["empty", "truncated", "list", "text", "sound", "no dims"])
def test_a_file_that_is_no_checkpoint_is_a_value_error(tmp_path, content):
    path = tmp_path / "model.pt"
    if content == "empty":
        path.touch()
    elif content == "truncated":
        path.write_bytes(demo.CHECKPOINT.read_bytes()[:100_000])
    elif content == "sound":
        path.write_bytes(demo.RECORDING.read_bytes()[:1000])
    elif content == "text":
        path.write_text("vault")
    else:
        torch.save([1, 2] if content == "list" else {"model_state_dict": {}}, path)
    with pytest.raises(ValueError, match="model.pt' is not a whole checkpoint of openai-whisper$"):
        dimensions_of(path)


def test_something_else_is_a_type_error():
    with pytest.raises(TypeError, match="not Linear"):
        dimensions_of(torch.nn.Linear(1, 1))
