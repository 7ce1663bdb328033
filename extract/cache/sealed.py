"""Small JSON files that prove their own content, and the order of writes that makes them safe.

Every JSON file of a cache carries `content_sha256`, the hash of all its other fields, so that a
flipped bit anywhere in it is found on reading. A file appears under its name whole or not at all:
written aside, flushed to the disk, renamed, and the folder flushed (`publish`).
"""

import errno
import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from extract.cache.errors import CacheError

SEAL = "content_sha256"
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def content_sha256(content: dict[str, Any]) -> str:
    """Hash of canonical JSON (sorted keys, no spaces) over every field but the seal itself."""
    body = {name: value for name, value in content.items() if name != SEAL}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed_bytes(content: dict[str, Any]) -> bytes:
    """The bytes of `content` as a sealed JSON file: indented, keys sorted, a newline at the end."""
    sealed = {**content, SEAL: content_sha256(content)}
    return (json.dumps(sealed, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def read_sealed(path: Path) -> dict[str, Any]:
    """Content of a sealed JSON file, the seal included.

    Raises `CacheError` when the file is missing, is no JSON, or does not match its seal.
    """
    try:
        content = json.loads(path.read_bytes())
        whole = isinstance(content, dict) and content.get(SEAL) == content_sha256(content)
    except FileNotFoundError:
        raise CacheError(
            f"{path} is missing: this is not a feature cache, or a damaged one"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CacheError(f"{path} cannot be read as JSON ({error}); it is damaged") from None
    if not whole:
        raise CacheError(
            f"{path} does not match its own {SEAL}: it was changed or damaged after it was "
            "written; restore it, or delete it and extract again"
        )
    return content


def publish(path: Path, content: dict[str, Any], aside: Path, *, replace: bool = True) -> bool:
    """Write a sealed JSON file so that it exists whole or not at all, also after a power cut.

    `aside` is a folder on the same file system that only this process writes to (`Staging`). With
    `replace=False` a file that is there already stays; of several processes that publish at once,
    one wins. Returns whether the file is now this one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = aside / uuid.uuid4().hex
    with draft.open("wb") as file:
        file.write(sealed_bytes(content))
        file.flush()
        os.fsync(file.fileno())
    if replace:
        draft.rename(path)
    else:
        try:
            # Unlike rename, this fails where the name is taken, also over NFS.
            os.link(draft, path)
        except FileExistsError:
            return False
        except OSError as error:
            # File systems without links (FAT, some FUSE) leave a moment in which both could win.
            if error.errno not in NO_LINKS or path.exists():
                raise
            draft.rename(path)
        finally:
            draft.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it outlives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and itself, to the disk."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            handle = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(parent))
