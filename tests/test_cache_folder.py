"""Who may write to the cache folder, locks between processes, and writes that are whole."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from whisper_max.runtime import cache_folder
from whisper_max.runtime.cache_folder import CacheRefused, is_locked, lock, open_cache

ROOT = Path(__file__).resolve().parents[1]
NOBODY = 65534


@pytest.fixture
def users_folder():
    """A folder of an ordinary user, as which the test then runs: root may write everywhere."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if os.geteuid() != 0:
            yield folder
            folder.chmod(0o700)
            return
        os.chown(folder, NOBODY, -1)
        os.seteuid(NOBODY)
        try:
            yield folder
        finally:
            os.seteuid(0)


def test_is_made_for_this_user_alone(tmp_path):
    before = os.umask(0)
    try:
        folder = open_cache(tmp_path / "a" / "b" / "whisper_max", create=True)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_looking_does_not_make_it(tmp_path):
    assert open_cache(tmp_path / "none") is None
    assert open_cache(tmp_path / "none" / "deeper") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_refused_when_others_may_write(tmp_path, mode):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(CacheRefused, match=f"mode {mode:o}.*WHISPER_MAX_CACHE_DIR"):
        open_cache(folder)


def test_refused_when_it_belongs_to_another_user(tmp_path, monkeypatch):
    owner = tmp_path.stat().st_uid
    if owner == 0:
        os.chown(tmp_path, NOBODY, -1)
        owner = NOBODY
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(CacheRefused, match=f"another user \\(uid {owner}\\)"):
        open_cache(tmp_path, create=True)


def test_refused_when_it_is_a_link(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(CacheRefused, match="is a link to 'real'"):
        open_cache(tmp_path / "link", create=True)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(CacheRefused, match="is a link"):
        open_cache(tmp_path / "dangling", create=True)
    assert not (tmp_path / "nowhere").exists()


def test_refused_when_anybody_could_exchange_it(tmp_path):
    (tmp_path / "open" / "cache").mkdir(parents=True, mode=0o700)
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(CacheRefused, match="is inside .*open, which every user can write to"):
        open_cache(tmp_path / "open" / "cache")
    (tmp_path / "open").chmod(0o1777)  # as /tmp is
    assert open_cache(tmp_path / "open" / "cache")


def test_refused_when_there_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CacheRefused, match="is not a folder"):
        open_cache(tmp_path / "file")
    with pytest.raises(CacheRefused, match="cannot be made: .*WHISPER_MAX_CACHE_DIR"):
        open_cache(tmp_path / "file" / "cache", create=True)


def test_unwritable_folder_is_read_but_not_written(users_folder):
    users_folder.chmod(0o500)
    assert open_cache(users_folder) == users_folder
    with pytest.raises(CacheRefused, match="cannot be written to.*WHISPER_MAX_CACHE_DIR"):
        open_cache(users_folder, create=True)
    with pytest.raises(CacheRefused, match="Permission denied"):
        open_cache(users_folder / "whisper_max", create=True)


def test_lock_is_exclusive_and_leaves_no_file(tmp_path):
    path = tmp_path / "a.lock"
    assert not is_locked(path)
    with lock(path) as held:
        assert held
        assert is_locked(path)
        with lock(path, wait=False) as second:
            assert not second
        assert is_locked(path)  # the attempt did not free it
    assert not path.exists()
    assert not is_locked(path)


COUNT_UP = """
import sys
from pathlib import Path
from whisper_max.runtime.cache_folder import lock
folder = Path(sys.argv[1])
for _ in range(200):
    with lock(folder / "a.lock"):
        counter = folder / "counter"
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def test_lock_holds_between_processes_although_its_file_is_removed(tmp_path):
    (tmp_path / "counter").write_text("0")
    command = [sys.executable, "-c", COUNT_UP, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(4)]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    assert (tmp_path / "counter").read_text() == "800"


def test_lock_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / "a.lock"
    hold = (
        "import sys, time; from pathlib import Path\n"
        "from whisper_max.runtime.cache_folder import lock\n"
        "with lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        assert is_locked(path)
        holder.kill()
    assert not is_locked(path)
    with lock(path, wait=False) as held:
        assert held


def test_json_is_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    cache_folder.write_json(path, {"n": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cache_folder.write_json(path, {"n": 2})
    assert cache_folder.read_json(path) == {"n": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("damage", [b"", b'{"n": ', b"\xff\xfe", b"[1]"])
def test_damaged_json_is_none(tmp_path, damage):
    path = tmp_path / "a.json"
    path.write_bytes(damage)
    assert cache_folder.read_json(path) is None


def test_links_and_pipes_are_not_read(tmp_path):
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    assert cache_folder.read_private(tmp_path / "real") == b"x"
    for name in ("link", "."):
        with pytest.raises(OSError):
            cache_folder.read_private(tmp_path / name)
