"""NIfTI files of others as volumes in the challenge's orientation.

Legend: X, Y, Z are the axes of a volume in the orientation LPS: they run to the left, to the back
and up.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import nibabel as nib
import numpy as np

from improved_diffusion.input_files import open_file

ORIENTATION = "LPS"  # of BraTS to 2023; other volumes are turned to it
MAX_PLACE_MM = 1e6  # where a volume may lie; what is farther away is damage
_VOXEL_SIZE_TOLERANCE_MM = 0.01
_TILT_TOLERANCE_DEGREES = 10
# What may lie between a header and its voxels (notes of programs), and behind the voxels.
_MAX_EXTENSIONS = 1 << 24
_MAX_SURPLUS = 1 << 20
_READ_BLOCK = 1 << 22


def read_volume(
    path: str, largest: Sequence[int]
) -> tuple[np.ndarray, np.ndarray | None, str | None]:
    """Read a NIfTI-1 or NIfTI-2 file, gzipped or not (told by content, not by name).

    The volume is turned to ``ORIENTATION`` by permuting and flipping axes, which changes no voxel;
    one that states no position is taken to lie like that already. Nothing is allocated that the
    file does not fill, and gzip's checksum is compared.

    :param largest: the shape [3] that a turned volume may have at most.
    :returns: the volume [X, Y, Z] in its stored type (float64 where the header scales it), its
        affine [4, 4] (to RAS+ mm), and the orientation in which it is stored, e.g. ``"RAS"``; the
        last two None where the file states no position.
    :raises ValueError: unreadable, damaged, not 3-D, neither integers nor floats, too
        large, voxels other than cubes of 1 mm, or axes that are tilted.
    """
    with open_file(path) as file:
        with _damage_named(path):
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if zipped else file
            header = _read_header(stream)
        shape, dtype = _voxel_grid(header, path)
        affine = _stated_affine(header, path)
        orientation, turn = None, np.array([[0, 1], [1, 1], [2, 1]])
        if affine is not None:
            _check_axes(affine, path)
            orientation, turn = _turn(affine)
            affine = affine @ nib.orientations.inv_ornt_aff(turn, shape) + 0.0  # no -0.0
        turned_shape = [shape[i] for i in np.argsort(turn[:, 0])]
        if any(size > most for size, most in zip(turned_shape, largest)):
            raise ValueError(
                f"{path} has {turned_shape[2]} slices of {shape_text(turned_shape[:2])} pixels: at"
                f" most {largest[2]} of {shape_text(largest[:2])} fit; crop or resample the case"
                " first."
            )
        with _damage_named(path):
            volume = _read_voxels(stream, header, shape, dtype)
    return nib.orientations.apply_orientation(volume, turn), affine, orientation


@contextmanager
def _damage_named(path: str) -> Iterator[None]:
    """Whatever arbitrary bytes raise becomes a ``ValueError`` that names the file."""
    try:
        yield
    except Exception as error:
        raise _damaged(path, " ".join(str(error).split()) or type(error).__name__) from error


def _damaged(path: str, reason: str) -> ValueError:
    return ValueError(
        f"{path} cannot be read as NIfTI ({reason}): it is truncated or damaged; copy or download"
        " it again."
    )


def _read_header(stream: BinaryIO) -> nib.Nifti1Header:
    kinds = {kind.sizeof_hdr: kind for kind in (nib.Nifti1Header, nib.Nifti2Header)}
    start = stream.read(4)
    for order in ("little", "big"):
        size = int.from_bytes(start, order)
        if size in kinds:
            break
    else:
        raise ValueError("it does not begin with a NIfTI header")
    block = start + _read_up_to(stream, size - len(start))
    if len(block) < size:
        raise ValueError("it ends within its header")
    # Unchecked, because nibabel mends some errors and tells of each on standard error.
    header = kinds[size](block, endianness=order, check=False)
    if header["magic"].item() == header.pair_magic:
        raise ValueError("it is half of a pair of files, .hdr and .img, not one .nii file")
    if header["magic"].item() != header.single_magic:
        raise ValueError(f"its format is {header['magic'].item()!r}")
    return header


def _voxel_grid(header: nib.Nifti1Header, path: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape [3] and type of the stored voxels."""
    ndim, *sizes = header["dim"].tolist()
    shape = tuple(sizes[: max(ndim, 0)])
    if not 1 <= ndim <= 7 or min(shape) < 1:
        raise _damaged(path, f"its header gives {ndim} dimensions of {sizes} voxels")
    if len(shape) == 4 and shape[3] == 1:
        raise ValueError(
            f"{path} is 4-D ({shape_text(shape)}): expected one 3-D volume per modality; remove"
            " the last axis, for example with nibabel.squeeze_image."
        )
    if len(shape) != 3:
        raise ValueError(
            f"{path} is {len(shape)}-D ({shape_text(shape)}): expected one 3-D volume per"
            " modality; split stacked modalities into files of their own first, for example with"
            " nibabel.four_to_three."
        )
    code = int(header["datatype"])
    try:
        name = nib.nifti1.data_type_codes.label[code]
        dtype = header.get_data_dtype()
    except KeyError as error:
        raise _damaged(path, f"its voxels are of the unknown type {code}") from error
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ValueError(
            f"{path} holds {name} voxels: expected integers or floats of at most 64 bits; convert"
            " it first."
        )
    return shape, dtype


