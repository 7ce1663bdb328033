"""Where claims lie: small files in the cache's folder, or small objects in its bucket."""

import contextlib
import os
import uuid
from datetime import datetime
from pathlib import Path
from typing import Protocol

from extract.cache.errors import CacheError
from extract.cache.remote import Bucket

FOLDER = ".claims"


class ClaimStore(Protocol):
    """What claims need of a place: exclusive creation, and ages by the place's own clock."""

    def create(self, name: str, content: bytes) -> bool:
        """Write a claim where there is none; whether it was there for the taking."""

    def read(self, name: str) -> bytes:
        """What a claim says; raises `FileNotFoundError` where there is none."""

    def touch(self, name: str) -> None:
        """Make a claim young again."""

    def age(self, name: str) -> float:
        """Seconds since it was made or touched; raises `FileNotFoundError`."""

    def remove(self, name: str) -> None:
        """Remove a claim, if there is one."""

    def names(self) -> list[str]:
        """All claims."""

    def close(self) -> None:
        """Remove the place itself if it is empty."""


class ClaimFiles:
    """Claims in `<cache>/.claims`. Raises `CacheError` when the cache cannot be written."""

    def __init__(self, root: Path) -> None:
        self.folder = root / FOLDER

    def create(self, name: str, content: bytes) -> bool:
        """See `ClaimStore`."""
        while True:
            try:
                # Again and again: whoever leaves last removes the folder.
                self.folder.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileNotFoundError:
                continue
            except FileExistsError:
                return False
            except OSError as error:
                raise CacheError(
                    f"cannot write a claim to {self.folder}: {error.strerror}"
                ) from None
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            return True

    def read(self, name: str) -> bytes:
        """See `ClaimStore`."""
        return (self.folder / name).read_bytes()

    def touch(self, name: str) -> None:
        """See `ClaimStore`."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.folder / name)

    def age(self, name: str) -> float:
        """By the clock that also dates the claims, whichever machine serves the files."""
        written = (self.folder / name).stat().st_mtime
        probe = self.folder / f"{uuid.uuid4().hex}.probe"
        try:
            probe.touch()
            return probe.stat().st_mtime - written
        finally:
            probe.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """See `ClaimStore`."""
        (self.folder / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """See `ClaimStore`."""
        return sorted(path.name for path in self.folder.glob("*")) if self.folder.exists() else []

    def close(self) -> None:
        """See `ClaimStore`."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()


class ClaimObjects:
    """Claims in `.claims/` below a cache's URL."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket

    def create(self, name: str, content: bytes) -> bool:
        """By conditional PUT."""
        return self.bucket.put_new(f"{FOLDER}/{name}", content)

    def read(self, name: str) -> bytes:
        """See `ClaimStore`."""
        return self.bucket.get(f"{FOLDER}/{name}")

    def touch(self, name: str) -> None:
        """Write it again: objects have no other way to become younger."""
        with contextlib.suppress(FileNotFoundError):
            self.bucket.put(f"{FOLDER}/{name}", self.read(name))

    def age(self, name: str) -> float:
        """By the store's own clock, in whole seconds."""
        written = self.bucket.modified(f"{FOLDER}/{name}")
        return (self._now() - written).total_seconds()

    def _now(self) -> datetime:
        probe = f"{FOLDER}/{uuid.uuid4().hex}.probe"
        self.bucket.put(probe, b"")
        try:
            return self.bucket.modified(probe)
        finally:
            self.bucket.delete([probe])

    def remove(self, name: str) -> None:
        """See `ClaimStore`."""
        self.bucket.delete([f"{FOLDER}/{name}"])

    def names(self) -> list[str]:
        """See `ClaimStore`."""
        return sorted(name.removeprefix(f"{FOLDER}/") for name in self.bucket.names(FOLDER))

    def close(self) -> None:
        """Buckets have no folders that could be left behind."""
