"""patch, unpatch, patched, disabled: what stands in openai-whisper afterwards, and what is told."""

from __future__ import annotations

import importlib
import logging
import sys
import threading
import warnings
from types import ModuleType

import placeholders
import pytest

import whisper_max
from whisper_max import activation, patching, report, settings, versions
from whisper_max.patch_table import TABLE
from whisper_max.settings import TARGETS


def installed() -> dict[str, object]:
    return {target: placeholders.upstream(target) for target in TARGETS}


def ours(target: str) -> bool:
    return placeholders.upstream(target).__module__.startswith("whisper_max.")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The stand-ins' call log. Whatever a test does, upstream is as before afterwards."""
    placeholders.start_unpatched(monkeypatch)
    placeholders.pretend_max_is_installed(monkeypatch)
    log = placeholders.install_replacements(monkeypatch)
    before = installed()
    yield log
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patching.unpatch()
    monkeypatch.undo()
    assert installed() == before


def test_patch_replaces_every_row_and_unpatch_puts_back_the_very_same_objects():
    before = installed()
    result = whisper_max.patch()
    assert result.patched == TARGETS
    assert result.refused == {}
    assert all(ours(target) and whisper_max.is_patched(target) for target in TARGETS)
    assert whisper_max.is_patched()

    whisper_max.unpatch()
    assert installed() == before
    assert not whisper_max.is_patched()
    whisper_max.unpatch()
    assert installed() == before


def test_models_and_decodes_get_the_replacements(calls):
    import torch
    from whisper.decoding import DecodingOptions, DecodingTask
    from whisper.model import ModelDimensions, Whisper

    dims = ModelDimensions(80, 4, 64, 1, 1, 51865, 8, 64, 1, 1)
    with whisper_max.patched():
        model = Whisper(dims)
        assert type(model.encoder).__name__ == "MaxAudioEncoder"
        assert type(model.decoder).__name__ == "MaxTextDecoder"
        model.encoder(torch.zeros(1, 80, 8))
        task = DecodingTask(model, DecodingOptions(language="en", fp16=False))
        assert type(task.inference).__name__ == "MaxInference"
    model.encoder(torch.zeros(1, 80, 8))
    assert calls == ["encoder: MAX", "inference: MAX", "encoder: the encoder is not patched"]


def test_add_word_timestamps_finds_the_alignment_replacement(calls):
    from whisper import timing

    find = "find_alignment"
    with whisper_max.patched():
        # No text: upstream answers without looking at the model.
        assert timing.add_word_timestamps.__globals__[find](None, None, [], None, 0) == []
    assert calls == ["alignment: MAX"]


def test_targets_restrict_what_is_patched():
    result = whisper_max.patch(targets=("decoder", "encoder"))
    assert result.patched == ("encoder", "decoder")
    assert [target for target in TARGETS if ours(target)] == ["encoder", "decoder"]
    assert not whisper_max.is_patched("inference")
    assert activation.is_active("encoder") and not activation.is_active("inference")


def test_an_unknown_target_is_a_value_error():
    with pytest.raises(ValueError, match="no target 'vad'; targets are encoder"):
        whisper_max.is_patched("vad")
    with pytest.raises(ValueError, match="targets has 'vad'"):
        whisper_max.patch(targets=("vad",))
    assert not whisper_max.is_patched()


def test_mode_off_patches_nothing_and_says_so():
    before = installed()
    result = whisper_max.patch(mode="off")
    assert result.patched == ()
    assert result.refused == {target: ("mode is 'off'",) for target in TARGETS}
    assert installed() == before
    assert whisper_max.status().targets["encoder"].reasons == {"mode is 'off'": 0}
    assert whisper_max.patch(mode="auto").patched == TARGETS


def test_the_environment_can_switch_off(monkeypatch):
    monkeypatch.setenv("WHISPER_MAX_MODE", "off")
    assert whisper_max.patch().patched == ()


def test_without_max_patching_is_harmless_and_tells_why(monkeypatch):
    placeholders.pretend_max_is_installed(monkeypatch, versions.NOT_INSTALLED)
    before = installed()
    result = whisper_max.patch()
    assert result.patched == ()
    reason = "MAX is not installed: pip install 'max==26.7.*'"
    assert result.refused == {target: (reason,) for target in TARGETS}
    assert reason in str(result)
    assert installed() == before
    status = whisper_max.status()
    assert all(not status.targets[target].patched for target in TARGETS)
    assert all(status.targets[target].reasons == {reason: 0} for target in TARGETS)


