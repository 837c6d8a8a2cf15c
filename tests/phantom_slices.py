"""Small slices of phantom patients with all five channels, drawn once for all tests."""

import functools

import numpy as np

from improved_diffusion.brats import CHANNELS, LABEL_CODES
from improved_diffusion.phantom import phantom_patient


@functools.cache
def phantom_slices(patient):
    """Every third slice through the brain's middle, at 60 x 60 pixels: uint8 [16, 60, 60, 5]."""
    volumes = phantom_patient(0, patient)
    codes = np.zeros(5, np.uint8)
    codes[list(LABEL_CODES)] = list(LABEL_CODES.values())
    slices = []
    for z in range(50, 98, 3):
        planes = []
        for channel in CHANNELS:
            volume = volumes[channel.lower()]
            if channel == "Seg":
                planes.append(codes[volume[2::4, 2::4, z]])
            else:
                means = volume[:, :, z].reshape(60, 4, 60, 4).mean(axis=(1, 3))
                planes.append(means / volume.max() * 255)
        slices.append(np.stack(planes, axis=-1))
    slices = np.stack(slices).round().astype(np.uint8)
    slices.flags.writeable = False  # shared by tests
    return slices
