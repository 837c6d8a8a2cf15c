"""The folder that ``--data_dir`` names: BraTS slices, or ordinary pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import blobfile as bf
import torch
from torch.utils.data import Dataset

import brats_dataset
from improved_diffusion import brats, dist_util, image_datasets
from improved_diffusion.batches import Batch, EpochBatches
from improved_diffusion.nifti_export import geometry_of
from improved_diffusion.packed import PackedImages, make_pack


@dataclass(frozen=True)
class TrainingData:
    """A folder, and what of it is used.

    :param channels: names of the slices' channels in the network's order; empty: pictures.
    :param in_channels: how many channels an image has.
    :param classes: names of the classes, by number; empty: no labels are used.
    :param split: of slices: ``train``, ``test`` or ``all``.
    """

    data_dir: str
    channels: list[str]
    in_channels: int
    classes: list[str]
    split: str

    def batches(
        self,
        batch_size: int,
        image_size: int,
        *,
        seed: int,
        start: int = 0,
        num_workers: int = 1,
        low_res_size: int | None = None,
        pack_dir: str = "",
    ) -> Iterator[Batch]:
        """Endless shuffled batches of this process's share; arguments as of
        :func:`brats_dataset.load_data`.

        :param pack_dir: read the images from a pack there, see :mod:`improved_diffusion.packed`,
            which process 0 makes if needed; batches then hold whole levels, uint8.
        """
        rank, world_size = dist_util.rank(), dist_util.world_size()
        order = {"seed": seed, "start": start, "rank": rank, "world_size": world_size}
        if pack_dir:
            dataset = self.dataset(image_size, low_res_size)
            most = len(dataset) // world_size
            if not 1 <= batch_size <= most:
                raise ValueError(
                    f"--batch_size {batch_size}: {self.data_dir} has {len(dataset)} images, so a "
                    f"batch can hold 1 to {most}"
                )
            files = self.files(dataset)
            dist_util.on_first(lambda: make_pack(dataset, files, pack_dir, num_workers))
            return PackedImages(pack_dir).batches(batch_size, **order)
        common = {
            "data_dir": self.data_dir,
            "batch_size": batch_size,
            "image_size": image_size,
            "class_cond": bool(self.classes),
            "num_workers": num_workers,
            "low_res_size": low_res_size,
            **order,
        }
        if self.channels:
            return brats_dataset.load_data(brats_channels=self.channels, split=self.split, **common)
        return image_datasets.load_data(channels=self.in_channels, **common)

    def files_at(self, image_size: int, *, seed: int, begin: int, end: int) -> list[str]:
        """The files behind the places ``begin`` to below ``end`` of a run's :meth:`batches`."""
        dataset = self.dataset(image_size)
        items = EpochBatches(len(dataset), 1, seed, 0, 0, 1, shuffle=True).items(begin, end)
        if not self.channels:
            return [dataset.local_images[i] for i in items]
        return [path for i in items for path in dataset.channel_paths[i]]

    def geometry(self) -> dict[str, Any]:
        """Where the slices lie, for samples as NIfTI; empty where nothing tells."""
        if not self.channels:
            return {}
        dataset = brats.read_dataset_json(self.data_dir or brats_dataset.ROOT)
        return geometry_of(dataset) if dataset else {}

    def dataset(self, image_size: int, low_res_size: int | None = None) -> Dataset:
        """The images in their own order: items [C, H, W] in [-1, 1] with a dict.

        Slices that were resized are rounded to whole levels, which a likelihood of 8-bit images
        needs.
        """
        class_cond = bool(self.classes)
        if self.channels:
            slices = brats_dataset.open_slices(
                self.channels,
                self.data_dir,
                self.split,
                image_size=image_size,
                class_cond=class_cond,
                low_res_size=low_res_size,
            )
            slices.transform = whole_levels
            return slices
        return image_datasets.open_pictures(
            self.data_dir,
            image_size=image_size,
            channels=self.in_channels,
            class_cond=class_cond,
            low_res_size=low_res_size,
        )

    def files(self, dataset: Dataset) -> list[str]:
        """All files that :meth:`dataset`'s result reads, in its order."""
        if not self.channels:
            return list(dataset.local_images)
        paths = [path for files in dataset.channel_paths for path in files]
        return paths + list(dataset.mask_paths or [])


def whole_levels(image: torch.Tensor) -> torch.Tensor:
    """Values in [-1, 1] to the nearest of the 256 levels there."""
    return ((image + 1) * 127.5).round() / 127.5 - 1


def find_training_data(
    data_dir: str,
    *,
    channels: str | list[str] | None,
    in_channels: int | None,
    split: str = "train",
    class_cond: bool = False,
) -> TrainingData:
    """What ``data_dir`` is and which part of it the flags choose.

    A folder that holds a folder named as a BraTS channel, or ``dataset.json``, is a slice folder;
    empty stands for :data:`brats_dataset.ROOT`. Any other holds ordinary pictures.

    :param channels: names of the slices' channels; None or empty: as ``in_channels`` says.
    :param in_channels: see :func:`brats_dataset.resolve_channels`; pictures have 3 (also if None)
        or 1.
    :raises ValueError: flags that contradict each other or the folder.
    """
    if isinstance(channels, list):
        channels = ",".join(channels)
    if data_dir and not bf.isdir(data_dir):
        raise ValueError(
            f"there is no folder {data_dir}: name one of slices (scripts/brats_prepare.py makes "
            "them) or of ordinary pictures with --data_dir"
        )
    if not data_dir or _is_slice_folder(data_dir):
        names = brats_dataset.resolve_channels(channels, in_channels)
        classes = list(brats_dataset.CLASSES) if class_cond else []
        return TrainingData(data_dir, names, len(names), classes, split)
    if channels:
        raise ValueError(
            f"--channels {channels}: {data_dir} holds none of the folders "
            f"{', '.join(brats.CHANNELS)}, so it is a folder of ordinary pictures; name a "
            "slice folder, or leave --channels out"
        )
    if split != "train":
        raise ValueError(
            f"--split {split}: {data_dir} is a folder of ordinary pictures, which has no splits; "
            "leave --split out"
        )
    paths = image_datasets.list_pictures(data_dir)
    classes = image_datasets.class_names(paths) if class_cond else []
    return TrainingData(data_dir, [], 3 if in_channels is None else in_channels, classes, split)


def _is_slice_folder(folder: str) -> bool:
    return bf.exists(bf.join(folder, brats.DATASET_FILE)) or any(
        bf.isdir(bf.join(folder, channel)) for channel in brats.CHANNELS
    )
