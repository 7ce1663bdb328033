"""The contract between the stages: views, images, the cache's format, its writer and its readers.

Everything that someone else's trainer needs is here:

    from extract.cache import Cache, CachedViews, select
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from extract.cache.dataset import Batch, CachedViews
    from extract.cache.errors import CacheError, ImageError, UserError
    from extract.cache.reader import Cache, Selection, Unit, select
    from extract.cache.statistics import Moments

_HOMES = {
    "Batch": "dataset",
    "Cache": "reader",
    "CacheError": "errors",
    "CachedViews": "dataset",
    "ImageError": "errors",
    "Moments": "statistics",
    "Selection": "reader",
    "Unit": "reader",
    "UserError": "errors",
    "select": "reader",
}
__all__ = [
    "Batch",
    "Cache",
    "CacheError",
    "CachedViews",
    "ImageError",
    "Moments",
    "Selection",
    "Unit",
    "UserError",
    "select",
]


def __getattr__(name: str) -> Any:
    # Imported when first asked for: a command's --help needs the errors, and not torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
