"""Where things are: paths, and URLs of buckets, which a `Path` would mangle."""

from pathlib import Path

Location = Path | str


def location(text: str | Path) -> Location:
    """A `Path`, unless it is a URL such as `s3://bucket/feats`, which stays as it is."""
    return text if isinstance(text, str) and "://" in text else Path(text)


def below(base: Location, *parts: str) -> Location:
    """A location below another one."""
    return base.joinpath(*parts) if isinstance(base, Path) else "/".join([base.rstrip("/"), *parts])
