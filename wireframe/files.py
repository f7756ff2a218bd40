"""Files that are whole under their name or not there at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from wireframe.errors import ConfigError

# What a file system answers that knows no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def check_target(path: str | os.PathLike) -> Path:
    """The regular file behind ``path`` (links followed), there or not yet.

    Raises:
        OSError: the path is empty, a folder, a device or pipe, which a rename would replace, or in a folder that may
            not be written to.
    """
    if not os.fspath(path):
        raise FileNotFoundError(errno.ENOENT, "an empty path cannot be written", "")
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, give the name of a file", os.fspath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "is not a regular file, give another name", os.fspath(path))
    # Before the work, not after it.
    if target.parent.is_dir() and not os.access(target.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "the folder may not be written to", os.fspath(target.parent))
    return target


def read_at_most(path: str | os.PathLike, limit: int) -> bytes | None:
    """The bytes of a file or pipe; None where there are more than ``limit``. Raises OSError."""
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    return None if len(data) > limit else data


def read_capped(path: str | os.PathLike, limit: int, wanted: str) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes; ``wanted`` says what to give instead of another one.

    Raises:
        ConfigError: it is larger, or a folder, device or pipe. OSError: it cannot be read.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ConfigError(f"{os.fspath(path)} is no regular file; give {wanted}")
    data = read_at_most(path, limit)
    if data is None:
        raise ConfigError(f"{os.fspath(path)} has more than {limit >> 20} MiB; give {wanted}")
    return data


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that takes its name only when the ``with`` block ends without an exception.

    The bytes go to a temporary file in the same folder, are synced to disk and renamed; on an exception nothing is
    left behind and an older file of that name stays. What a process that was killed had left of it is removed.

    Raises:
        OSError: see ``check_target``, or the file cannot be written; it names ``path``.
    """
    target = check_target(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    _remove_strays(target)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as problem:
        if problem.errno is None:
            raise
        # The user knows the file's name, not the temporary one.
        raise OSError(problem.errno, problem.strerror, os.fspath(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def _remove_strays(target: Path) -> None:
    """Removes temporary files of the target whose process is not there any more, as far as they can be."""
    name = re.compile(re.escape(f".{target.name}.") + r"([1-9]\d{0,8})\.tmp", re.ASCII)
    with contextlib.suppress(OSError):
        for found in filter(None, map(name.fullmatch, os.listdir(target.parent))):
            if not _is_alive(int(found.group(1))):
                with contextlib.suppress(OSError):
                    target.with_name(found.group()).unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # It is another user's.
        return True
    return True


@contextlib.contextmanager
def only_process(path: str | os.PathLike, wait: bool = True) -> Iterator[None]:
    """Holds the lock of the file ``path`` while the ``with`` block runs: one process, and one block, at a time.

    The lock goes when the process ends, however it ends; the file stays, since removing it would let two processes
    lock two files of one name. On a file system without locks nothing is locked.

    Args:
        path: made where it is not there; its folder must be.
        wait: for the one that holds it; else BlockingIOError.

    Raises:
        BlockingIOError: it is held, and ``wait`` is False. OSError: the file cannot be made.
    """
    import fcntl

    with open(path, "ab") as file:
        locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as problem:
            if problem.errno not in _NO_LOCKS:
                raise
            locked = False
        try:
            yield
        finally:
            if locked:
                # Closing would not do: a child that was forked meanwhile has the file open, too.
                fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def sole_process(path: str | os.PathLike, who: str) -> Iterator[None]:
    """``only_process`` that does not wait; ``who`` is what the other process does, "trains into RUN".

    Raises:
        ConfigError: another process holds the lock. OSError: the file cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(only_process(path, wait=False))
        except BlockingIOError:
            raise ConfigError(f"another process {who}; wait until it has ended, or end it") from None
        yield


def write_synced(path: str | os.PathLike, data: bytes) -> None:
    """Writes a new file and returns when it is on the disk. Raises OSError."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: str | os.PathLike) -> None:
    """Returns when the names in a folder are on the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
