"""Who works on which tar, when many processes fill one cache and nobody coordinates them.

A claim is a small file or object in `.claims/` of the cache, made exclusively and touched while its
owner lives. A claim whose owner is dead (a process of this machine that is gone, or one anywhere
that has not touched it for `LEASE` seconds by the store's own clock) is taken over. Claims only
save work: if two processes work on one tar all the same, the first manifest of each unit counts.
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

from extract.cache.errors import UserError
from extract.sharing.claim_store import ClaimStore

LEASE = 120.0


class Claims:
    """Context manager: the claims of this process, kept alive by a thread, released at the end.

    `purpose` tells apart runs that do different work on the same tars. Raises `UserError` when the
    store cannot be written.
    """

    def __init__(self, store: ClaimStore, purpose: str, lease: float = LEASE) -> None:
        self.store, self.lease = store, lease
        self.purpose = hashlib.sha256(purpose.encode()).hexdigest()[:8]
        self._held: set[str] = set()
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
        for name in list(self._held):
            self._drop(name)
        for name in self.store.names():
            if self._dead(name):
                self.store.remove(name)
        self.store.close()

    def take(self, stem: str) -> bool:
        """Claim a tar; False when a living process has it."""
        name = self._name(stem)
        if not self._create(name):
            if not self._dead(name):
                return False
            # Two that find it dead at once may both get through: then both do the work.
            self.store.remove(name)
            return self._create(name)
        return True

    def release(self, stem: str) -> None:
        """Give a claim back."""
        self._drop(self._name(stem))

    def _name(self, stem: str) -> str:
        return f"{stem}.{self.purpose}"

    def _create(self, name: str) -> bool:
        # The last makes every claim unlike any other: a store tells by that whose it is.
        owner = {"machine": machine(), "process": os.getpid(), "claim": uuid.uuid4().hex}
        taken = self.store.create(name, json.dumps(owner).encode())
        if taken:
            self._held.add(name)
        return taken

    def _drop(self, name: str) -> None:
        self._held.discard(name)
        self.store.remove(name)

    def _dead(self, name: str) -> bool:
        """Whether the owner of a claim is gone; a claim that is just being written is alive."""
        try:
            age, owner = self.store.age(name), _owner(self.store.read(name))
        except FileNotFoundError:
            return True
        if age > self.lease:
            return True
        return owner.get("machine") == machine() and not _runs(owner.get("process"))

    def _beat(self) -> None:
        while not self._stop.wait(self.lease / 6):
            for name in list(self._held):
                # A claim that grows old for a moment costs double work at most.
                with contextlib.suppress(UserError, OSError):
                    self.store.touch(name)


def machine() -> str:
    """What tells this machine (and container) from others while it is up."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _owner(content: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(content)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


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
