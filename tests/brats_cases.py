"""Small BraTS cases on disk for the tests: 104 x 104 x 4 voxels, most of them brain."""

import os

import nibabel as nib
import numpy as np

SHAPE = (104, 104, 4)  # 104 x 104 pixels are 16.5 % of 256 x 256: a full slice is kept
AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
SUFFIXES_2020 = {"FLAIR": "flair", "Seg": "seg", "T1": "t1", "T1CE": "t1ce", "T2": "t2"}
SUFFIXES_2023 = {"FLAIR": "t2f", "Seg": "seg", "T1": "t1n", "T1CE": "t1c", "T2": "t2w"}


def volume(channel, seed=0, shape=SHAPE, enhancing=4):
    """A volume full of brain (500 to 999, one voxel of 1000), or a mask with all labels."""
    if channel == "Seg":
        labels = np.zeros(shape, dtype=np.int16)
        labels[10:40, 10:40] = 2
        labels[15:30, 15:30] = enhancing
        labels[20:25, 20:25] = 1
        return labels
    rng = np.random.default_rng((seed, len(channel), ord(channel[-1])))
    levels = rng.integers(500, 1000, shape).astype(np.int16)
    levels[0, 0, 0] = 1000
    return levels


def save(path, array, affine=AFFINE):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return str(path)


def write_case(
    root, name, *, channels=tuple(SUFFIXES_2020), style=2020, ext="nii.gz", seed=0, enhancing=None
):
    """Write a case's folder and give it."""
    suffixes, joint = (SUFFIXES_2020, "_") if style == 2020 else (SUFFIXES_2023, "-")
    enhancing = enhancing or (4 if style == 2020 else 3)
    folder = os.path.join(root, name)
    for channel in channels:
        path = os.path.join(folder, f"{name}{joint}{suffixes[channel]}.{ext}")
        save(path, volume(channel, seed, enhancing=enhancing))
    return folder


def contents(folder):
    """Relative path -> bytes of every file below a folder."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, folder)] = file.read()
    return found
