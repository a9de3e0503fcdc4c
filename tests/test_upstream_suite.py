"""Where upstream's own tests come from, and the list of those that are expected to fail."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from compat.upstream import conditions, source

LIST = Path(source.__file__).with_name("expected_failures.yaml")


def archive(path: Path, *names: str) -> None:
    """A source archive with these files, all of them empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as packed:
        for name in names:
            packed.addfile(tarfile.TarInfo(name), io.BytesIO())


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """The folder for sources; nothing can be downloaded into it."""

    def unreachable(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.delenv(source.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(source.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(source, "_from_package_index", lambda *_: _none("the index has none"))
    return tmp_path / "sources"


def _none(message: str) -> Path:
    raise source.NoTests(message)


def test_an_archive_that_is_there_is_unpacked(offline):
    archive(offline / "v1.tar.gz", "whisper-1/whisper/model.py", "whisper-1/tests/test_it.py")
    tests = source.tests_of("1", offline)
    assert [path.name for path in tests.iterdir()] == ["test_it.py"]
    assert not (tests.parent / "whisper").exists()  # the installed one is what is tested


def test_a_folder_of_archives_can_be_given(offline, monkeypatch, tmp_path):
    archive(tmp_path / "given" / "v1.tar.gz", "whisper-1/tests/test_it.py")
    monkeypatch.setenv(source.FOLDER_VARIABLE, str(tmp_path / "given"))
    assert (source.tests_of("1", offline) / "test_it.py").is_file()


def test_without_a_source_every_place_is_named(offline):
    archive(offline / "v1.tar.gz", "whisper-1/whisper/model.py")
    with pytest.raises(source.NoTests) as error:
        source.tests_of("1", offline)
    for reason in ("v1.tar.gz has no tests", "no route to host", "the index has none"):
        assert reason in str(error.value)


def test_list_of_expected_failures_is_complete():
    yaml = pytest.importorskip("yaml", reason="the list needs pyyaml")
    for entry in yaml.safe_load(LIST.read_text(encoding="utf-8")):
        assert set(entry) == {"reason", "condition", "strict", "tests"}
        assert entry["strict"] in (True, False)
        assert entry["reason"] and entry["tests"]
        assert conditions.hold(entry["condition"], "test_transcribe[none such]") in (True, False)
