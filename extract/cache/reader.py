"""Opening a cache: what is in it, whether it is whole and consistent, and its exact statistics.

Nothing here reads features; `extract.cache.dataset` does, from a `Selection` that was checked here.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extract.cache.direct import REMEDY, DirectArray
from extract.cache.errors import CacheError
from extract.cache.mirror import Mirror
from extract.cache.remote import is_url
from extract.cache.schema import (
    CODECS,
    FORMAT_VERSION,
    SUBSETS,
    VIEWS,
    CacheRecord,
    CodecRecord,
    EncoderRecord,
    Layout,
    Record,
    TarRecord,
    UnitRecord,
    subset_owner,
)
from extract.cache.statistics import Moments, merged


class Unit:
    """One published unit: its manifest, and its arrays by name, opened lazily.

    Raises `CacheError` on opening when a file is missing, has another size than the manifest
    says, or when a `zarr.json` changed (a flipped bit there would change data silently). With a
    `mirror`, files that are not here are fetched when they are wanted.
    """

    def __init__(self, manifest: Path, mirror: Mirror | None = None) -> None:
        self.record = UnitRecord.read(manifest)
        self.folder = manifest.parent / self.record.group
        self.mirror = mirror
        for name, (size, checksum) in self.record.objects.items():
            path = self.folder / name
            if mirror is not None and not path.exists():
                if path.name != "zarr.json":
                    continue
                self._fetch(path)
            self._check(path, size, checksum)
        self._arrays: dict[str, DirectArray] = {}
        self._columns: dict[str, NDArray[Any]] = {}

    @staticmethod
    def _check(path: Path, size: int, checksum: str) -> None:
        found = path.stat().st_size if path.exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CacheError(f"{path} {state}, its manifest says {size} bytes: {REMEDY}")
        if path.name == "zarr.json" and sha256(path.read_bytes()).hexdigest() != checksum:
            raise CacheError(f"{path} was changed since its manifest was written: {REMEDY}")

    def _fetch(self, path: Path) -> None:
        assert self.mirror is not None
        size, checksum = self.record.objects[path.relative_to(self.folder).as_posix()]
        self.mirror.fetch(path, size, checksum)

    def array(self, name: str) -> DirectArray:
        """The stored array; raises `CacheError` when the unit has none of that name."""
        if name not in self._arrays:
            if name not in self.record.arrays:
                raise CacheError(
                    f"{self.folder} has no array {name!r}; it has {sorted(self.record.arrays)}"
                )
            fetch = None if self.mirror is None else self._fetch
            self._arrays[name] = DirectArray(self.folder / name, fetch)
        return self._arrays[name]

    def column(self, name: str) -> NDArray[Any]:
        """All rows `[N, ...]` of a small array (keys, parameters of views), kept once read."""
        if name not in self._columns:
            self._columns[name] = self.array(name).read_all()
        return self._columns[name]

    @property
    def has_jpegs(self) -> bool:
        """Whether the views are stored as JPEG."""
        return "jpeg" in self.record.arrays

    def jpeg(self, row: int) -> bytes:
        """The stored JPEG of one view."""
        bounds = self.column("jpeg_offset")
        return self.array("jpeg").read_range(int(bounds[row]), int(bounds[row + 1])).tobytes()

    @property
    def keys(self) -> NDArray[np.uint64]:
        """Key digests `[N]` of the rows, in the order of the tar."""
        return self.column("key")


class Cache:
    """A feature cache in a folder or at a URL, read-only.

    Raises `CacheError` when `root` is no cache or is of another format version, `RemoteError` when
    a bucket cannot be read.
    """

    def __init__(self, root: Path | str | Mirror) -> None:
        if is_url(str(root)):
            root = Mirror(str(root))
            root.refresh()
        self.mirror = root if isinstance(root, Mirror) else None
        self.layout = Layout(root.folder if isinstance(root, Mirror) else Path(root))
        if not self.layout.cache.exists():
            raise CacheError(
                f"{root} is not a feature cache (there is no cache.json in it); "
                "make one with: unic-extract --teacher dino --data 'tars-*.tar' --cache "
                f"{root}"
            )
        self.record = CacheRecord.read(self.layout.cache)
        if self.record.format_version != FORMAT_VERSION:
            raise CacheError(
                f"{root} has format version {self.record.format_version}, this unic-extract reads "
                f"version {FORMAT_VERSION}: extract again, or install the matching version"
            )

    @property
    def root(self) -> Path:
        """The cache's folder, or the folder that mirrors it."""
        return self.layout.root

    @property
    def location(self) -> str:
        """What to call the cache: its folder or its URL."""
        return str(self.root) if self.mirror is None else self.mirror.url

    def publish(self, record: Record, path: Path, aside: Path, *, first: bool = True) -> bool:
        """Write one of the cache's JSON files, whole or not at all; whether it is there now.

        With `first`, what is there already stays. `aside` is a folder of this process's own.
        """
        if self.mirror is not None:
            return self.mirror.publish(path, record.content(), first=first)
        if first:
            return record.publish_first(path, aside)
        record.write(path, aside)
        return True

    def encoders(self) -> list[str]:
        """Names of all encoders with features in the cache, sorted."""
        return self.layout.encoders()

    def tars(self) -> list[str]:
        """Stems of all tars that the cache knows, sorted."""
        return sorted(path.stem for path in (self.root / "tars").glob("*.json"))

    def view_owners(self) -> list[str]:
        """The folders of units that belong to no encoder: `views`, and kept patches by grid."""
        kept = sorted(path.name for path in self.root.glob(f"{SUBSETS}*"))
        return [VIEWS, *kept]

    def encoder(self, name: str) -> EncoderRecord:
        """The encoder's record; raises `CacheError` that lists what there is."""
        path = self.layout.encoder(name)
        if not path.exists() and name not in self.encoders():
            raise CacheError(
                f"the cache {self.root} has no features of {name!r}; it has "
                f"{self.encoders() or 'none at all'}"
            )
        return EncoderRecord.read(path)

    def codec(self, encoder: str, recipe: str) -> CodecRecord:
        """How that encoder's features are stored; raises `CacheError` for codecs unknown here."""
        path = self.layout.codec(encoder, recipe)
        if not path.exists():
            raise CacheError(
                f"the cache {self.root} has no features of {encoder!r} under {recipe}; it has "
                f"{', '.join(self.recipes(encoder)) or 'none at all'}: extract them, or choose "
                "another --recipe"
            )
        record = CodecRecord.read(path)
        if record.codec not in CODECS:
            raise CacheError(
                f"{encoder}/{recipe} is stored with codec {record.codec!r}; this version reads "
                f"{', '.join(CODECS)}"
            )
        return record

    def subset(self, encoder: str, recipe: str) -> str | None:
        """The folder with the kept patches of that encoder's features, None if all are kept."""
        rows, columns = self.encoder(encoder).grid
        kept = self.codec(encoder, recipe).patches
        return subset_owner((rows, columns)) if kept is not None else None

    def recipes(self, owner: str = VIEWS) -> list[str]:
        """Recipe labels (`unic@224`) under which `owner` has complete units."""
        found = self.layout.root.glob(f"{owner}/*/*/*.json")
        return sorted({path.parent.parent.name for path in found})

    def units(self, owner: str, recipe: str) -> set[tuple[int, str]]:
        """`(view, tar)` of every complete unit of an encoder, or of `views`."""
        found = (self.layout.root / owner / recipe).glob("*/*.json")
        return {(int(path.parent.name), path.stem) for path in found}

    def unit(self, owner: str, recipe: str, view: int, tar: str) -> Unit:
        """Open a unit; raises `CacheError` when it has no manifest or is damaged."""
        return Unit(self.layout.manifest(owner, recipe, view, tar), self.mirror)

    def tar(self, stem: str) -> TarRecord:
        """The record of one image tar."""
        return TarRecord.read(self.layout.tar(stem))


