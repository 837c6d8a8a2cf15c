"""Samples as NIfTI volumes of one slice, placed where the training data's slices lie.

A sample is a slice at no particular height; it is put at the middle of the source's volume.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from improved_diffusion import brats

# The common space of the BraTS challenge: 1 mm voxels whose first axis runs to the left and whose
# second runs to the back. For checkpoints that do not tell their data's.
BRATS_GEOMETRY: dict[str, Any] = {
    "volume_shape": [240, 240, 155],
    "padding": [[8, 8], [8, 8]],
    "affine": [
        [-1.0, 0.0, 0.0, 0.0],
        [0.0, -1.0, 0.0, 239.0],
        [0.0, 0.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 1.0],
    ],
    "image_size": brats.IMAGE_SIZE,
    "label_convention": "2020",
}
# A file's name in the layout of BraTS 2020.
SUFFIXES = {"FLAIR": "flair", "Seg": "seg", "T1": "t1", "T1CE": "t1ce", "T2": "t2"}


def geometry_of(dataset: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint needs of ``dataset.json`` so that its samples can be placed.

    :return: empty where ``dataset.json`` does not tell.
    """
    own = dataset.get("geometry")
    if not own:
        return {}
    return {
        **{name: own[name] for name in ("volume_shape", "padding", "affine")},
        "image_size": dataset["image_size"],
        "label_convention": dataset["label_convention"] or BRATS_GEOMETRY["label_convention"],
    }


def slice_affine(geometry: dict[str, Any], size: int) -> np.ndarray:
    """The affine [4, 4] of a volume [size, size, 1] that holds one slice.

    Pixel i of ``size`` has its centre at (i + 0.5) image_size / size - 0.5 of the padded slice,
    which begins ``padding`` voxels before the volume.

    :param geometry: see :func:`geometry_of`.
    """
    step = geometry["image_size"] / size
    into_volume = np.diag([step, step, 1.0, 1.0])
    for axis in (0, 1):
        into_volume[axis, 3] = 0.5 * step - 0.5 - geometry["padding"][axis][0]
    into_volume[2, 3] = geometry["volume_shape"][2] // 2
    return np.asarray(geometry["affine"], dtype=np.float64) @ into_volume


def write_volumes(
    folder: Path, stem: str, sample: np.ndarray, channels: Sequence[str], geometry: dict[str, Any]
) -> list[Path]:
    """Write ``folder/stem/stem_t1ce.nii.gz`` and so on, one file for each channel.

    Images keep their levels, 0 to 255. A mask's levels become the nearest label of the source's
    convention: 0, 1, 2 and 4, or 0, 1, 2 and 3 from BraTS 2023 on.

    :param sample: uint8 [H, W, C].
    :return: the files.
    """
    written = []
    case = folder / stem
    case.mkdir(parents=True, exist_ok=True)
    affine = slice_affine(geometry, sample.shape[0])
    for i, channel in enumerate(channels):
        plane = sample[:, :, i]
        if channel == brats.MASK_CHANNEL:
            plane = labels_of(plane, geometry["label_convention"])
        image = nib.Nifti1Image(np.ascontiguousarray(plane)[:, :, None], affine)
        image.header.set_xyzt_units("mm")
        image.set_qform(affine, code=1)
        image.set_sform(affine, code=1)
        content = gzip.compress(image.to_bytes(), mtime=0)  # the same bytes at every run
        written.append(case / f"{stem}_{SUFFIXES[channel]}.nii.gz")
        written[-1].write_bytes(content)
    return written


def labels_of(mask: np.ndarray, convention: str) -> np.ndarray:
    """Labels of the nearest label codes, uint8 like ``mask``."""
    table = np.zeros(256, dtype=np.uint8)
    for label, code in brats.convention_codes(convention).items():
        table[code] = label
    return table[brats.snap_mask(mask)]
