"""A private folder inside the cache where files are made before they are published.

Its owner holds a lock on it for as long as the process lives, however it ends; so whoever starts
next can tell a dead process's leftovers (removed) from a living one's work (left alone).
"""

import fcntl
import os
import shutil
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from extract.cache.errors import CacheError

PREFIX = ".staging-"


class Staging:
    """Context manager: creates the cache's root and a locked staging folder in it.

    Raises `CacheError` when the root cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __enter__(self) -> Self:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.folder, self._lock = self._create()
        except OSError as error:
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
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Between mkdir and flock a starting process may have taken the folder for abandoned.
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
