"""Folders of ordinary pictures (CIFAR-10, LSUN and the like) as training batches.

Any folder tree of ``.jpg``, ``.jpeg``, ``.png`` and ``.gif`` files will do. A picture's class is
the part of its file name before the first underscore: ``cat_00017.png`` is a ``cat``.

Legend: N batch, C channels (3 RGB, 1 grey), H rows, W columns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import blobfile as bf
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Dataset

from improved_diffusion.batches import Batch, endless_batches
from improved_diffusion.files import is_remote
from improved_diffusion.input_files import decode_picture, list_folder
from improved_diffusion.seeds import check_seed

EXTENSIONS = ("jpg", "jpeg", "png", "gif")
FORMATS = ("PNG", "JPEG", "GIF", "WEBP")  # told by content, whatever the extension
MODES = {3: "RGB", 1: "L"}


class ImageDataset(Dataset):
    """Pictures as float32 arrays [C, H, W] in [-1, 1] (level / 127.5 - 1), each with a dict.

    A picture is scaled so that its shorter side has ``resolution`` pixels, and its middle is cut
    out. The dict is empty, or holds the class ``y`` (int64).

    :param resolution: H and W.
    :param image_paths: files, local or remote.
    :param classes: for every file the number of its class; None: there are none.
    :param shard: of ``num_shards`` parts of the files, this one.
    :param channels: 3: RGB, 1: grey.
    :param low_res_size: put ``low_res`` [C, h, w] of this size into the dict, means over the areas
        of the large picture; None: there is none.
    :raises ValueError: no files, or (when one is read) a file that is no 8-bit picture.
    """

    def __init__(
        self,
        resolution: int,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        channels: int = 3,
        low_res_size: int | None = None,
    ) -> None:
        super().__init__()
        if len(image_paths) == 0:
            raise ValueError("there are no pictures to load: image_paths is empty.")
        if channels not in MODES:
            raise ValueError(
                f"--in_channels {channels}: ordinary pictures have 3 channels (RGB) or 1 (grey)."
            )
        self.resolution = resolution
        self.local_images = image_paths[shard::num_shards]
        self.local_classes = None if classes is None else classes[shard::num_shards]
        self.mode = MODES[channels]
        self.low_res_size = low_res_size

    def __len__(self) -> int:
        return len(self.local_images)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        square = _middle_square(_read_picture(self.local_images[idx], self.mode), self.resolution)
        levels = np.asarray(square, dtype=np.float32)
        levels = levels.reshape(self.resolution, self.resolution, -1).transpose(2, 0, 1)
        cond = {}
        if self.local_classes is not None:
            cond["y"] = np.array(self.local_classes[idx], dtype=np.int64)
        picture = levels / np.float32(127.5) - 1
        if self.low_res_size is not None:
            large = torch.from_numpy(picture)[None]
            cond["low_res"] = F.interpolate(large, self.low_res_size, mode="area")[0].numpy()
        return picture, cond


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    channels: int = 3,
    seed: int | None = None,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 1,
    low_res_size: int | None = None,
) -> Iterator[Batch]:
    """Endless batches of a folder's pictures: float32 [N, C, H, W] in [-1, 1], each with a dict.

    :param data_dir: folder, local or remote, searched with all folders in it.
    :param batch_size: N, pictures per batch and process.
    :param image_size: H and W, see :class:`ImageDataset`.
    :param class_cond: put classes ``y`` int64 [N] into the dict, numbered as in
        :func:`class_names`.
    :param deterministic: keep the sorted order of the files in every epoch.
    :param channels: 3: RGB, 1: grey.
    :param seed: decides the order of every epoch; None: torch's global generator does.
    :param start: pictures that an earlier run with this seed has consumed.
    :param rank: of this process, of ``world_size``, see
        :func:`improved_diffusion.batches.endless_batches`.
    :param num_workers: processes that decode; 0: decode in this one.
    :param low_res_size: put ``low_res`` [N, C, h, w] into the dict, see :class:`ImageDataset`.
    :raises ValueError: no such folder, no picture in it, or fewer than ``batch_size``; from the
        iterator, a file that cannot be read.
    """
    if seed is not None:
        check_seed(seed)
    dataset = open_pictures(
        data_dir,
        image_size=image_size,
        channels=channels,
        class_cond=class_cond,
        low_res_size=low_res_size,
    )
    if not 1 <= batch_size * world_size <= len(dataset):
        across = f" on each of {world_size} processes" if world_size > 1 else ""
        raise ValueError(
            f"--batch_size {batch_size}{across}: {data_dir} has {len(dataset)} pictures, so a batch"
            f" can hold 1 to {len(dataset) // world_size}."
        )
    return endless_batches(
        dataset,
        batch_size,
        seed=seed,
        deterministic=deterministic,
        start=start,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
    )


def open_pictures(
    data_dir: str,
    *,
    image_size: int,
    channels: int = 3,
    class_cond: bool = False,
    low_res_size: int | None = None,
) -> ImageDataset:
    """The pictures of a folder in sorted order; arguments as of :func:`load_data`.

    :raises ValueError: no such folder, no picture in it, or a number of channels that pictures
        don't have.
    """
    paths = list_pictures(data_dir)
    classes = None
    if class_cond:
        numbers = {name: number for number, name in enumerate(class_names(paths))}
        classes = [numbers[_class_name(path)] for path in paths]
    return ImageDataset(image_size, paths, classes, channels=channels, low_res_size=low_res_size)


def list_pictures(data_dir: str) -> list[str]:
    """Paths of all pictures in a folder and the folders in it, in sorted order.

    :raises ValueError: no such folder, or no picture in it.
    """
    if not data_dir:
        raise ValueError("--data_dir is missing: name a folder of pictures.")
    if not bf.isdir(data_dir):
        raise ValueError(f"there is no folder {data_dir}: name one of pictures with --data_dir.")
    paths = list(_walk(data_dir))
    if not paths:
        raise ValueError(
            f"{data_dir} holds no picture ({', '.join(f'.{name}' for name in EXTENSIONS)}): name"
            " another folder with --data_dir."
        )
    return paths


def class_names(paths: Sequence[str]) -> list[str]:
    """Sorted names of the classes that files belong to; the place in it is a class's number."""
    return sorted({_class_name(path) for path in paths})


