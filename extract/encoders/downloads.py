"""Weights that their authors publish at a plain URL, fetched once into torch.hub's cache."""

import sys
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import torch

from extract.encoders.encoder import EncoderError


def fetch_weights(name: str, url: str, sha256: str | None = None) -> Path:
    """The weights file of the teacher `name`, downloaded unless it is there.

    It lies in `checkpoints/` of torch.hub's folder (`$TORCH_HOME/hub`, or `~/.cache/torch/hub`),
    and only once it is complete.

    Args:
        name: of the teacher; the file's name begins with it, because many projects call all their
            files alike.
        url: where the file is.
        sha256: what the file must have, None where that is not known.

    Raises:
        EncoderError: if it cannot be had; the message shows the URL and what to type instead.
    """
    target = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}-{Path(urlsplit(url).path).name}"
    if target.is_file():
        return target
    print(f"downloading the weights of {name} from {url} to {target}", file=sys.stderr)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), sha256, progress=sys.stderr.isatty())
    except (OSError, HTTPException, RuntimeError) as error:
        file = Path(urlsplit(url).path).name
        raise EncoderError(
            f"the weights of {name} could not be downloaded ({error}). Fetch {url} where you are "
            f"connected, and give the file: unic-extract --teacher {name} --weights {file}"
        ) from error
    return target
