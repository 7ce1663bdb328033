"""The plan of an extraction: its figures, and the times that follow from them."""

import math
from dataclasses import dataclass

from extract.planning.rehearsal import Rehearsal


@dataclass(frozen=True)
class EncoderPlan:
    """One encoder's part. `bytes_by_codec` is of all rows and views, `missing` of what is left.

    `loaded` says whether its weights were loaded, or only its architecture made to be measured.
    """

    name: str
    architecture: str
    parameters: int
    licence: str
    loaded: bool
    arrays: dict[str, list[int]]
    codec: str
    bytes_by_codec: dict[str, int]
    missing_bytes: int
    missing_rows: int


@dataclass(frozen=True)
class Plan:
    """Everything that `unic-extract plan` says. Seconds and rates follow from `rehearsal`."""

    cache: str
    recipe: str
    size: int
    views: int
    workers: int
    store_views: str
    images: int
    tars: int
    encoders: list[EncoderPlan]
    view_bytes: int
    packing_bytes: int
    free_bytes: int | None
    images_to_decode: int
    views_to_make: int
    rehearsal: Rehearsal

    @property
    def needed_bytes(self) -> int:
        """Bytes still to be written in all."""
        return (
            self.packing_bytes
            + self.view_bytes
            + sum(encoder.missing_bytes for encoder in self.encoders)
        )

    @property
    def fits(self) -> bool:
        """Whether the disk has room for it, as far as that can be asked."""
        return self.free_bytes is None or self.needed_bytes <= self.free_bytes

    @property
    def prepare_core_s(self) -> float:
        """Core seconds of decoding and views."""
        cost = self.rehearsal.views
        return (self.images_to_decode * cost.decode_ms + self.views_to_make * cost.view_ms) / 1e3

    @property
    def forward_s(self) -> float:
        """Seconds of the encoders on the device."""
        by_name = self.rehearsal.forward_ms
        return sum(e.missing_rows * by_name[e.name] for e in self.encoders) / 1e3

    @property
    def write_s(self) -> float:
        """Seconds of writing at the disk's measured rate; 0 where that is unknown."""
        rate = self.rehearsal.disk_bytes_per_s
        return self.needed_bytes / rate if rate else 0.0

    @property
    def seconds(self) -> float:
        """The whole run. On a GPU, decoding, encoders and disk work at the same time; on a CPU,
        decoding and encoders share the cores.
        """
        prepare = self.prepare_core_s / min(self.workers, self.rehearsal.cores)
        if self.rehearsal.device == "cpu":
            return max(prepare + self.forward_s, self.write_s)
        return max(prepare, self.forward_s, self.write_s)

    @property
    def cores_to_feed(self) -> int:
        """Cores that decode and make views as fast as the device takes them; 0: nothing to do."""
        return math.ceil(self.prepare_core_s / self.forward_s) if self.forward_s else 0
