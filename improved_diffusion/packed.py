"""Decoded images in one memory-mapped file, for training that outruns PNG decoding.

A pack is a folder::

    images.npy     uint8 [N, C, H, W], in the order of the data set
    y.npy          int64 [N], where there are classes
    low_res.npy    uint8 [N, C, h, w], where there is a low resolution
    pack.json      from which files it was made
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from improved_diffusion import cli
from improved_diffusion.batches import Batch, EpochBatches, ErrorsAsItems, ignore_signals

RECORD = "pack.json"


class PackedImages:
    """The images of a pack, by number.

    :func:`to_unit_range` brings their levels to the [-1, 1] of other data sets.
    """

    def __init__(self, folder: str) -> None:
        self.arrays = {
            name: np.load(path, mmap_mode="r")
            for name in ("images", "y", "low_res")
            if (path := Path(folder) / f"{name}.npy").exists()
        }

    def __len__(self) -> int:
        return len(self.arrays["images"])

    def __getitem__(self, numbers: list[int]) -> Batch:
        """Images of these numbers: uint8 [N, C, H, W] and a dict of ``y`` and ``low_res``."""
        batch = {name: torch.from_numpy(own[numbers]) for name, own in self.arrays.items()}
        if torch.cuda.is_available():
            batch = {name: value.pin_memory() for name, value in batch.items()}
        return batch.pop("images"), batch

    def batches(
        self, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Endless shuffled batches in the order of :func:`~.batches.endless_batches`.

        A thread fetches the next two while the last one is used.
        """
        numbers = EpochBatches(len(self), batch_size, seed, start, rank, world_size, shuffle=True)
        ready: queue.Queue[Batch | Exception] = queue.Queue(2)

        def fill() -> None:
            try:
                for own in numbers:
                    ready.put(self[own])
            except Exception as error:  # to be raised where it is seen
                ready.put(error)

        threading.Thread(target=fill, daemon=True).start()
        while True:
            batch = ready.get()
            if isinstance(batch, Exception):
                raise batch
            yield batch


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """Levels, uint8, to float32 in [-1, 1] as the data sets scale them; others stay as they are."""
    if images.dtype != torch.uint8:
        return images
    return (images.double() / 127.5 - 1).float()


def make_pack(dataset: Dataset, paths: list[str], folder: str, num_workers: int) -> None:
    """Pack a data set into ``folder``, unless its pack is there already.

    :param dataset: items [C, H, W] in [-1, 1] on whole levels, with a dict of ``y`` and
        ``low_res`` or of nothing.
    :param paths: the files that the data set reads; a pack knows them by name, size and time.
    :param num_workers: processes that decode.
    :raises ValueError: ``folder`` holds another pack or something else, or a file is damaged.
    """
    target = Path(folder)
    image, cond = dataset[0]
    record = {
        "files": _fingerprint(paths),
        "count": len(dataset),
        "shape": list(image.shape),
        "with": {name: list(np.shape(value)) for name, value in sorted(cond.items())},
    }
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        try:
            own = json.loads((target / RECORD).read_text())
        except (OSError, ValueError):
            raise ValueError(
                f"--pack_dir {folder} holds something that is no pack of images; name an empty "
                "or a new folder"
            ) from None
        if own != record:
            raise ValueError(
                f"--pack_dir {folder} was packed from other files, or for another size or other "
                "channels; remove it, or name another folder"
            )
        return

    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(dataset, image, cond, partial, num_workers)
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if target.exists():
        target.rmdir()
    partial.rename(target)


def _write(
    dataset: Dataset, image: Any, cond: dict[str, Any], folder: Path, num_workers: int
) -> None:
    count = len(dataset)
    arrays = {
        name: np.lib.format.open_memmap(
            folder / f"{name}.npy",
            mode="w+",
            dtype=np.int64 if name == "y" else np.uint8,
            shape=(count, *np.shape(value)),
        )
        for name, value in {"images": image, **cond}.items()
    }
    loader = DataLoader(
        ErrorsAsItems(dataset),
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),
    )
    items = cli.progress(loader, total=count, desc="packing", unit="image")
    for i, item in enumerate(items):
        if isinstance(item, Exception):
            raise item
        for name, value in {"images": item[0], **item[1]}.items():
            levels = value if name == "y" else ((np.asarray(value) + 1) * 127.5).round()
            arrays[name][i] = levels
    for array in arrays.values():
        array.flush()


def _fingerprint(paths: list[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        state = os.stat(path)
        digest.update(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()