def test_strict_raises_what_auto_only_reports(monkeypatch):
    placeholders.pretend_max_is_installed(monkeypatch, versions.NOT_INSTALLED)
    before = installed()
    with pytest.raises(whisper_max.UnsupportedByMax, match="encoder.*MAX is not installed.*align"):
        whisper_max.patch(mode="strict")
    assert installed() == before
    assert not whisper_max.is_patched()
    assert settings.active().mode == "auto"


def test_only_the_targets_that_an_unknown_upstream_concerns_are_refused(monkeypatch):
    from whisper import timing

    def find_alignment(model, tokenizer, words):
        return []

    monkeypatch.setattr(timing, "find_alignment", find_alignment)
    result = whisper_max.patch()
    assert result.patched == TARGETS[:-1]
    assert "find_alignment takes (model, tokenizer, words)" in result.refused["alignment"][0]
    assert timing.find_alignment is find_alignment


# Patching twice


def test_a_second_patch_changes_nothing():
    first = whisper_max.patch(precision="highest")
    state = installed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert whisper_max.patch(precision="highest") is first
        assert whisper_max.patch() is first  # no wish of its own, so none that differs
    assert installed() == state


def test_a_differing_second_patch_warns_and_the_first_settings_stay():
    first = whisper_max.patch(precision="highest", targets=["encoder"])
    with pytest.warns(RuntimeWarning) as caught:
        assert whisper_max.patch(precision="medium", compile="background", targets=None) is first
    (warning,) = caught
    assert str(warning.message) == (
        "whisper is already patched with precision='highest', which stays; precision='medium' is "
        "ignored. To change it, call whisper_max.unpatch() first."
    )
    assert warning.filename == __file__
    assert settings.active().precision == "highest"
    whisper_max.unpatch()
    assert whisper_max.patch(precision="medium").settings.precision == "medium"


def test_a_bad_second_patch_raises_and_the_first_stays():
    whisper_max.patch()
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        whisper_max.patch(precision="fp8")
    assert all(whisper_max.is_patched(target) for target in TARGETS)


# Other packages patch as well


def test_what_was_replaced_after_patch_is_left_with_a_warning():
    from whisper import timing

    upstream = timing.find_alignment
    whisper_max.patch()
    ours_in_between = timing.find_alignment

    def theirs(*args, **kwargs):
        return ours_in_between(*args, **kwargs)

    timing.find_alignment = theirs
    try:
        assert not whisper_max.is_patched("alignment")
        assert whisper_max.is_patched()
        with pytest.warns(RuntimeWarning, match="find_alignment was replaced by test_patching"):
            whisper_max.unpatch()
        assert timing.find_alignment is theirs
        assert not any(ours(target) for target in TARGETS[:-1])
        assert not activation.is_active("alignment")

        # Patching again respects it, and the first original stays saved.
        again = whisper_max.patch()
        assert again.patched == TARGETS[:-1]
        assert "find_alignment was replaced by test_patching" in again.refused["alignment"][0]
        assert timing.find_alignment is theirs
        assert activation.originals["whisper.timing.find_alignment"] is upstream
    finally:
        timing.find_alignment = upstream


def test_warnings_as_errors_do_not_leave_it_half_undone():
    from whisper import timing

    upstream = timing.find_alignment
    whisper_max.patch()
    timing.find_alignment = len
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(RuntimeWarning, match="find_alignment was replaced by builtins.len"):
                whisper_max.unpatch()
    finally:
        timing.find_alignment = upstream
    assert not any(ours(target) for target in TARGETS)
    assert not whisper_max.is_patched()


# All rows or none


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.target)
def test_a_replacement_that_cannot_be_imported_leaves_nothing_patched(monkeypatch, row):
    module = row.replacement.partition(":")[0]
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    before = installed()
    with pytest.raises(AttributeError):
        whisper_max.patch()
    assert installed() == before
    assert not whisper_max.is_patched()
    assert whisper_max.status().targets["encoder"].patched is False