@dataclass(frozen=True)
class Selection:
    """Encoders, views and tars of one recipe that are all there and agree with each other."""

    cache: Cache
    recipe: str
    encoders: tuple[str, ...]
    views: tuple[int, ...]
    tars: tuple[str, ...]

    @cached_property
    def rows_per_tar(self) -> NDArray[np.int64]:
        """Rows `[tars]` that each chosen tar has in every view."""
        manifests = (
            self.cache.layout.manifest(VIEWS, self.recipe, self.views[0], tar) for tar in self.tars
        )
        return np.array([UnitRecord.read(path).rows for path in manifests], dtype=np.int64)

    def statistics(self, encoder: str) -> dict[str, Moments]:
        """Exact moments of each token type over all chosen rows and views, from the manifests."""
        parts: dict[str, list[Moments]] = {}
        for view in self.views:
            for tar in self.tars:
                manifest = self.cache.layout.manifest(encoder, self.recipe, view, tar)
                for name, content in UnitRecord.read(manifest).statistics.items():
                    parts.setdefault(name, []).append(Moments.from_json(content))
        return {name: merged(moments) for name, moments in parts.items()}


def select(
    cache: Cache,
    encoders: Iterable[str] | None = None,
    recipe: str | None = None,
    views: int | None = None,
    tars: Iterable[str] | None = None,
) -> Selection:
    """Choose a part of the cache and check that it is whole.

    Defaults: all encoders, the only recipe that they share, all its views, all its tars. Raises
    `CacheError` that names what is missing or does not agree: an encoder without features of a tar
    or view, features computed from other views or by another encoder than the cache records.
    """
    names = tuple(encoders) if encoders is not None else tuple(cache.encoders())
    if not names:
        raise CacheError(
            f"the cache {cache.root} holds no encoder's features yet: run unic-extract"
        )
    for name in names:
        cache.encoder(name)
    label = recipe or _shared_recipe(cache, names)
    # Of all owners: what one of them has lost must not look as if it had never been.
    stored = set().union(*(cache.units(owner, label) for owner in (VIEWS, *names)))
    chosen_tars = tuple(sorted(tars)) if tars is not None else tuple(sorted({t for _, t in stored}))
    chosen_views = tuple(sorted({view for view, _ in stored}))
    if views is not None:
        chosen_views = _first_views(cache, label, chosen_views, views)
    for owner in (VIEWS, *names, *_subsets(cache, names, label)):
        _check_whole(cache, owner, label, chosen_views, chosen_tars)
    selection = Selection(cache, label, names, chosen_views, chosen_tars)
    for name in names:
        _check_agreement(selection, name)
    return selection


