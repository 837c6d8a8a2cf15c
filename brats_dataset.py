"""Prepared BraTS slices as training batches.

A slice folder holds one folder per channel with one 8-bit grey PNG per slice; ``dataset.json``
(written by ``scripts/brats_prepare.py``) adds the split by patient and what must be there. A folder
without it works too and is all training data.

Legend: N batch, C channels in the fixed order FLAIR, Seg, T1, T1CE, T2, H rows, W columns.
"""

from __future__ import annotations

import struct
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import blobfile as bf
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from improved_diffusion import brats
from improved_diffusion.batches import Batch, endless_batches
from improved_diffusion.input_files import PNG_SIGNATURE, decode_picture, list_folder, open_file
from improved_diffusion.seeds import check_seed

# The two defaults, which flags and arguments override: the channels to train on, and the folder of
# the slices.
CHANNELS = ["T1CE", "Seg"]
ROOT = "./brats2020_313subjects_noaugmentation_singlesegmentationchannel_min15percentcoverage"

SPLITS = ("train", "test", "all")

# A slice's class label y is the index of its name here: whether its mask shows any tumour.
CLASSES = ["no-tumour", "tumour"]


class load_channels_from_dir(Dataset):
    """Slices as float32 tensors [C, H, W] in [-1, 1] (level / 127.5 - 1), each with a dict.

    The dict is empty, or holds ``y`` (int, see :data:`CLASSES`) and ``low_res`` [C, h, w].

    :param channel_paths: for every slice the list of its files, one per channel.
    :param transform: called with a slice's tensor; gives what to use instead.
    :param return_class: put the slice's label ``y`` into the dict. The mask must be among the
        channels, or in ``mask_paths``.
    :param image_size: H and W to resize to: images by area averaging, the mask by nearest
        neighbour; None keeps the stored size.
    :param channels: channel names in the order of the files; None: told by the files' folders.
        Only which one is the mask matters.
    :param low_res_size: h and w of ``low_res``, the slice resized to this from its stored size;
        None: there is none.
    :param mask_paths: for every slice the file of its mask, read for its label only.
    :param stored_size: W and H that every file is known to have; None: any, the same in a slice.
    :raises ValueError: no slices, or (when a slice is read) a file that is not what it should be.
    """

    def __init__(
        self,
        channel_paths: Sequence[Sequence[str]],
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        return_class: bool = False,
        *,
        image_size: int | None = None,
        channels: Sequence[str] | None = None,
        low_res_size: int | None = None,
        mask_paths: Sequence[str] | None = None,
        stored_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if len(channel_paths) == 0:
            raise ValueError("there are no slices to load: channel_paths is empty.")
        if channels is None:
            channels = [bf.basename(bf.dirname(path)) for path in channel_paths[0]]
        if return_class and mask_paths is None and brats.MASK_CHANNEL not in channels:
            raise ValueError(
                f"return_class=True: the channels {', '.join(channels)} hold no mask that tells a"
                f" slice's class; add {brats.MASK_CHANNEL} or give mask_paths."
            )
        self.channel_paths = channel_paths
        self.num_channel = len(channel_paths[0])
        self.transform = transform
        self.image_size = image_size
        self.low_res_size = low_res_size
        self.return_class = return_class
        self.mask_paths = mask_paths
        self.stored_size = stored_size
        self._is_mask = [channel == brats.MASK_CHANNEL for channel in channels]

    def __len__(self) -> int:
        return len(self.channel_paths)

    def __getitem__(self, idx: int | torch.Tensor) -> tuple[torch.Tensor, dict]:
        paths = self.channel_paths[int(idx)]
        planes = [self._read(path) for path in paths]
        for path, plane in zip(paths, planes):
            if plane.size != planes[0].size:
                raise ValueError(
                    f"{path} has {_size_text(plane.size)} pixels but {paths[0]} has"
                    f" {_size_text(planes[0].size)}: all channels of a slice must have one size."
                )
        slice_, resized = self._tensor(planes, self.image_size)
        cond: dict = {}
        if self.return_class:
            if self.mask_paths is not None:
                mask = self._read(self.mask_paths[int(idx)])
                if self.image_size is not None:
                    mask = _resize(mask, self.image_size, is_mask=True)
            else:
                mask = resized[self._is_mask.index(True)]
            cond["y"] = int(brats.snap_mask(np.asarray(mask)).any())
        if self.low_res_size is not None:
            cond["low_res"], _ = self._tensor(planes, self.low_res_size)
        if self.transform is not None:
            slice_ = self.transform(slice_)
        return slice_, cond

    def _read(self, path: str) -> Image.Image:
        plane = _read_levels(path)
        if self.stored_size not in (None, plane.size):
            raise ValueError(
                f"{path} has {_size_text(plane.size)} pixels but had {_size_text(self.stored_size)}"
                " when the folder was checked: restore it."
            )
        return plane

    def _tensor(
        self, planes: Sequence[Image.Image], size: int | None
    ) -> tuple[torch.Tensor, list[Image.Image | np.ndarray]]:
        """The slice [C, size, size] in [-1, 1], and its resized planes."""
        resized = [
            plane if size is None else _resize(plane, size, is_mask)
            for plane, is_mask in zip(planes, self._is_mask)
        ]
        levels = np.stack([np.asarray(plane, dtype=np.float64) for plane in resized])
        return torch.from_numpy((levels / 127.5 - 1).astype(np.float32)), resized


def get_BRATS_paths(  # noqa: N802 (the report's name)
    channels_to_include: Sequence[str], root: str | None = None, split: str = "train"
) -> list[list[str]]:
    """Files of every slice: one list per slice with one path per channel, in the fixed order.

    Files are paired by stem (their name without extension and channel suffix), never by position,
    and slices come in the natural order of their stems.

    :param channels_to_include: channel names, in any order.
    :param root: slice folder, local or remote; None: ``ROOT``.
    :param split: ``train``, ``test`` or ``all``, as ``dataset.json`` says; a folder without that
        file is all training data.
    :raises ValueError: an unknown channel, a missing folder, a file that is missing or that should
        not be there, or a split without slices.
    """
    root = root or ROOT
    if split not in SPLITS:
        raise ValueError(f"--split {split}: the splits are {', '.join(SPLITS)}.")
    channels = brats.parse_channels(",".join(channels_to_include))
    if not bf.isdir(root):
        raise ValueError(
            f"there is no slice folder {root}: name one with --data_dir, or make one with"
            " scripts/brats_prepare.py."
        )
    for channel in channels:
        if not bf.isdir(bf.join(root, channel)):
            raise ValueError(
                f"{root} has no folder {channel}: it must hold one folder of PNG files for each of"
                f" the channels {', '.join(channels)}."
            )
    dataset = brats.read_dataset_json(root)
    files = {channel: _files_by_stem(bf.join(root, channel), channel) for channel in channels}
    if dataset is None:
        if split == "test":
            raise ValueError(
                f"{root} has no {brats.DATASET_FILE}, so all of it is training data: there is no"
                " test split to load."
            )
        stems = _stems_in_agreement(root, files)
    else:
        stems = _stems_of_split(root, files, dataset, split)
    if not stems:
        raise ValueError(f"{root} holds no slice of the split {split!r}.")
    return [
        [bf.join(root, channel, files[channel][stem]) for channel in channels]
        for stem in sorted(stems, key=brats.natural_key)
    ]


def load_data(
    *,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    brats_channels: Sequence[str] | None = None,
    data_dir: str | None = None,
    split: str = "train",
    seed: int = 0,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 1,
    low_res_size: int | None = None,
) -> Iterator[Batch]:
    """Endless batches of slices: float32 [N, C, H, W] in [-1, 1], each with a dict.

    Every epoch visits every slice once, in an order of its own that depends on ``seed`` and the
    epoch's number alone, see :func:`improved_diffusion.batches.endless_batches`. Everything that
    can be checked without decoding the pixels is checked before this returns.

    :param batch_size: N, slices per batch and process.
    :param image_size: H and W; other than the stored size, slices are resized.
    :param class_cond: put labels ``y`` int64 [N] into the dict, see :data:`CLASSES`; the folder
        must hold the masks.
    :param deterministic: keep the natural order of the slices in every epoch.
    :param brats_channels: channel names; None: ``CHANNELS``.
    :param data_dir: slice folder; None or empty: ``ROOT``.
    :param split: ``train``, ``test`` or ``all``.
    :param start: slices that an earlier run has consumed; the next one comes first.
    :param rank: of this process; with ``world_size`` processes a batch of
        ``batch_size * world_size`` slices is shared out in contiguous parts.
    :param num_workers: processes that decode; 0: decode in this one.
    :param low_res_size: h and w of ``low_res`` [N, C, h, w] in the dict; None: there is none.
    :raises ValueError: anything wrong with the folder, a file or the settings; also from the
        iterator, when a file turns out to be unreadable.
    """
    check_seed(seed)
    dataset = open_slices(
        brats_channels,
        data_dir,
        split,
        image_size=image_size,
        class_cond=class_cond,
        low_res_size=low_res_size,
    )
    if not 1 <= batch_size * world_size <= len(dataset):
        across = f" on each of {world_size} processes" if world_size > 1 else ""
        raise ValueError(
            f"--batch_size {batch_size}{across}: {data_dir or ROOT} has {len(dataset)} slices in"
            f" the split {split!r}, so a batch can hold 1 to {len(dataset) // world_size}."
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


def open_slices(
    channels: Sequence[str] | None = None,
    data_dir: str | None = None,
    split: str = "train",
    *,
    image_size: int | None = None,
    class_cond: bool = False,
    low_res_size: int | None = None,
) -> load_channels_from_dir:
    """The slices of a folder, with every file's header checked; arguments as of :func:`load_data`.

    :raises ValueError: anything wrong with the folder or a header.
    """
    channels = brats.parse_channels(",".join(channels or CHANNELS))
    label_only = class_cond and brats.MASK_CHANNEL not in channels
    if label_only:
        root = data_dir or ROOT
        if bf.isdir(root) and not bf.isdir(bf.join(root, brats.MASK_CHANNEL)):
            raise ValueError(
                f"--class_cond True: {root} has no folder {brats.MASK_CHANNEL}, whose masks tell"
                " which slices show a tumour; leave --class_cond out, or prepare the masks too."
            )
    read = brats.parse_channels(",".join([*channels, *[brats.MASK_CHANNEL] * label_only]))
    paths = get_BRATS_paths(read, data_dir, split)
    stored_size = _check_headers([path for files in paths for path in files])
    mask_paths = None
    if label_only:
        mask_paths = [files.pop(read.index(brats.MASK_CHANNEL)) for files in paths]
    return load_channels_from_dir(
        paths,
        return_class=class_cond,
        image_size=image_size,
        channels=channels,
        low_res_size=low_res_size,
        mask_paths=mask_paths,
        stored_size=stored_size,
    )


def resolve_channels(channels: str | None, in_channels: int | None) -> list[str]:
    """Channel names, in the fixed order, from the flags ``--channels`` and ``--in_channels``.

    :param channels: comma-separated names; None or empty: follows ``in_channels``.
    :param in_channels: 5 means all, 2 T1CE and Seg, 1 T1CE (or ``CHANNELS``, where it has that many
        names); None: ``CHANNELS``.
    :raises ValueError: unknown names, two flags that disagree, or a number that says too little.
    """
    if channels:
        names = brats.parse_channels(channels)
        if in_channels is not None and in_channels != len(names):
            raise ValueError(
                f"--in_channels {in_channels} contradicts --channels {channels}"
                f" ({len(names)} channel{'s' if len(names) > 1 else ''}): leave --in_channels out."
            )
        return names
    if in_channels is None or in_channels == len(CHANNELS):
        return brats.parse_channels(",".join(CHANNELS))
    by_number = {1: ["T1CE"], 2: ["Seg", "T1CE"], len(brats.CHANNELS): list(brats.CHANNELS)}
    if in_channels not in by_number:
        raise ValueError(
            f"--in_channels {in_channels} does not say which of {', '.join(brats.CHANNELS)} to use:"
            " name them with --channels."
        )
    return by_number[in_channels]


# ---------------------------------------------------------------------------------- finding files


def _files_by_stem(folder: str, channel: str) -> dict[str, str]:
    """Stem -> file name of every file in a channel's folder."""
    files: dict[str, str] = {}
    for name, is_folder in list_folder(folder):
        if is_folder or not name.lower().endswith(".png"):
            raise ValueError(f"{bf.join(folder, name)} is not a PNG file: remove it.")
        stem = brats.split_slice_name(name, channel)
        if stem in files:
            raise ValueError(
                f"{folder} holds two files for the slice {stem}: {files[stem]} and {name}; keep one"
                " of them."
            )
        files[stem] = name
    return files


def _stems_in_agreement(root: str, files: dict[str, dict[str, str]]) -> set[str]:
    """The slices of a folder without ``dataset.json``: every channel must hold all of them."""
    every = set().union(*files.values())
    for channel, own in files.items():
        missing = sorted(every - own.keys(), key=brats.natural_key)
        if missing:
            other = next(name for name in files if missing[0] in files[name])
            raise ValueError(
                f"{bf.join(root, channel)} has no file for the slice {missing[0]}"
                f"{_and_more(missing)}, which {bf.join(root, other, files[other][missing[0]])}"
                " needs as its partner: add the missing file or remove the other."
            )
    return every


def _stems_of_split(
    root: str, files: dict[str, dict[str, str]], dataset: dict, split: str
) -> set[str]:
    """The slices of a split; every file must be listed in ``dataset.json`` and the reverse."""
    split_of = {
        unicodedata.normalize("NFC", f"{case['subject']}_slice_{z}"): case["split"]
        for case in dataset["cases"]
        for z in case["slices"]
    }
    for channel, own in files.items():
        missing = sorted(split_of.keys() - own.keys(), key=brats.natural_key)
        if missing:
            path = bf.join(root, channel, brats.slice_name(missing[0], channel))
            raise ValueError(
                f"{path} is missing{_and_more(missing)}: {brats.DATASET_FILE} lists its slice;"
                " restore it or prepare the folder anew."
            )
        extra = sorted(own.keys() - split_of.keys(), key=brats.natural_key)
        if extra:
            raise ValueError(
                f"{bf.join(root, channel, own[extra[0]])} is not listed in {brats.DATASET_FILE}"
                f"{_and_more(extra)}: remove it or prepare the folder anew."
            )
    return {stem for stem, own_split in split_of.items() if split in ("all", own_split)}


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


# ------------------------------------------------------------------------------- headers and pixels

# A PNG begins with its signature, the length (13) and name of the header chunk, then width, height,
# bit depth and colour type.
_PNG_START = struct.Struct(">8s4s4sIIBB")
_PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
_MAX_SIZE = 4096  # H and W; a header that promises more is not believed


def _check_headers(paths: Sequence[str]) -> tuple[int, int]:
    """Refuse a file that is not an 8-bit grey PNG of the same, square size as the first: W, H."""
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(_read_header, paths, chunksize=64))
    for path, (width, height, bits, colour) in zip(paths, headers):
        if (bits, colour) != (8, 0):
            kind = _PNG_COLOURS.get(colour, "unknown")
            raise ValueError(
                f"{path} is a {bits}-bit {kind} PNG: expected 8-bit grey; convert or replace it."
            )
        if (width, height) != headers[0][:2]:
            raise ValueError(
                f"{path} has {width}x{height} pixels but {paths[0]} has"
                f" {headers[0][0]}x{headers[0][1]}: all slices must have one size."
            )
        if width != height:
            raise ValueError(f"{path} has {width}x{height} pixels: slices must be square.")
        if not 1 <= width <= _MAX_SIZE:
            raise ValueError(
                f"{path} has {width}x{height} pixels: slices have at most {_MAX_SIZE}x{_MAX_SIZE};"
                " replace or remove it."
            )
    return headers[0][:2]


def _read_header(path: str) -> tuple[int, int, int, int]:
    """Width, height, bits per sample and colour type of a PNG file."""
    with open_file(path) as file:
        start = file.read(_PNG_START.size)
    if len(start) == _PNG_START.size:
        signature, _, chunk, *header = _PNG_START.unpack(start)
        if signature == PNG_SIGNATURE and chunk == b"IHDR":
            return tuple(header)
    raise ValueError(f"{path} is not a PNG file, or is truncated: replace or remove it.")


def _read_levels(path: str) -> Image.Image:
    """Decode a slice: an 8-bit grey image."""
    image, _ = decode_picture(path, ("PNG",))
    if image.mode != "L":
        raise ValueError(
            f"{path} has Pillow mode {image.mode}: expected 8-bit grey (L); convert or replace it."
        )
    return image


def _resize(plane: Image.Image, size: int, is_mask: bool) -> Image.Image | np.ndarray:
    """[H, W] -> [size, size]: a mask by nearest neighbour, an image by exact area averaging."""
    if plane.size == (size, size):
        return plane
    if is_mask:
        return plane.resize((size, size), Image.Resampling.NEAREST)
    levels = np.asarray(plane, dtype=np.float64)
    return _area_means(_area_means(levels, size).T, size).T


def _area_means(levels: np.ndarray, size: int) -> np.ndarray:
    """[old, W] -> [size, W]: mean over each new row's area, parts of old rows included.

    By differences of the running sum. Pillow's box filter takes whole pixels only, which is exact
    where the sizes divide but not elsewhere; a matrix product wakes up threads for nothing.
    """
    old = len(levels)
    if old % size == 0:
        return levels.reshape(size, old // size, -1).mean(axis=1)  # the same, faster
    sums = np.zeros((old + 1, levels.shape[1]))
    np.cumsum(levels, axis=0, out=sums[1:])
    ends = np.arange(size + 1) * (old / size)  # the new rows' borders, counted in old rows
    whole = np.minimum(ends.astype(int), old - 1)
    part = (ends - whole)[:, None]
    at_ends = sums[whole] + part * (sums[whole + 1] - sums[whole])
    return np.diff(at_ends, axis=0) * (size / old)


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
