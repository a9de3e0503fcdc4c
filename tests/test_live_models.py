"""accelerate, restore, refresh, and the models that a decode takes up."""

from __future__ import annotations

import gc
import weakref

import placeholders
import pytest

import whisper_max
from whisper_max import activation, live_models, patching, settings, versions
from whisper_max.settings import TARGETS


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    placeholders.start_unpatched(monkeypatch)
    placeholders.pretend_max_is_installed(monkeypatch)
    yield placeholders.install_replacements(monkeypatch)
    patching.unpatch()


def new_model():
    from whisper.model import ModelDimensions, Whisper

    return Whisper(ModelDimensions(80, 4, 64, 1, 1, 51865, 8, 64, 1, 1))


@pytest.fixture
def model():
    return new_model()


def classes(model) -> tuple[str, str]:
    return type(model.encoder).__name__, type(model.decoder).__name__


MAX = ("MaxAudioEncoder", "MaxTextDecoder")
UPSTREAM = ("AudioEncoder", "TextDecoder")


def ours_stand() -> list[str]:
    """The targets in whose places in openai-whisper something of ours stands."""
    found = {target: placeholders.upstream(target) for target in TARGETS}
    return [name for name, thing in found.items() if thing.__module__.startswith("whisper_max.")]


def encode(model):
    import torch

    return model.encoder(torch.zeros(1, 80, 8))


def decode(model):
    """What every decode begins with, under patch() with the replacement."""
    from whisper import decoding

    decoding.PyTorchInference(model, 4)


def test_accelerate_swaps_two_classes_and_nothing_else(model, calls):
    parts = dict(model.named_modules())
    state = model.state_dict()
    seen = []
    model.encoder.conv1.register_forward_hook(lambda *_: seen.append("hook"))

    assert whisper_max.accelerate(model) is model
    assert classes(model) == MAX
    assert whisper_max.accelerate(model) is model
    assert dict(model.named_modules()) == parts
    assert model.state_dict().keys() == state.keys()
    assert isinstance(model.encoder, live_models.upstream_class(type(model.encoder)))
    encode(model)
    assert calls == ["encoder: MAX"]
    assert seen == ["hook"]

    assert whisper_max.restore(model) is model
    assert classes(model) == UPSTREAM
    assert whisper_max.restore(model) is model
    assert dict(model.named_modules()) == parts


def test_accelerate_works_without_patch_and_obeys_disabled_and_off(model, calls):
    whisper_max.accelerate(model)
    with whisper_max.disabled():
        encode(model)
    with whisper_max.patched(mode="off"):
        encode(model)
    encode(model)
    assert calls == ["encoder: disabled", "encoder: mode is 'off'", "encoder: MAX"]


def test_decodes_of_accelerated_models_alone_run_on_max(model, calls):
    """The names that every decode looks up are replaced, as long as there is such a model."""
    other = new_model()
    whisper_max.accelerate(model)
    assert ours_stand() == ["inference", "decoding_loop", "alignment"]
    assert not whisper_max.is_patched()
    decode(model)
    decode(other)
    assert calls == ["inference: MAX", "inference: the inference is not patched"]
    assert classes(other) == UPSTREAM

    whisper_max.accelerate(other)
    whisper_max.restore(model)
    assert ours_stand() == ["inference", "decoding_loop", "alignment"]
    whisper_max.restore(other)
    assert not ours_stand()


def test_patching_and_accelerating_leave_each_others_names_alone(model):
    whisper_max.accelerate(model)
    with whisper_max.patched(targets=("encoder", "inference")):
        assert ours_stand() == ["encoder", "inference"]
    with whisper_max.patched(mode="off"):
        assert ours_stand() == ["inference", "decoding_loop", "alignment"]
        assert not whisper_max.is_patched()
    with whisper_max.patched():
        whisper_max.restore(model)
        assert ours_stand() == list(TARGETS)
        whisper_max.accelerate(model)
    assert ours_stand() == ["inference", "decoding_loop", "alignment"]
    whisper_max.unpatch()
    assert not ours_stand() and classes(model) == UPSTREAM


def test_what_somebody_else_has_replaced_stays(model, monkeypatch, caplog):
    from whisper import timing

    caplog.set_level("INFO", logger="whisper_max")
    monkeypatch.setattr(timing, "find_alignment", lambda *_: [])
    whisper_max.accelerate(model)
    assert ours_stand() == ["inference", "decoding_loop"]
    assert "alignment stays on PyTorch: whisper.timing.find_alignment" in caplog.text
    whisper_max.restore(model)
    monkeypatch.setenv("WHISPER_MAX_MODE", "strict")
    with pytest.raises(whisper_max.UnsupportedByMax, match="find_alignment"):
        whisper_max.accelerate(model)


def test_settings_are_those_of_the_environment_at_the_first_model(model, monkeypatch):
    """As with patch(): they hold until the last model is gone."""
    whisper_max.accelerate(model)
    fixed = settings.active()
    monkeypatch.setenv("WHISPER_MAX_PRECISION", "int8")
    whisper_max.accelerate(new_model())
    assert settings.active() is fixed
    with whisper_max.patched(precision="medium"):
        assert settings.active().precision == "medium"
    assert settings.active() is fixed
    whisper_max.restore(model)
    gc.collect()
    assert settings.active().precision == "int8"
    whisper_max.accelerate(model)
    assert settings.active() is settings.active() and settings.active().precision == "int8"


