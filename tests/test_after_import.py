"""An action waits for an import, and happens once."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys

import pytest

from whisper_max.after_import import call_after_import


@pytest.fixture(autouse=True)
def package(monkeypatch, tmp_path):
    """A package `awaited` on sys.path that says when its own code is through."""
    folder = tmp_path / "awaited"
    folder.mkdir()
    (folder / "__init__.py").write_text("from . import part\nready = True\n")
    (folder / "part.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield folder
    for name in ("awaited", "awaited.part"):
        sys.modules.pop(name, None)


@pytest.fixture
def seen() -> list[bool]:
    return []


@pytest.fixture
def watch(seen):
    call_after_import("awaited", lambda: seen.append(sys.modules["awaited"].ready))


def test_the_action_follows_the_import_once(watch, seen):
    assert seen == []
    importlib.import_module("awaited.part")
    assert seen == [True]
    importlib.import_module("awaited")
    importlib.reload(sys.modules["awaited"])
    assert seen == [True]


def test_after_the_import_it_happens_at_once(seen):
    importlib.import_module("awaited")
    call_after_import("awaited", lambda: seen.append(True))
    assert seen == [True]


def test_looking_for_the_package_is_not_importing_it(watch, seen):
    assert importlib.util.find_spec("awaited").origin.endswith("__init__.py")
    assert importlib.util.find_spec("awaited").loader.is_package("awaited")
    assert seen == []
    importlib.import_module("awaited")
    assert seen == [True]


def test_an_import_that_fails_may_be_repeated(watch, seen, package):
    (package / "__init__.py").write_text("import no_such_module_at_all\n")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("awaited")
    assert seen == []
    (package / "__init__.py").write_text("ready = 'at the second attempt'\n")
    importlib.invalidate_caches()
    importlib.import_module("awaited")
    assert seen == ["at the second attempt"]


def test_a_package_that_is_not_there_is_missing_as_ever(seen):
    call_after_import("no_such_module_at_all", lambda: seen.append(True))
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module_at_all'"):
        importlib.import_module("no_such_module_at_all")
    assert seen == []


def test_an_error_of_the_action_comes_out_of_the_import():
    def action():
        raise RuntimeError("no")

    call_after_import("awaited", action)
    with pytest.raises(RuntimeError, match="no"):
        importlib.import_module("awaited")


def test_the_package_is_an_ordinary_one(watch):
    module = importlib.import_module("awaited")
    assert inspect.getsource(module).startswith("from . import part")
    assert type(module.__spec__.loader) is importlib.machinery.SourceFileLoader
