"""Settings: defaults, the environment, arguments, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from whisper_max import settings
from whisper_max.settings import Settings

HOME = {"HOME": "/home/anna"}


def test_defaults():
    default = Settings.from_environment(HOME)
    assert default == Settings(cache_dir=default.cache_dir)
    assert (default.mode, default.precision, default.compile) == ("auto", "high", "background")
    assert (default.device, default.targets, default.cpu_level) == (None, None, None)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings.from_environment(HOME).mode = "off"


@pytest.mark.parametrize(
    ("variable", "name", "value"),
    [
        ("WHISPER_MAX_MODE", "mode", "strict"),
        ("WHISPER_MAX_PRECISION", "precision", "int8"),
        ("WHISPER_MAX_COMPILE", "compile", "cached"),
        ("WHISPER_MAX_CPU", "cpu_level", "avx512"),
    ],
)
def test_argument_wins_over_environment_over_default(variable, name, value):
    default = getattr(Settings.from_environment(HOME), name)
    environment = {**HOME, variable: value}
    assert getattr(Settings.from_environment(environment), name) == value != default
    assert getattr(Settings.from_environment(environment, **{name: None}), name) == value
    other = {"mode": "off", "precision": "medium", "compile": "blocking", "cpu_level": "amx"}[name]
    assert getattr(Settings.from_environment(environment, **{name: other}), name) == other
    assert getattr(Settings.from_environment({**HOME, variable: ""}), name) == default


def test_the_process_environment_is_the_default_one(monkeypatch):
    monkeypatch.setenv("WHISPER_MAX_PRECISION", "highest")
    assert Settings.from_environment().precision == "highest"


def test_a_bad_value_is_told_with_its_origin_and_what_is_allowed():
    with pytest.raises(ValueError) as caught:
        Settings.from_environment({**HOME, "WHISPER_MAX_PRECISION": "fp32"})
    assert str(caught.value) == (
        "precision is 'fp32' (from the environment variable WHISPER_MAX_PRECISION); "
        "it must be one of 'high', 'highest', 'medium', 'int8'"
    )
    with pytest.raises(ValueError, match=r"mode is 'fast' \(from the argument mode=\)"):
        Settings.from_environment(HOME, mode="fast")
    with pytest.raises(ValueError, match="device is 'mps'.*'cpu', 'cuda'"):
        Settings.from_environment(HOME, device="mps")


def test_a_bad_value_in_the_environment_does_not_matter_where_an_argument_overrides_it():
    environment = {**HOME, "WHISPER_MAX_MODE": "fast"}
    assert Settings.from_environment(environment, mode="strict").mode == "strict"


def test_an_unknown_setting_is_a_type_error():
    with pytest.raises(TypeError, match="no such setting: precission"):
        Settings.from_environment(HOME, precission="high")


def test_targets_come_in_the_order_of_the_table_and_once():
    chosen = Settings.from_environment(HOME, targets=["inference", "encoder", "inference"])
    assert chosen.targets == ("encoder", "inference")
    assert Settings.from_environment(HOME, targets=()).targets == ()


@pytest.mark.parametrize(
    ("targets", "message"),
    [("encoder", r"such as \('encoder',\)"), (("encoder", "vad"), "targets has 'vad'")],
)
def test_bad_targets_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_environment(HOME, targets=targets)


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", HOME, "/home/anna/.cache/whisper_max"),
        ("linux", {**HOME, "XDG_CACHE_HOME": "/var/anna"}, "/var/anna/whisper_max"),
        ("linux", {**HOME, "XDG_CACHE_HOME": "relative"}, "/home/anna/.cache/whisper_max"),
        ("linux", {**HOME, "WHISPER_MAX_CACHE_DIR": "/mnt/cache"}, "/mnt/cache"),
        ("darwin", HOME, "/home/anna/Library/Caches/whisper_max"),
    ],
)
def test_cache_folder(monkeypatch, platform, environment, expected):
    monkeypatch.setattr(settings.sys, "platform", platform)
    assert Settings.from_environment(environment).cache_dir == Path(expected)


def test_cache_folder_does_not_move_with_the_working_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    chosen = Settings.from_environment(HOME, cache_dir="cache")
    monkeypatch.chdir("/")
    assert chosen.cache_dir == tmp_path / "cache"


def test_cache_folder_of_a_home_folder_that_is_not_there():
    with pytest.raises(ValueError, match="cache_dir is '~no_such_user/x'.*absolute path"):
        Settings.from_environment(HOME, cache_dir="~no_such_user/x")
    with pytest.raises(ValueError, match="cache_dir is empty"):
        Settings.from_environment(HOME, cache_dir="")


def test_a_user_without_home_folder_is_told_what_to_set(monkeypatch):
    monkeypatch.setattr(settings.os.path, "expanduser", lambda path: path)
    with pytest.raises(ValueError, match="set WHISPER_MAX_CACHE_DIR"):
        Settings.from_environment({})
    chosen = Settings.from_environment({"WHISPER_MAX_CACHE_DIR": "/mnt/cache"})
    assert chosen.cache_dir == Path("/mnt/cache")


def test_active_settings_are_the_last_activated_else_the_environment(monkeypatch):
    monkeypatch.setenv("WHISPER_MAX_PRECISION", "medium")
    assert settings.active().precision == "medium"
    settings.activate(Settings(precision="int8"))
    try:
        assert settings.active().precision == "int8"
    finally:
        settings.activate(None)
    assert settings.active().precision == "medium"


def test_disabled_nests_and_ends_with_an_exception():
    assert not settings.is_disabled()
    with settings.disabled():
        with pytest.raises(KeyError), settings.disabled():
            raise KeyError
        assert settings.is_disabled()
    assert not settings.is_disabled()


def test_disabled_holds_in_its_own_thread_only():
    seen = []
    with settings.disabled():
        thread = threading.Thread(target=lambda: seen.append(settings.is_disabled()))
        thread.start()
        thread.join()
    assert seen == [False]