def _stated_affine(header: nib.Nifti1Header, path: str) -> np.ndarray | None:
    """The affine of the sform, else of the qform; None where neither is in use.

    :raises ValueError: voxels that are not 1 mm long in every direction.
    """
    affine = None
    if header["sform_code"] > 0 or header["qform_code"] > 0:
        with _damage_named(path):
            affine = header.get_sform() if header["sform_code"] > 0 else header.get_qform()
            if not np.abs(affine).max() < MAX_PLACE_MM:
                raise ValueError("its affine is not finite, or lies a kilometre away")
        lengths = [math.hypot(*column) for column in affine[:3, :3].T]
    else:
        lengths = [abs(length) for length in header["pixdim"][1:4].tolist()]
        if not all(0 < length < math.inf for length in lengths):
            return None  # nothing is stated
    if any(abs(length - 1) > _VOXEL_SIZE_TOLERANCE_MM for length in lengths):
        raise ValueError(
            f"{path} has voxels of {' x '.join(f'{length:.4g}' for length in lengths)} mm: expected"
            " 1 x 1 x 1 mm, as BraTS publishes its volumes; resample the case first."
        )
    return affine


def _check_axes(affine: np.ndarray, path: str) -> None:
    """Refuse axes that are not, or hardly, those of the body, and so have no orientation."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosine = np.abs(axes).max(axis=0).min()  # of the axis that is farthest from the body's nearest
    tilt = math.degrees(math.acos(min(cosine, 1)))
    sheared = np.abs(axes.T @ axes - np.eye(3)).max() > 2 * _VOXEL_SIZE_TOLERANCE_MM
    if tilt > _TILT_TOLERANCE_DEGREES or sheared:
        raise ValueError(
            f"{path} has axes that are tilted by up to {tilt:.0f} degrees or not perpendicular: at"
            f" most {_TILT_TOLERANCE_DEGREES} degrees off the body's axes are taken; resample the"
            " case first."
        )


def _turn(affine: np.ndarray) -> tuple[str, np.ndarray]:
    """The orientation of an affine, and what nibabel needs to turn it to ``ORIENTATION``."""
    stored = nib.io_orientation(affine)
    wanted = nib.orientations.axcodes2ornt(ORIENTATION)
    codes = nib.orientations.ornt2axcodes(stored)
    return "".join(codes), nib.orientations.ornt_transform(stored, wanted)


def _read_voxels(
    stream: BinaryIO, header: nib.Nifti1Header, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """The stored array, scaled as the header says, from a stream that stands behind the header."""
    begin, first = float(header["vox_offset"]), header.single_vox_offset
    if not begin.is_integer() or not first <= begin <= first + _MAX_EXTENSIONS:
        raise ValueError(f"its voxels begin at byte {begin:g}")
    _read_up_to(stream, int(begin) - header.sizeof_hdr)
    size = math.prod(shape) * dtype.itemsize
    content = _read_up_to(stream, size)
    if len(content) < size:
        raise ValueError(f"its header promises {size} bytes of voxels, but {len(content)} follow")
    if len(_read_up_to(stream, _MAX_SURPLUS + 1)) > _MAX_SURPLUS:
        raise ValueError(f"more than {_MAX_SURPLUS} bytes follow the voxels")
    voxels = np.frombuffer(content, dtype).reshape(shape, order="F")
    slope, intercept = header.get_slope_inter()  # a slope of 0 or NaN means none
    if slope is None or (slope, intercept) == (1, 0):
        return voxels.astype(dtype.newbyteorder("="), copy=False)
    with np.errstate(over="ignore", invalid="ignore"):  # refused with what is not finite
        return voxels.astype(np.float64) * slope + intercept


def _read_up_to(stream: BinaryIO, size: int) -> bytearray:
    """At most ``size`` bytes, in blocks: a size that is a lie costs no memory."""
    content = bytearray()
    while block := stream.read(min(size - len(content), _READ_BLOCK)):
        content += block
    return content


def shape_text(shape: Sequence[int]) -> str:
    """``(240, 240, 155)`` -> ``"240x240x155"``."""
    return "x".join(str(size) for size in shape)
