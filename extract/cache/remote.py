"""Objects at URLs: s3, gs, az and http(s) through obstore, hf through the hub's own library.

Every request is bounded: obstore retries refused and dropped connections and server errors, and
whatever arrives is compared with the length (and the sha256, where it is known) before it counts;
after `TRIES` attempts there is an error that names the URL. Credentials, region and endpoint come
from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, …).
"""

import hashlib
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from extract.cache.errors import UserError

TRIES = 5
TIMEOUT, RETRY_SECONDS = "60s", 60
PIECE = 8 * 1024**2
T = TypeVar("T")


class RemoteError(UserError):
    """A bucket or server that cannot be reached, refuses, or does not hold what it should."""


def is_url(location: str | Path) -> bool:
    """Whether a location is a URL, and not a path."""
    return "://" in str(location)


class Bucket:
    """The objects below a URL, by relative name. Can be pickled; connects when first used."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    @cached_property
    def store(self) -> Any:
        """The obstore store; raises `RemoteError` for a URL that it does not know."""
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        plain = self.url.startswith("http://") or endpoint.startswith("http://")
        try:
            return from_url(
                self.url,
                client_options={"timeout": TIMEOUT, "allow_http": plain},
                retry_config={
                    "max_retries": TRIES,
                    "retry_timeout": timedelta(seconds=RETRY_SECONDS),
                },
            )
        except (BaseError, ValueError) as error:
            raise RemoteError(f"{self.url} cannot be opened: {_first_line(error)}") from None

    def get(self, name: str, sha256: str | None = None) -> bytes:
        """One whole object; raises `FileNotFoundError` where there is none."""
        import obstore

        def once() -> bytes:
            answer = obstore.get(self.store, name)
            data = bytes(answer.bytes())
            _compare(len(data), answer.meta["size"], lambda: data, sha256)
            return data

        return self._bounded(name, once)

    def fetch(self, name: str, target: Path, sha256: str | None = None) -> None:
        """One whole object into a file, which appears when it is complete and checked."""
        import obstore

        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")

        def once() -> None:
            answer, digest, length = obstore.get(self.store, name), hashlib.sha256(), 0
            with draft.open("wb") as file:
                for piece in answer.stream(min_chunk_size=PIECE):
                    file.write(piece)
                    digest.update(piece)
                    length += len(piece)
            _compare(length, answer.meta["size"], digest.digest, None)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise ValueError(f"its sha256 is {digest.hexdigest()}, expected {sha256}")

        try:
            self._bounded(name, once)
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)

    def size(self, name: str) -> int:
        """Bytes of an object; raises `FileNotFoundError` where there is none."""
        import obstore

        return int(self._bounded(name, lambda: obstore.head(self.store, name)["size"]))

    def modified(self, name: str) -> datetime:
        """When an object was written, by the clock of the store."""
        import obstore

        when: datetime = self._bounded(
            name, lambda: obstore.head(self.store, name)["last_modified"]
        )
        return when

    def put(self, name: str, content: bytes | Path) -> None:
        """Write an object, whatever was there."""
        import obstore

        self._bounded(name, lambda: obstore.put(self.store, name, content))

    def put_new(self, name: str, content: bytes) -> bool:
        """Write an object where there is none yet (conditional PUT); whether this one is there now.

        An answer that got lost on its way is found out by reading the object.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        def once() -> bool:
            try:
                obstore.put(self.store, name, content, mode="create")
            except AlreadyExistsError:
                return self.get(name) == content
            return True

        return self._bounded(name, once)

    def delete(self, names: list[str]) -> None:
        """Remove objects; those that are not there are no fault."""
        import obstore

        if names:
            self._bounded(names[0], lambda: obstore.delete(self.store, names))

    def names(self, prefix: str = "") -> Iterator[str]:
        """Relative names of all objects below a prefix."""
        import obstore

        yield from self._bounded(
            prefix,
            lambda: [
                item["path"] for batch in obstore.list(self.store, prefix or None) for item in batch
            ],
        )

    def _bounded(self, name: str, once: Callable[[], T]) -> T:
        from obstore.exceptions import BaseError

        for attempt in range(TRIES):
            try:
                return once()
            except FileNotFoundError:
                raise
            except (BaseError, OSError, ValueError) as error:
                if attempt == TRIES - 1:
                    raise RemoteError(
                        f"{self.url}/{name}: {_first_line(error)} (tried {TRIES} times)"
                    ) from None
                time.sleep(random.uniform(0.5, 1) * 0.1 * 2**attempt)
        raise AssertionError("unreachable")


def _compare(length: int, expected: int, content: Callable[[], bytes], sha256: str | None) -> None:
    if length != expected:
        raise ValueError(f"{length} bytes arrived, expected {expected}")
    if sha256 is not None and hashlib.sha256(content()).hexdigest() != sha256:
        raise ValueError(f"what arrived does not have the sha256 {sha256}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def fetch_url(url: str, target: Path) -> None:
    """Download what is at a URL; raises `RemoteError`."""
    if url.startswith("hf://"):
        _fetch_from_hub(url, target)
        return
    parent, _, name = url.rpartition("/")
    try:
        Bucket(parent).fetch(name, target)
    except FileNotFoundError:
        raise RemoteError(
            f"there is nothing at {url}: check the address given for the data"
        ) from None


def _fetch_from_hub(url: str, target: Path) -> None:
    """`hf://datasets/ORG/NAME[@REVISION]/FILE`, by way of the hub's own cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    parts = url.removeprefix("hf://").split("/")
    kind = {"datasets": "dataset", "spaces": "space"}.get(parts[0])
    parts = parts[1:] if kind else parts
    if len(parts) < 3:
        raise RemoteError(f"{url!r}: expected hf://datasets/ORG/NAME/FILE")
    name, _, revision = parts[1].partition("@")
    try:
        found = hf_hub_download(
            f"{parts[0]}/{name}",
            "/".join(parts[2:]),
            repo_type=kind or "model",
            revision=revision or None,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise RemoteError(f"{url} cannot be fetched: {_first_line(error)}") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.symlink_to(Path(found).resolve())
