"""Which folders and units a cache has, from names alone: nothing is opened."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from console.progress import ProgressBar
from extract.cache.reader import Cache
from extract.cache.staging import PREFIX

# Below this, reading manifests takes no time worth a progress bar.
MANY = 500
Item = TypeVar("Item")


def owners(cache: Cache) -> list[str]:
    """Folders that hold units: `views`, kept patches, encoders."""
    return [*cache.view_owners(), *cache.encoders()]


def recipes(cache: Cache) -> list[str]:
    """Recipes under which anything has a unit."""
    return sorted({label for owner in owners(cache) for label in cache.recipes(owner)})


def expected_units(cache: Cache, recipe: str) -> set[tuple[int, str]]:
    """Every (view, tar) of a recipe: all views that any owner has, of all tars."""
    found = {unit for owner in owners(cache) for unit in cache.units(owner, recipe)}
    tars = {tar for _, tar in found} | set(cache.tars())
    return {(view, tar) for view in {view for view, _ in found} for tar in tars}


def orphans(cache: Cache, owner: str, recipe: str, named: Iterable[Path]) -> list[str]:
    """Groups of an owner that none of the manifests names: a killed or a slower run left them.

    Not told for a cache at a URL, of which only records are here.
    """
    if cache.mirror is not None:
        return []
    groups = set((cache.root / owner / recipe).glob("*/*.zarr")) - set(named)
    return sorted(str(path.relative_to(cache.root)) for path in groups)


def staging_folders(cache: Cache) -> list[str]:
    """Folders in which a run that is going on, or was killed, makes units."""
    return sorted(path.name for path in cache.root.glob(f"{PREFIX}*"))


def counted(items: Sequence[Item], title: str) -> Iterator[Item]:
    """The same items, with a progress bar if they are many."""
    if len(items) < MANY:
        yield from items
        return
    with ProgressBar(title, len(items), "files") as progress:
        for item in items:
            yield item
            progress.advance(1)
