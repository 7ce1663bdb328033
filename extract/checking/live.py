"""The encoder that a cache was made with, found again and proven to be the same."""

from collections.abc import Mapping
from pathlib import Path

from console.device import torch_device
from extract.cache.errors import CacheError, UserError
from extract.cache.schema import EncoderRecord
from extract.encoders.encoder import Encoder
from extract.records import describe
from extract.teachers import TEACHERS, load_encoder


def live_encoder(record: EncoderRecord, teachers: Mapping[str, str], device: str) -> Encoder:
    """The encoder of a record, proven to be the same.

    Raises:
        UserError: its weights cannot be found, or are others; the message says how to name them.
    """
    name, where = record.name, teachers.get(record.name)
    advice = (
        f"say where they are with --teacher {name}=FOLDER (or =CHECKPOINT), or skip with --rows 0"
    )
    size, on = record.size, torch_device(device)
    try:
        if where is not None and Path(where).is_file():
            known = name if name in TEACHERS else f"{name}=timm:{record.architecture}"
            encoder = load_encoder(known, size=size, weights=Path(where), device=on)
        else:
            called = f"{name}={where}" if where is not None else _called(record)
            encoder = load_encoder(called, size=size, device=on)
    except UserError as error:
        raise CacheError(f"the weights could not be loaded ({error}); {advice}") from None
    # On another device the precision may differ; the comparison allows for that.
    stored, live = (
        {key: value for key, value in r.identity().items() if key != "precision"}
        for r in (record, describe(name, encoder))
    )
    if live != stored:
        changes = "; ".join(
            f"{key} {stored[key]!r} in the cache, {live[key]!r} now"
            for key in stored
            if stored[key] != live[key]
        )
        raise CacheError(f"the encoder is not the one of the cache: {changes}; {advice}")
    return encoder


def _called(record: EncoderRecord) -> str:
    """What `load_encoder` knows the encoder by; its name where the record tells no more."""
    kind, _, rest = record.source.partition(":")
    if record.architecture == "pixels":
        return f"{record.name}=pixels:{record.patch_size}"
    if kind == "timm":
        return record.name if record.name in TEACHERS else f"{record.name}=timm:{rest}"
    if kind == "random":
        return f"{record.name}=random:{record.architecture}"
    if kind == "url":
        known = next((card.name for card in TEACHERS.values() if card.url == rest), None)
        if known is not None:
            return f"{record.name}={known}"
    raise CacheError(f"its source, {record.source!r}, is no place that every machine knows")