def _subsets(cache: Cache, names: tuple[str, ...], label: str) -> list[str]:
    """Folders of the kept patches that these encoders' features need."""
    return sorted({owner for name in names if (owner := cache.subset(name, label)) is not None})


def _shared_recipe(cache: Cache, names: tuple[str, ...]) -> str:
    shared = sorted(set.intersection(*(set(cache.recipes(name)) for name in names)))
    if len(shared) != 1:
        each = "; ".join(f"{name}: {', '.join(cache.recipes(name)) or 'none'}" for name in names)
        raise CacheError(
            f"expected one recipe that all encoders share, found {shared or 'none'} ({each}): "
            "name one with --recipe, or extract the missing one"
        )
    return shared[0]


def _first_views(cache: Cache, label: str, stored: tuple[int, ...], views: int) -> tuple[int, ...]:
    if not 1 <= views <= len(stored):
        raise CacheError(
            f"the cache {cache.root} has {len(stored)} views of {label}, {views} were asked for: "
            f"extract more with unic-extract --views {views}"
        )
    return stored[:views]


def _check_whole(
    cache: Cache, owner: str, label: str, views: tuple[int, ...], tars: tuple[str, ...]
) -> None:
    missing = sorted({(view, tar) for view in views for tar in tars} - cache.units(owner, label))
    if missing or not tars:
        view, tar = missing[0] if missing else (0, "any tar")
        raise CacheError(
            f"{owner}/{label} lacks {len(missing) or 'all'} of {len(views) * len(tars)} units, "
            f"the first is view {view} of {tar}: run unic-extract again with the same arguments "
            "(it computes only what is missing), or choose fewer --views or encoders"
        )


def _check_agreement(selection: Selection, name: str) -> None:
    """Features must come from the stored views and the recorded encoder, row for row."""
    cache, label = selection.cache, selection.recipe
    encoder, codec = cache.encoder(name), cache.codec(name, label)
    subset = cache.subset(name, label)
    for tar in selection.tars:
        tar_record = cache.tar(tar)
        for view in selection.views:
            views = UnitRecord.read(cache.layout.manifest(VIEWS, label, view, tar))
            features = UnitRecord.read(cache.layout.manifest(name, label, view, tar))
            kept = subset and UnitRecord.read(cache.layout.manifest(subset, label, view, tar))
            expected = {
                "views": (features.views, views.seal()),
                "encoder": (features.encoder, encoder.seal()),
                "codec": (features.codec, codec.seal()),
                "kept patches": (features.subset, kept and kept.seal()),
                "tar sha256": (features.tar_sha256, tar_record.sha256),
                "rows": (features.rows, views.rows),
                "keys": (features.keys_digest, tar_record.keys_digest),
                "keys of the views": (views.keys_digest, tar_record.keys_digest),
            }
            for what, (found, wanted) in expected.items():
                if found != wanted:
                    raise CacheError(
                        f"{name}/{label}/{view}/{tar}: {what} do not match the rest of the cache "
                        f"(expected {wanted}, found {found}): these features belong to another "
                        f"extraction; {REMEDY}"
                    )
