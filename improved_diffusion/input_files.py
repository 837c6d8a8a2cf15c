"""Files that others wrote and that may be anything: opened only if they are files, and decoded.

What a file claims about itself is not trusted: a pipe stalls nobody, a header that promises more
than there is allocates nothing, and no decoder runs that would start another program.
"""

from __future__ import annotations

import os
import stat
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import blobfile as bf
from PIL import Image, UnidentifiedImageError

from improved_diffusion.files import is_remote

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DEFLATE_RATIO = 1032  # the most that zlib's format compresses
_BLOCK = 1 << 20


def is_broken_link(path: str) -> bool:
    """Whether ``path`` is a link to nothing, or to itself."""
    return os.path.islink(path) and not os.path.exists(path)


def list_folder(folder: str) -> list[tuple[str, bool]]:
    """Names in a folder, local or remote, in sorted order, and whether each is a folder itself.

    Links count as what they lead to. Hidden names, which file browsers leave behind, are left out.

    :raises ValueError: it cannot be read, or holds a link that leads nowhere.
    """
    if is_remote(folder):
        entries = [(entry.name, entry.is_dir) for entry in bf.scandir(folder)]
    else:
        try:
            with os.scandir(folder) as found:
                # os.path.isdir, unlike the entry's own method, bears links that go in circles.
                entries = [
                    (entry.name, os.path.isdir(entry) if entry.is_symlink() else entry.is_dir())
                    for entry in found
                ]
        except OSError as error:
            raise ValueError(
                f"the folder {folder} cannot be read ({error.strerror}): make it readable."
            ) from error
    entries = sorted(entry for entry in entries if not entry[0].startswith("."))
    for name, is_folder in entries:
        path = bf.join(folder, name)
        if not is_folder and is_broken_link(path):
            raise ValueError(f"{path} is a link that leads nowhere: restore or remove it.")
    return entries


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """Open a file to read its bytes, local or remote; a link is followed wherever it leads.

    :raises ValueError: there is none of this name, or something else (opening a pipe would wait
        for a writer).
    """
    try:
        if is_remote(path):
            file = bf.BlobFile(path, "rb")
        elif stat.S_ISREG(os.stat(path).st_mode):
            file = open(path, "rb")  # noqa: SIM115 (an error in the block below is another's)
        else:
            raise ValueError(
                f"{path} is no file but a folder, a pipe or a device: replace or remove it."
            )
    except OSError as error:
        raise ValueError(
            f"{path} cannot be opened ({error.strerror or error}): restore or remove it."
        ) from error
    with file:
        yield file


def decode_picture(path: str, formats: tuple[str, ...]) -> tuple[Image.Image, int]:
    """Decode a picture file, all of it.

    Pillow passes over the checksums of a PNG's pixels, so these are compared first.

    :param formats: Pillow's names of those that the file may have. Others are not tried: some of
        Pillow's decoders start a program (Ghostscript for PostScript).
    :returns: the picture (the first of an animation), and the bits per channel, 8 or 16.
    :raises ValueError: the file is missing, damaged, of another kind, or far too large.
    """
    with open_file(path) as file:
        try:
            if file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE:
                _compare_png_checksums(file)
            read = file.tell()
            file.seek(0)
            with warnings.catch_warnings():
                # Below twice the size that it takes for an attack Pillow would only warn.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                picture = Image.open(file, formats=formats)
            width, height = picture.size
            # Of a row come at least a filter's byte and a bit per pixel; Pillow allocates before.
            if picture.format == "PNG" and height * (1 + width // 8) > read * _DEFLATE_RATIO:
                raise ValueError(f"{width}x{height} pixels do not come out of {read} bytes")
            bits = 16 if ";16" in str(picture.tile) else 8  # gone after loading
            picture.load()
        except Exception as error:  # what arbitrary bytes raise has no bound
            reason = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, UnidentifiedImageError):  # its text shows the file's object
                reason = f"no {' or '.join(formats)} file"
            raise ValueError(
                f"{path} cannot be decoded ({reason}): it is truncated, damaged or no picture;"
                " replace or remove it."
            ) from error
    return picture, bits


def _compare_png_checksums(file: BinaryIO) -> None:
    """Read the chunks behind a PNG's signature up to the last one, IEND, and their CRC-32.

    :raises ValueError: one differs, or the file ends before.
    """
    name = b""
    while name != b"IEND":
        head = file.read(8)
        left, name = int.from_bytes(head[:4], "big"), head[4:]
        checksum = zlib.crc32(name)
        while left and (block := file.read(min(left, _BLOCK))):
            checksum = zlib.crc32(block, checksum)
            left -= len(block)
        stored = file.read(4)
        if len(head) < 8 or left or len(stored) < 4:
            raise ValueError("the file ends within a chunk")
        if int.from_bytes(stored, "big") != checksum:
            raise ValueError(f"the checksum of a chunk {name.decode('latin-1')!r} is wrong")
