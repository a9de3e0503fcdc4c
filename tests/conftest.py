"""Fixtures of more than one test file."""

import hypothesis
import pytest

from whisper_max.runtime import compilation
from whisper_max.settings import ENVIRONMENT

from compile_tools import Compiling, forget_this_process
from isolation import unpatched  # noqa: F401

hypothesis.settings.register_profile("unhurried", deadline=None)  # the machine may be busy
hypothesis.settings.load_profile("unhurried")


@pytest.fixture
def compiling(tmp_path):
    """A `Compiling` in a folder of its own; begins like a new process, leaves no compile behind."""
    forget_this_process()
    yield Compiling(tmp_path)
    for child in compilation._children.values():
        child.wait(30)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache folder that is not there yet, and no other setting from the environment."""
    for variable in ENVIRONMENT.values():
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "cache"
    monkeypatch.setenv("WHISPER_MAX_CACHE_DIR", str(folder))
    return folder
