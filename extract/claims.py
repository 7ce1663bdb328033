"""Who works on which tar, when many processes fill one cache and nobody coordinates them.

A claim is a small file in `<cache>/.claims`, made exclusively and touched while its owner lives. A
claim whose owner is dead (a process of this machine that is gone, or one anywhere that has not
touched it for `LEASE` seconds by the file system's own clock) is taken over. Claims only save
work: if two processes work on one tar all the same, the first manifest of each unit counts.
"""

import contextlib
import hashlib
import json
import os
import socket
import threading
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from extract.cache.errors import CacheError

FOLDER = ".claims"
LEASE = 120.0


class Claims:
    """Context manager: the claims of this process, kept alive by a thread, released at the end.

    `purpose` tells apart runs that do different work on the same tars. Raises `CacheError` when
    the cache cannot be written.
    """

    def __init__(self, root: Path, purpose: str, lease: float = LEASE) -> None:
        self.folder, self.lease = root / FOLDER, lease
        self.purpose = hashlib.sha256(purpose.encode()).hexdigest()[:8]
        self._held: set[Path] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        for path in list(self._held):
            self._drop(path)
        for path in self._all():
            if self._dead(path):
                path.unlink(missing_ok=True)
        # Whoever leaves last takes the folder along.
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def take(self, stem: str) -> bool:
        """Claim a tar; False when a living process has it."""
        path = self._path(stem)
        if self._create(path):
            return True
        if not self._dead(path):
            return False
        # Of several that find it dead, one moves it away.
        aside = path.with_name(f"{path.name}-{uuid.uuid4().hex}.dead")
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, aside)
            aside.unlink()
        return self._create(path)

    def release(self, stem: str) -> None:
        """Give a claim back."""
        self._drop(self._path(stem))

    def _path(self, stem: str) -> Path:
        return self.folder / f"{stem}.{self.purpose}"

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("*")) if self.folder.exists() else []

    def _create(self, path: Path) -> bool:
        try:
            # Again and again: whoever leaves last removes the folder.
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileNotFoundError:
            return self._create(path)
        except FileExistsError:
            return False
        except OSError as error:
            raise CacheError(f"cannot write a claim to {path}: {error.strerror}") from None
        with os.fdopen(handle, "w") as file:
            json.dump({"machine": machine(), "process": os.getpid()}, file)
        self._held.add(path)
        return True

    def _drop(self, path: Path) -> None:
        self._held.discard(path)
        path.unlink(missing_ok=True)

    def _dead(self, path: Path) -> bool:
        """Whether the owner of a claim is gone; a claim that is just being written is alive."""
        try:
            age = self._now() - path.stat().st_mtime
            owner = _owner(path)
        except FileNotFoundError:
            return True
        if age > self.lease:
            return True
        return owner.get("machine") == machine() and not _runs(owner.get("process"))

    def _now(self) -> float:
        """The time by the clock that also dates the claims, whichever machine serves the files."""
        probe = self.folder / f"{uuid.uuid4().hex}.probe"
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(self.lease / 6):
            for path in list(self._held):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)


def machine() -> str:
    """What tells this machine (and container) from others while it is up."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _owner(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _runs(process: object) -> bool:
    if not isinstance(process, int):
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
