"""A cache in a bucket, read and written by way of a local folder.

    s3://bucket/feats/…          the cache, in the layout of cache_layout.md
    ~/.cache/unic-distill/<id>/  its JSON files, and the objects that were needed lately

Reading: manifests and records are fetched on opening, the objects of a unit when a row of theirs is
first wanted: whole shards, compared with the manifest's sha256; those fetched longest ago are
removed when the folder grows beyond `UNIC_MIRROR_GB` (default: 80 % of what is free). Writing:
objects go under names made from their content, the manifest follows by a conditional PUT: of
several writers one wins, and data of two never mix.
"""

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from extract.cache.errors import CacheError, UserError
from extract.cache.remote import Bucket

THREADS = 16
LIMIT = "UNIC_MIRROR_GB"
SHARE_OF_FREE = 0.8


class Mirror:
    """The local side of a cache at `url`; `folder` defaults to one by the URL's digest."""

    def __init__(self, url: str, folder: Path | None = None) -> None:
        self.bucket = Bucket(url)
        self.folder = folder or default_folder(url)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.limit = _limit(self.folder)
        self._lock = threading.Lock()
        self._sizes: dict[Path, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.bucket.url, "folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"], state["folder"])  # type: ignore[misc]

    @property
    def url(self) -> str:
        """Where the cache is."""
        return self.bucket.url

    def refresh(self) -> None:
        """Make the local JSON files those of the bucket: fetch new ones, remove what is gone.

        Records that nothing else refers to by content may change (`tars/*.json`); they are fetched
        anew each time. Raises `RemoteError`.
        """
        names = {name for name in self.bucket.names() if _is_record(name)}
        for path in self.folder.rglob("*.json"):
            if _is_record(name := path.relative_to(self.folder).as_posix()) and name not in names:
                path.unlink()
        wanted = [
            name
            for name in sorted(names)
            if name.startswith("tars/") or not (self.folder / name).exists()
        ]
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda name: self.bucket.fetch(name, self.folder / name), wanted))

    def pull(self, path: Path) -> None:
        """Fetch a record that another process may have published; nothing if there is none."""
        with contextlib.suppress(FileNotFoundError):
            self.bucket.fetch(self.name(path), path)

    def name(self, path: Path) -> str:
        """The object that a local file stands for."""
        return path.relative_to(self.folder).as_posix()

    def fetch(self, path: Path, size: int, sha256: str) -> None:
        """Have an object of a unit here; raises `CacheError` where the bucket lost it."""
        try:
            self.bucket.fetch(self.name(path), path, sha256)
        except FileNotFoundError:
            raise CacheError(f"{self.url}/{self.name(path)} is missing") from None
        # The small ones are read again and again.
        if path.name != "zarr.json":
            self._make_room(path, size)

    def _make_room(self, path: Path, size: int) -> None:
        with self._lock:
            self._sizes[path] = size
            while sum(self._sizes.values()) > self.limit and len(self._sizes) > 1:
                oldest = next(iter(self._sizes))
                del self._sizes[oldest]
                oldest.unlink(missing_ok=True)

    def publish(self, path: Path, content: bytes, *, first: bool) -> bool:
        """Write a record to the bucket; whether it is there now. The local file becomes what is.

        With `first`, what is there already stays.
        """
        name = self.name(path)
        if not first:
            self.bucket.put(name, content)
            won = True
        else:
            won = self.bucket.put_new(name, content)
        self.bucket.fetch(name, path)
        return won

    def publish_group(self, group: Path, target: Path, objects: Mapping[str, Any]) -> None:
        """Upload a finished group under its name, and keep it here as if it had been fetched."""

        def upload(file: str) -> None:
            self.bucket.put(self.name(target / file), group / file)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(upload, objects))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(group, target)
        for file, (size, _) in objects.items():
            if not file.endswith("zarr.json"):
                self._make_room(target / file, size)

    def other_groups(self, manifest: Path, group: str) -> list[str]:
        """Objects of the unit's groups that its manifest does not name."""
        stem = self.name(manifest).removesuffix(".json")
        folder = stem.rpartition("/")[0]
        own = f"{folder}/{group}/"
        return [
            name
            for name in self.bucket.names(folder)
            if name.startswith(f"{stem}-") and ".zarr/" in name and not name.startswith(own)
        ]


def default_folder(url: str) -> Path:
    """Where a cache at a URL is mirrored, unless `UNIC_MIRROR` names the parent folder."""
    parent = os.environ.get("UNIC_MIRROR") or Path.home() / ".cache" / "unic-distill"
    return Path(parent) / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def _limit(folder: Path) -> int:
    """Bytes of objects to keep; raises `UserError` for a setting that is no number."""
    text = os.environ.get(LIMIT)
    if text is None:
        return int(shutil.disk_usage(folder).free * SHARE_OF_FREE)
    try:
        return int(float(text) * 1e9)
    except ValueError:
        raise UserError(f"the environment says {LIMIT}={text!r}, expected gigabytes") from None


def _is_record(name: str) -> bool:
    """Whether an object is a JSON file of the cache, and not one inside of a Zarr group."""
    return name.endswith(".json") and ".zarr/" not in name and not name.startswith(".")
