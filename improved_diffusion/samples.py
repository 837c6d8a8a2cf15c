"""The sample folder: raw levels, slices in the layout of the training data, picture, record.

::

    samples_{N}x{H}x{W}x{C}.npz   arr_0: uint8 [N, H, W, C], as the network made them
    T1CE/sample_000000_T1ce.png   a folder for each channel, as a slice folder has them;
    Seg/sample_000000_seg.png     masks hold the nearest label code
    grid.png                      the first samples, absolute grey range, masks in label colours
    samples.json                  how they were made
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from improved_diffusion import figures
from improved_diffusion.brats import MASK_CHANNEL, slice_name, snap_mask

GRID_SAMPLES = 32


class SampleFolder:
    """A sample folder while it is being written, in ``<folder>.partial`` until it is complete.

    :param folder: the folder to make.
    :param channels: names of the channels in the arrays' order; empty for samples without names,
        which get no channel folders.
    :raises ValueError: if ``folder`` already holds something.
    :raises OSError: if it cannot be written.
    """

    def __init__(self, folder: str, channels: Sequence[str]) -> None:
        self.folder = Path(folder)
        self.channels = list(channels)
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(
                f"--sample_dir {folder} already holds something, and nothing is overwritten; "
                "choose another folder"
            )
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        # What an interrupted run left there is made again.
        shutil.rmtree(self.partial, ignore_errors=True)
        for channel in self.channels or [""]:
            (self.partial / channel).mkdir(parents=True)
        self._arrays: list[np.ndarray] = []
        self._count = 0

    def add(self, levels: np.ndarray) -> None:
        """Add samples: uint8 [N, H, W, C]."""
        for sample in levels:
            stem = f"sample_{self._count:06d}"
            for i, channel in enumerate(self.channels):
                panel = sample[:, :, i]
                if channel == MASK_CHANNEL:
                    panel = snap_mask(panel)
                image = Image.fromarray(np.ascontiguousarray(panel))
                image.save(self.partial / channel / slice_name(stem, channel))
            self._count += 1
        self._arrays.append(levels)

    def finish(self, record: dict[str, Any]) -> None:
        """Write all that is about the whole set, and give the folder its name."""
        samples = np.concatenate(self._arrays)
        size = "x".join(map(str, samples.shape))
        np.savez(self.partial / f"samples_{size}.npz", samples)
        grid = figures.sample_grid(samples[:GRID_SAMPLES], self.channels or None)
        figures.save_grid(grid, str(self.partial / "grid.png"))
        record = {"channels": self.channels, "shape": list(samples.shape), **record}
        (self.partial / "samples.json").write_text(json.dumps(record, indent=1) + "\n")
        if self.folder.exists():
            self.folder.rmdir()
        self.partial.rename(self.folder)


def write_sample_folder(
    folder: str, channels: Sequence[str], batches: Iterable[np.ndarray], record: dict[str, Any]
) -> None:
    """Write batches of samples, uint8 [N, H, W, C] each, as they come."""
    target = SampleFolder(folder, channels)
    for levels in batches:
        target.add(levels)
    target.finish(record)