class Reluctant(ModuleType):
    """A module that does not let one of its attributes be replaced."""

    guarded = ""
    error: type[BaseException] = RuntimeError

    def __setattr__(self, name, value):
        if name == self.guarded and value.__module__.startswith("whisper_max."):
            super().__setattr__(name, value)  # the worst: it was set, and then something broke
            raise self.error(f"no new {name}")
        super().__setattr__(name, value)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "row", [row for row in TABLE if "." not in row.attribute], ids=lambda row: row.target
)
def test_an_error_at_any_row_rolls_back_all_of_them(monkeypatch, row, error):
    module = importlib.import_module(row.module)
    module.__class__ = Reluctant
    monkeypatch.setattr(Reluctant, "guarded", row.attribute)
    monkeypatch.setattr(Reluctant, "error", error)
    before = installed()
    try:
        with pytest.raises(error):
            whisper_max.patch()
        assert installed() == before
        assert not whisper_max.is_patched()
        assert not any(activation.is_active(target) for target in TARGETS)
        assert settings.active() == settings.Settings.from_environment()
    finally:
        module.__class__ = ModuleType
    assert whisper_max.patch().patched == TARGETS


# patched() and disabled()


def test_patched_restores_the_unpatched_state_also_after_an_error():
    before = installed()
    with pytest.raises(KeyError), whisper_max.patched(precision="highest") as result:
        assert result.patched == TARGETS
        assert settings.active().precision == "highest"
        raise KeyError
    assert installed() == before
    assert settings.active().precision == "high"


def test_patched_nests_and_each_block_has_its_own_arguments():
    before = installed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with whisper_max.patched(precision="highest", targets=("encoder",)):
            with whisper_max.patched(precision="int8", targets=("encoder", "decoder")):
                assert settings.active().precision == "int8"
                assert [target for target in TARGETS if ours(target)] == ["encoder", "decoder"]
                with whisper_max.patched(mode="off"):
                    assert installed() == before
                    assert not activation.is_active("encoder")
                assert [target for target in TARGETS if ours(target)] == ["encoder", "decoder"]
            assert settings.active().precision == "highest"
            assert [target for target in TARGETS if ours(target)] == ["encoder"]
            assert whisper_max.status().targets["decoder"].patched is False
    assert installed() == before


def test_patched_restores_whatever_the_block_did():
    whisper_max.patch(targets=("encoder",))
    with whisper_max.patched():
        whisper_max.unpatch()
        assert not ours("encoder")
    assert [target for target in TARGETS if ours(target)] == ["encoder"]
    assert whisper_max.is_patched("encoder")
    whisper_max.unpatch()
    with whisper_max.patched():
        whisper_max.unpatch()
        whisper_max.patch(precision="medium")
    assert not whisper_max.is_patched()


def test_disabled_switches_the_replacements_off_in_this_thread(calls):
    import torch
    from whisper import model

    whisper_max.patch()
    encoder = model.AudioEncoder(80, 4, 64, 1, 1)
    mel = torch.zeros(1, 80, 8)
    with whisper_max.disabled():
        encoder(mel)
        thread = threading.Thread(target=encoder, args=(mel,))
        thread.start()
        thread.join()
    encoder(mel)
    assert calls == ["encoder: disabled", "encoder: MAX", "encoder: MAX"]


# What is missing


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("whisper", "openai-whisper is not installed: pip install openai-whisper"),
        ("whisper.model", "openai-whisper is not installed .the module called whisper here is an"),
        ("torch", "torch is not installed: pip install torch"),
    ],
)
def test_missing_packages_are_a_clear_import_error(monkeypatch, missing, message):
    def import_module(name):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ImportError, match=message):
        patching.patch()


def test_another_missing_package_is_not_explained_away(monkeypatch):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'numba'", name="numba")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError, match="numba"):
        patching.patch()


def test_off_imports_nothing(monkeypatch):
    def import_module(name):
        pytest.fail(f"imports {name}")

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert patching.patch(mode="off").patched == ()


# What is told


def test_what_was_patched_is_logged(caplog):
    caplog.set_level(logging.INFO, logger="whisper_max")
    whisper_max.patch(targets=("encoder",))
    assert [entry.message for entry in caplog.records] == ["patched: encoder"]


def test_status_says_what_is_patched():
    with whisper_max.patched(targets=("encoder",)):
        assert whisper_max.status().targets["encoder"].patched
        assert not whisper_max.status().targets["decoder"].patched
        report.reset()
        assert whisper_max.status().targets["encoder"].patched
    assert not whisper_max.status().targets["encoder"].patched
