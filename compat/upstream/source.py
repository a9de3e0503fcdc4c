"""Where the tests of a release of openai-whisper come from: its source, downloaded once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path
from urllib.error import URLError

ARCHIVE = "https://github.com/openai/whisper/archive/refs/tags/v{release}.tar.gz"
FOLDER_VARIABLE = "WHISPER_SOURCES"
"""A folder with archives that are there already, named v20250625.tar.gz and so on."""


class NoTests(LookupError):
    """There is no source with tests; the message has every place that was tried."""


def tests_of(release: str, folder: Path) -> Path:
    """The folder with upstream's tests, unpacked below `folder`. Raises NoTests."""
    tried = []
    for obtain in (_from_folder, _from_tag, _from_package_index):
        try:
            archive = obtain(release, folder)
        except NoTests as error:
            tried.append(str(error))
            continue
        tests = _unpack(archive, folder / "unpacked")
        if tests is not None:
            return tests
        tried.append(f"{archive.name} has no tests")
    raise NoTests("; ".join(tried))


def _from_folder(release: str, folder: Path) -> Path:
    given = os.environ.get(FOLDER_VARIABLE)
    for place in (Path(given) if given else folder, folder):
        archive = place / f"v{release}.tar.gz"
        if archive.is_file():
            return archive
    raise NoTests(f"no archive of the source in {FOLDER_VARIABLE}")


def _from_tag(release: str, folder: Path) -> Path:
    """The archive of the tag: the only one with the recording that the tests use."""
    url = ARCHIVE.format(release=release)
    archive = folder / f"v{release}.tar.gz"
    unfinished = archive.with_suffix(".unfinished")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as source, unfinished.open("wb") as file:
            shutil.copyfileobj(source, file)
    except (URLError, OSError) as error:
        raise NoTests(f"{url}: {error}") from error
    return unfinished.replace(archive)


def _from_package_index(release: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--dest", str(folder), f"openai-whisper=={release}"]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = [*folder.glob(f"openai?whisper-{release}.tar.gz")]
    if done.returncode or not archives:
        raise NoTests(f"the package index has no source of {release}")
    return archives[0]


def _unpack(archive: Path, folder: Path) -> Path | None:
    """The unpacked folder called tests, if the archive has one."""
    with tarfile.open(archive) as packed:
        members = [member for member in packed.getmembers() if "/tests/" in f"{member.name}/"]
        if not members:
            return None
        packed.extractall(folder, members=members, filter="data")
    return folder / members[0].name.partition("/")[0] / "tests"
