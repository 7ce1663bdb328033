"""Random numbers as a pure function of their names: no generator is carried from call to call.

A stream is addressed by labels such as (seed, tar, ordinal, key, view). The labels are hashed with
SHA-256 and key NumPy's counter-based Philox generator. NumPy keeps the raw words of a bit generator
the same for ever, which it promises for none of the methods of `Generator`; so floats and
permutations are made from raw words by formulas written out here.
"""

from __future__ import annotations

import hashlib
import operator
from typing import SupportsIndex

import numpy as np
from numpy.typing import NDArray


def _encode(label: str | SupportsIndex) -> bytes:
    """Encode one label so that no two sequences of labels share their bytes."""
    if isinstance(label, str):
        tag, text = b"s", label.encode("utf-8")
    else:
        tag, text = b"i", str(operator.index(label)).encode("ascii")
    return tag + len(text).to_bytes(8, "little") + text


def stream_words(n: int, *labels: str | SupportsIndex) -> NDArray[np.uint64]:
    """Return the first `n` 64-bit words of the stream that `labels` address.

    Args:
        n: number of words.
        *labels: strings and integers; 1 and "1" are different labels.

    Returns:
        `[n]` uint64. A longer request begins with the words of a shorter one.
    """
    digest = hashlib.sha256(b"".join(map(_encode, labels))).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    return np.asarray(generator.random_raw(n), dtype=np.uint64)


def to_uniforms(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Map each word to a float64 in [0, 1) by its upper 53 bits, exactly."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def view_words(
    seed: int, tar: str, ordinal: int, key: str, view: int, n: int
) -> NDArray[np.uint64]:
    """Return `n` words for one view of one image.

    Args:
        seed: the cache's seed.
        tar: stem of the image tar, such as "000000".
        ordinal: position of the sample in its tar, from 0.
        key: key of the sample.
        view: number of the view, from 0.
        n: number of words.

    Returns:
        `[n]` uint64.
    """
    return stream_words(n, "view", seed, tar, ordinal, key, view)


def uniforms(seed: int, tar: str, ordinal: int, key: str, view: int, n: int) -> NDArray[np.float64]:
    """Return `n` float64 in [0, 1) for one view of one image; arguments as in `view_words`."""
    return to_uniforms(view_words(seed, tar, ordinal, key, view, n))


def permutation(seed: int, *labels: str | SupportsIndex, n: int) -> NDArray[np.int64]:
    """Return a permutation of `range(n)` that depends on `seed` and `labels` alone.

    Args:
        seed: seed of the run or of the cache.
        *labels: what the order is for, such as `"epoch", 3`.
        n: number of elements.

    Returns:
        `[n]` int64. Words are sorted stably, so even a tie has one outcome.
    """
    return np.argsort(stream_words(n, "permutation", seed, *labels), kind="stable")