def test_restoring_leaves_what_somebody_else_has_replaced_since(model, monkeypatch):
    from whisper import timing

    monkeypatch.setattr(timing, "find_alignment", timing.find_alignment)  # put back in the end
    whisper_max.accelerate(model)
    timing.find_alignment = others = lambda *_: []
    with pytest.warns(RuntimeWarning, match="find_alignment was replaced") as told:
        whisper_max.restore(model)
    assert [warning.filename for warning in told] == [__file__]
    assert timing.find_alignment is others


def test_a_subclass_is_left_alone(model, caplog):
    caplog.set_level("INFO", logger="whisper_max")

    class Fork(type(model.encoder)):
        pass

    model.encoder.__class__ = Fork
    whisper_max.accelerate(model)
    assert classes(model) == ("Fork", "MaxTextDecoder")
    (entry,) = caplog.records
    assert "encoder stays on PyTorch: its class is test_live_models." in entry.message
    whisper_max.restore(model)
    assert classes(model) == ("Fork", "TextDecoder")


def test_strict_raises_before_anything_is_swapped(model, monkeypatch):
    class Fork(type(model.decoder)):
        pass

    model.decoder.__class__ = Fork
    monkeypatch.setenv("WHISPER_MAX_MODE", "strict")
    with pytest.raises(whisper_max.UnsupportedByMax, match="decoder .*Fork.*TextDecoder"):
        whisper_max.accelerate(model)
    assert classes(model) == ("AudioEncoder", "Fork")


@pytest.mark.parametrize("why", ["MAX", "mode"])
def test_without_max_or_switched_off_nothing_is_swapped(model, monkeypatch, caplog, why):
    caplog.set_level("INFO", logger="whisper_max")
    if why == "MAX":
        placeholders.pretend_max_is_installed(monkeypatch, versions.NOT_INSTALLED)
    else:
        monkeypatch.setenv("WHISPER_MAX_MODE", "off")
    assert whisper_max.accelerate(model) is model
    assert classes(model) == UPSTREAM
    refused = len(TARGETS) if why == "MAX" else 2
    assert [why in entry.message for entry in caplog.records] == [True] * refused
    assert not ours_stand()


def test_something_else_is_a_type_error(model):
    for function in (whisper_max.accelerate, whisper_max.restore, whisper_max.refresh):
        with pytest.raises(TypeError, match="this AudioEncoder has no encoder"):
            function(model.encoder)


def test_refresh_drops_what_max_keeps(model, calls):
    assert whisper_max.refresh(model) is model
    assert calls == []
    whisper_max.accelerate(model)
    whisper_max.refresh(model)
    assert calls == ["encoder: state dropped", "decoder: state dropped"]
    assert classes(model) == MAX


def test_a_model_loaded_before_patch_is_taken_up_by_its_first_decode(model, calls):
    whisper_max.patch()
    assert classes(model) == UPSTREAM
    decode(model)
    assert classes(model) == MAX
    encode(model)
    assert calls == ["inference: MAX", "encoder: MAX"]
    whisper_max.unpatch()
    assert classes(model) == UPSTREAM
    assert calls[2:] and all("dropped" in call for call in calls[2:])


def test_a_decode_takes_up_only_what_is_patched(model):
    whisper_max.patch(targets=("encoder", "inference"))
    decode(model)
    assert classes(model) == ("MaxAudioEncoder", "TextDecoder")


def test_a_decode_leaves_restored_models_alone(model):
    whisper_max.patch()
    whisper_max.restore(model)
    decode(model)
    assert classes(model) == UPSTREAM
    whisper_max.accelerate(model)
    decode(model)
    assert classes(model) == MAX


def test_unpatch_restores_live_models_however_they_were_taken_up(model):
    whisper_max.accelerate(model)
    whisper_max.patch()
    decode(model)
    whisper_max.unpatch()
    assert classes(model) == UPSTREAM
    assert not activation.accelerated


def test_leaving_patched_keeps_what_was_accelerated_before(model, calls):
    whisper_max.accelerate(model)
    with whisper_max.patched():
        decode(model)
    assert classes(model) == MAX
    encode(model)
    assert calls[-1] == "encoder: MAX"


def test_a_model_made_while_patched_goes_on_with_pytorch_after_unpatch(calls):
    with whisper_max.patched():
        model = new_model()
    encode(model)
    assert calls == ["encoder: the encoder is not patched"]
    whisper_max.restore(model)
    assert classes(model) == UPSTREAM


def test_nothing_here_keeps_a_model_alive():
    accelerated, adopted = new_model(), new_model()
    whisper_max.accelerate(accelerated)
    whisper_max.patch()
    decode(adopted)
    remaining = [weakref.ref(model.encoder) for model in (accelerated, adopted)]
    del accelerated, adopted
    gc.collect()
    assert [reference() for reference in remaining] == [None, None]


def test_why_off_names_one_reason():
    assert activation.why_off("encoder") == "the encoder is not patched"
    with whisper_max.patched():
        assert activation.why_off("encoder") is None
        with settings.disabled():
            assert activation.why_off("encoder") == "disabled"
