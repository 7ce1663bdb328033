"""What extraction needs for any tar: the cache, the views, the encoders and how to store them."""

from collections.abc import Mapping
from dataclasses import dataclass

from extract.cache.codecs import Codec
from extract.cache.reader import Cache
from extract.cache.schema import VIEWS, CodecRecord, EncoderRecord, TarRecord, subset_owner
from extract.cache.views import Recipe
from extract.encoders.encoder import Encoder


@dataclass(frozen=True)
class Teacher:
    """One encoder of a run, with its records in the cache."""

    record: EncoderRecord
    stored: CodecRecord
    encoder: Encoder

    @property
    def codec(self) -> Codec:
        """The codec of its patch tokens."""
        return Codec(self.stored.codec, self.stored.calibration)

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns."""
        return self.record.grid[0], self.record.grid[1]

    @property
    def subset(self) -> str | None:
        """The folder with the positions of its kept patches, None if all are kept."""
        return subset_owner(self.grid) if self.stored.patches is not None else None


@dataclass(frozen=True)
class Job:
    """One run's work on any tar. `views` counts them; `pixels` is `raw`, `jpeg` or empty."""

    cache: Cache
    recipe: Recipe
    views: int
    teachers: Mapping[str, Teacher]
    batch_size: int
    workers: int
    pixels: str

    @property
    def subsets(self) -> dict[str, tuple[tuple[int, int], int]]:
        """Folders of kept patches that the run needs: grid, and how many are kept."""
        return {
            teacher.subset: (teacher.grid, teacher.stored.patches)
            for teacher in self.teachers.values()
            if teacher.subset is not None and teacher.stored.patches is not None
        }

    def missing(self, stem: str) -> dict[str, list[int]]:
        """View numbers that `views`, each folder of kept patches and each encoder lack."""
        label = self.recipe.label
        return {
            owner: [
                view
                for view in range(self.views)
                if not self.cache.layout.manifest(owner, label, view, stem).exists()
            ]
            for owner in (VIEWS, *self.subsets, *self.teachers)
        }

    def work(self, record: TarRecord) -> int:
        """Rows times units of features that the tar lacks: what progress counts."""
        missing = self.missing(record.stem)
        return record.rows * sum(len(missing[name]) for name in self.teachers)
