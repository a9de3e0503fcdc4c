"""The folder of compiled graphs: who may write to it, locks, and writes that are whole or absent.

A MEF is code that we load into the user's process. So the folder must belong to the user (or to
root) and nobody else may write to it; otherwise it is refused, and PyTorch does the work.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..report import is_of_the_system

REMEDY = "set WHISPER_MAX_CACHE_DIR to a folder that belongs to you and only you can write to"


class CacheRefused(RuntimeError):
    """The cache folder cannot be used; the message says why, and what to do about it."""


def open_cache(cache_dir: str | os.PathLike[str], *, create: bool = False) -> Path | None:
    """The cache folder after checking it, or None when it does not exist.

    create : make the folder, for this user alone, and check that it can be written to

    Raises CacheRefused when somebody else could have put files there, when the path is no folder,
    and, with `create`, when it cannot be made or written to.
    """
    folder = Path(cache_dir).absolute()
    try:
        if create and not os.path.lexists(folder):
            _make_private(folder)
        status = os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not create:
            return None
        raise _refused(folder, f"cannot be made: {error.strerror}") from error
    except OSError as error:
        if not is_of_the_system(error):
            raise
        raise _refused(folder, f"cannot be used: {error.strerror}") from error
    _check_owner(folder, status)
    if create and not _writable(folder):
        raise _refused(folder, "cannot be written to")
    return folder


def read_private(path: Path) -> bytes:
    """The bytes of a regular file that belongs to the user or root.

    Raises OSError when it cannot be read, is a link, is no file or belongs to somebody else.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()):
            raise PermissionError(errno.EPERM, "not a regular file of this user", str(path))
        return file.read()


def write_json(path: Path, content: dict) -> None:
    """Write `content` so that a reader sees all of it or the file of before.

    Raises OSError; nothing is left behind then.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        publish(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict | None:
    """The object in the file, or None when it is missing or damaged."""
    try:
        content = json.loads(read_private(path))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    except OSError as error:
        if not is_of_the_system(error):
            raise
        return None
    return content if isinstance(content, dict) else None


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file its name, after its bytes are on the disk; same folder or disk only."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock `path` against all other processes; yields whether it was got.

    wait : wait for another process to end its work; otherwise yield False at once

    The file is removed in the end. The system frees the lock of a process that dies.
    """
    descriptor = _acquire(path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock `path`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if not is_of_the_system(error):
            raise
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def size_of(path: Path) -> int:
    """The bytes in a file, or in all files below a folder; 0 for what is not there."""
    files = [path]
    if path.is_dir() and not path.is_symlink():
        files = [Path(parent, name) for parent, _, names in os.walk(path) for name in names]
    size = 0
    for file in files:
        with suppress(FileNotFoundError):  # MAX clears up while we count
            size += file.lstat().st_size
    return size


def _acquire(path: Path, operation: int) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, operation)
            # The holder of before removed the file: this lock then guards a file without a name,
            # and the next process would make and lock a new one beside us.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.lstat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:  # removed between the two looks
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _make_private(folder: Path) -> None:
    if not folder.parent.exists():
        _make_private(folder.parent)
    with suppress(FileExistsError):  # another process was faster
        folder.mkdir(mode=0o700)


def _writable(folder: Path) -> bool:
    effective = os.access in os.supports_effective_ids
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=effective)


def _check_owner(folder: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise _refused(folder, f"is a link to {os.readlink(folder)!r}; name the folder itself")
    if not stat.S_ISDIR(status.st_mode):
        raise _refused(folder, "is not a folder")
    if status.st_uid not in (0, os.geteuid()):
        raise _refused(folder, f"belongs to another user (uid {status.st_uid})")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        raise _refused(folder, f"can be written to by other users (mode {mode:o}; chmod it to 700)")
    for parent in folder.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:  # anybody could exchange the folder
            raise _refused(folder, f"is inside {parent}, which every user can write to")


def _refused(folder: Path, why: str) -> CacheRefused:
    return CacheRefused(f"the cache folder {folder} {why}; {REMEDY}")