def _class_name(path: str) -> str:
    return bf.basename(path).split("_")[0]


def _walk(folder: str, seen: set[str] | None = None) -> Iterator[str]:
    """Pictures in and below ``folder``; follows links, but into no folder twice."""
    seen = set() if seen is None else seen
    if not is_remote(folder):
        real = os.path.realpath(folder)
        if real in seen:
            return
        seen.add(real)
    for name, is_folder in list_folder(folder):
        path = bf.join(folder, name)
        if is_folder:
            yield from _walk(path, seen)
        elif "." in name and name.rsplit(".", 1)[1].lower() in EXTENSIONS:
            yield path


def _read_picture(path: str, mode: str) -> Image.Image:
    picture, bits = decode_picture(path, FORMATS)
    # Pillow cuts colours of 16 bits to 8 by itself, and greys of 16 bits when they are converted.
    if picture.mode.startswith(("I", "F")) or bits > 8:
        raise ValueError(f"{path} has 16 or more bits per channel: expected 8 bits; convert it.")
    # Before scaling, because a palette's numbers must not be averaged.
    return picture.convert(mode)


def _middle_square(picture: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to ``size`` and cut out the middle.

    Halved by means of four pixels as often as possible, then scaled by a bicubic filter: the
    order of openai/improved-diffusion, whose pixels these are.
    """
    while min(picture.size) >= 2 * size:
        width, height = picture.size
        picture = picture.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (round(length * scale) for length in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))
