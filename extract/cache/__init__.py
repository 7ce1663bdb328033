"""The contract between the stages: views, images, the cache's format, its writer and its readers.

Everything that someone else's trainer needs is here:

    from extract.cache import Cache, CachedViews, select
"""

from extract.cache.dataset import Batch, CachedViews
from extract.cache.errors import CacheError, ImageError, UserError
from extract.cache.reader import Cache, Selection, Unit, select
from extract.cache.statistics import Moments

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
