"""Files that are either complete under their name or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import blobfile as bf


def is_remote(path: str) -> bool:
    """Whether ``path`` names something that blobfile keeps elsewhere."""
    return "://" in path


@contextmanager
def atomic_write(path: str) -> Iterator[BinaryIO]:
    """Open ``path`` for writing; it gets its new content when the block ends, and not before.

    A reader, a crash or an error sees the old content or none. The folder is made if needed.

    :raises OSError: if it cannot be written.
    """
    if is_remote(path):
        with bf.BlobFile(path, "wb") as file:  # uploaded in one piece
            yield file
        return
    partial = f"{path}.partial"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(os.path.dirname(path) or ".")
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        if isinstance(error, OSError):
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def _sync_folder(folder: str) -> None:
    """Let the new name survive a power failure, where the file system can be asked to."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
