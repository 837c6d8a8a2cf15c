"""The sample folder: raw levels, slices in the layout of the training data, picture, record.

::

    samples_{N}x{H}x{W}x{C}.npz   arr_0: uint8 [N, H, W, C], as the network made them;
                                  arr_1: int64 [N], the classes' numbers, where there are classes
    T1CE/sample_000000_T1ce.png   a folder for each channel, as a slice folder has them;
    Seg/sample_000000_seg.png     masks hold the nearest label code
    images/sample_000000.png      instead of these, where the channels have no names: RGB or grey
                                  pictures; with classes, named for them: images/cat_000000.png
    grid.png                      the first samples, absolute grey range, masks in label colours
    samples.json                  how they were made
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from improved_diffusion import figures
from improved_diffusion.brats import MASK_CHANNEL, slice_name, snap_mask

GRID_SAMPLES = 32
PICTURES = "images"


def write_sample_folder(
    folder: str,
    channels: Sequence[str],
    batches: Iterable[np.ndarray],
    record: dict[str, Any],
    *,
    labels: Sequence[int] | None = None,
    classes: Sequence[str] = (),
) -> None:
    """Write batches of samples as they come; the folder has its name when it is complete.

    Until then it grows as ``<folder>.partial``, which a new start begins again.

    :param channels: names of the channels in the arrays' order; empty for ordinary pictures.
    :param batches: uint8 [N, H, W, C] each, drawn while they are written.
    :param record: further entries for ``samples.json``.
    :param labels: the number of each sample's class; None: there are no classes.
    :param classes: names of the classes by number.
    :raises ValueError: if ``folder`` already holds something.
    :raises OSError: if it cannot be written.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"--sample_dir {folder} already holds something, and nothing is overwritten; "
            "choose another folder"
        )
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for channel in channels or [""]:
            (partial / channel).mkdir(parents=True)
    except OSError as error:
        raise OSError(
            f"--sample_dir {folder} cannot be made ({error.strerror}); choose another folder"
        ) from error

    start = time.monotonic()
    arrays: list[np.ndarray] = []
    count = 0
    for levels in batches:
        for sample in levels:
            if channels:
                _write_slices(partial, f"sample_{count:06d}", sample, channels)
            else:
                name = "sample" if labels is None else classes[labels[count]]
                _write_picture(partial / PICTURES / f"{name}_{count:06d}.png", sample)
            count += 1
        arrays.append(levels)
    samples = np.concatenate(arrays)
    size = "x".join(map(str, samples.shape))
    numbers = [] if labels is None else [np.asarray(labels, dtype=np.int64)]
    np.savez(partial / f"samples_{size}.npz", samples, *numbers)
    grid = figures.sample_grid(samples[:GRID_SAMPLES], channels or None)
    figures.save_grid(grid, str(partial / "grid.png"))
    record = {
        "channels": list(channels),
        **({} if labels is None else {"classes": list(classes)}),
        "shape": list(samples.shape),
        "seconds_per_sample": round((time.monotonic() - start) / count, 4),
        **record,
    }
    (partial / "samples.json").write_text(json.dumps(record, indent=1) + "\n")
    if target.exists():
        target.rmdir()
    partial.rename(target)


def _write_slices(folder: Path, stem: str, sample: np.ndarray, channels: Sequence[str]) -> None:
    """One sample, uint8 [H, W, C], as a PNG for each channel."""
    for i, channel in enumerate(channels):
        panel = np.ascontiguousarray(sample[:, :, i])
        if channel == MASK_CHANNEL:
            panel = snap_mask(panel)
        Image.fromarray(panel).save(folder / channel / slice_name(stem, channel))


def _write_picture(path: Path, sample: np.ndarray) -> None:
    """One sample, uint8 [H, W, C], as RGB or grey; other numbers of channels make no picture."""
    if sample.shape[2] == 1:
        sample = sample[:, :, 0]
    if sample.ndim == 2 or sample.shape[2] == 3:
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.ascontiguousarray(sample)).save(path)
