"""A private folder inside the cache where files are made before they are published.

Its owner holds a lock on it for as long as the process lives, however it ends; so whoever starts
next can tell a dead process's leftovers (removed) from a living one's work (left alone).
"""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from extract.cache.errors import CacheError

PREFIX = ".staging-"
# No space, over quota, over the limit on a file's size.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Inside, a full disk is a `CacheError` that names `folder` and says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise CacheError(full_disk(folder, error)) from error


def full_disk(folder: Path, error: OSError) -> str:
    """What to tell the user whose disk cannot take another file below `folder`."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    return (
        f"{error.strerror} while writing to {folder} ({free:,} bytes are free there): what was "
        "finished is kept; make room (or raise the quota or the limit on file sizes), and the same "
        "command goes on from there"
    )


class Staging:
    """Context manager: creates the cache's root and a locked staging folder in it.

    Raises `CacheError` when the root cannot be written, and when the disk is full at any time until
    the end.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __enter__(self) -> Self:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.folder, self._lock = self._create()
        except OSError as error:
            if error.errno in FULL:
                raise CacheError(full_disk(self.root, error)) from None
            raise CacheError(
                f"cannot write to the cache {self.root}: {error.strerror}; "
                "choose a folder that can be written with --cache"
            ) from None
        for other in self.root.glob(f"{PREFIX}*"):
            _remove_if_abandoned(other)
        return self

    def _create(self) -> tuple[Path, int]:
        while True:
            folder = self.root / f"{PREFIX}{uuid.uuid4().hex}"
            folder.mkdir()
            # Until it is locked, another process that starts may take the folder for abandoned.
            try:
                lock = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:
                continue
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        if isinstance(error, OSError) and error.errno in FULL:
            raise CacheError(full_disk(self.root, error)) from error


def _remove_if_abandoned(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)
