"""BraTS scans: modalities, labels and their grey codes, finding cases, volumes to slices.

Legend: X, Y, Z are the axes of a volume in the challenge's orientation, LPS: they run to the left,
to the back and up. A slice is ``volume[:, :, z]``, so its rows are axis X and its columns axis Y,
and slice numbers count from 1 as in the published file names.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import blobfile as bf
import numpy as np

from improved_diffusion.input_files import is_broken_link, open_file
from improved_diffusion.nifti_import import MAX_PLACE_MM, ORIENTATION, read_volume, shape_text

CHANNELS = ("FLAIR", "Seg", "T1", "T1CE", "T2")  # the order of channels in every tensor
MASK_CHANNEL = "Seg"
# How a slice's file name ends, per channel (the published preparation's spelling).
SUFFIXES = {"FLAIR": "flair", "Seg": "seg", "T1": "T1", "T1CE": "T1ce", "T2": "T2"}

# Label in the segmentation volume -> grey level in the mask PNG. The enhancing tumour is label 4
# in BraTS up to 2022 and label 3 from 2023 on; both become 204.
LABEL_CODES = {0: 0, 1: 51, 2: 102, 3: 204, 4: 204}
MASK_CODES = (0, 51, 102, 204)
LABEL_NAMES = {0: "background", 51: "necrotic core", 102: "oedema", 204: "enhancing tumour"}
# Grey code -> RGB; the hues of Okabe and Ito, which colour-blind readers can tell apart.
PALETTE = {0: (0, 0, 0), 51: (213, 94, 0), 102: (0, 158, 115), 204: (240, 228, 66)}

IMAGE_SIZE = 256
MAX_SLICES = 1024  # BraTS has 155
COVERAGE_THRESHOLD = 50  # of 255, after the recipe's scaling, before rounding
COVERAGE_FRACTION = 0.15  # of the IMAGE_SIZE x IMAGE_SIZE pixels
COVERAGE_ORDER = ("T1", "T1CE", "FLAIR", "T2")  # the first that a case has decides

# Recipe -> its rule in words, as dataset.json records it.
RECIPES = {
    "report": "volume / volume.max() * 255, values below 0 set to 0, rounded to 8 bits",
    "percentile": (
        "(volume - p0.5) / (p99.5 - p0.5) * 255 with the percentiles of the voxels above 0,"
        " clipped to 0..255, voxels at or below 0 set to 0, rounded to 8 bits"
    ),
}

DATASET_FILE = "dataset.json"
DATASET_FORMAT = "brats-slices"
DATASET_VERSION = 1

# File suffix (any case) -> channel, in every BraTS naming. "Segm" is how one segmentation of
# BraTS 2020 (patient 355) is named in the public copy.
_NIFTI_SUFFIXES = {
    "flair": "FLAIR",
    "t2f": "FLAIR",
    "seg": "Seg",
    "segm": "Seg",
    "t1": "T1",
    "t1n": "T1",
    "t1ce": "T1CE",
    "t1c": "T1CE",
    "t2": "T2",
    "t2w": "T2",
}
_FOREIGN_PREFIX_SUFFIX = "segm"
_NIFTI_NAME = re.compile(
    rf"(?:(?P<prefix>.+)[_-])?(?P<suffix>{'|'.join(_NIFTI_SUFFIXES)})\.nii(?:\.gz)?",
    re.IGNORECASE | re.DOTALL,
)
# BraTS 2023 and later: the last number is the time point, so several cases are one patient.
_TIME_POINT = re.compile(r"(?P<patient>BraTS-[A-Za-z]+-\d+)-\d+")

_AFFINE_TOLERANCE_MM = 1.0
# Of the voxels other than 0. Interpolation leaves a few below 0; z-scores and CT have many.
_NEGATIVE_FRACTION = 0.25


# ---------------------------------------------------------------------------------- channels, names


def parse_channels(text: str) -> list[str]:
    """``"T1CE,Seg"`` -> ``["Seg", "T1CE"]``: channel names in the fixed order of ``CHANNELS``.

    :raises ValueError: an unknown, repeated or missing name.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in CHANNELS:
            raise ValueError(
                f"--channels {text}: there is no channel {name!r};"
                f" the channels are {', '.join(CHANNELS)}."
            )
        if names.count(name) > 1:
            raise ValueError(f"--channels {text}: {name} is named more than once.")
    return [channel for channel in CHANNELS if channel in names]


def slice_name(stem: str, channel: str) -> str:
    """File name of a slice: ``("Subject_001_slice_70", "T1CE")`` -> ``..._70_T1ce.png``."""
    return f"{stem}_{SUFFIXES[channel]}.png"


def split_slice_name(name: str, channel: str) -> str:
    """Stem of a slice's file name: without extension and, where present, the channel's suffix.

    The suffix may be in any case; a plain ``Subject_001_slice_70.png`` gives the same stem. An
    accented letter may be one character or two, as macOS writes it: the stem has one (NFC).
    """
    stem = unicodedata.normalize("NFC", os.path.splitext(name)[0])
    suffix = f"_{SUFFIXES[channel]}"
    if stem.lower().endswith(suffix.lower()):
        return stem[: -len(suffix)]
    return stem


def natural_key(text: str) -> tuple:
    """Sort key that orders the numbers in names by value: ``slice_9`` before ``slice_10``."""
    parts = re.split(r"(\d+)", text)
    # Of two numbers the one with more digits is larger; int() has a limit.
    parts[1::2] = [(len(number), number) for part in parts[1::2] for number in [part.lstrip("0")]]
    return tuple(parts), text


def _nearest_codes() -> np.ndarray:
    distance = np.abs(np.arange(256)[:, None] - np.array(MASK_CODES)[None, :])
    return np.array(MASK_CODES, dtype=np.uint8)[distance.argmin(axis=1)]  # first, so lower, wins


_NEAREST_CODE = _nearest_codes()


def snap_mask(levels: np.ndarray) -> np.ndarray:
    """Nearest label code of every grey level; half-way (only 153 is) goes to the lower code.

    :param levels: uint8, any shape.
    :returns: uint8 of the same shape, values in ``MASK_CODES``.
    """
    assert levels.dtype == np.uint8, levels.dtype
    return _NEAREST_CODE[levels]


# ------------------------------------------------------------------------------------ finding cases


@dataclass(frozen=True)
class Case:
    """One scan of one patient: a folder with a NIfTI file per modality."""

    name: str
    folder: str
    files: dict[str, str]  # channel -> path, for every modality that the folder holds

    @property
    def patient(self) -> str:
        """Whose scan it is: cases of one patient always fall on the same side of the split."""
        match = _TIME_POINT.fullmatch(self.name)
        return match["patient"] if match else self.name

    @property
    def coverage_modality(self) -> str:
        """The modality whose brightness decides which slices are kept."""
        return next(channel for channel in COVERAGE_ORDER if channel in self.files)


def find_cases(brats_dir: str, channels: Iterable[str]) -> list[Case]:
    """All cases in and below ``brats_dir``, in natural order of their names.

    A case is a folder whose files share a prefix and end in a modality's suffix, with ``_`` or
    ``-`` before it, as ``.nii`` or ``.nii.gz``: ``_flair, _t1, _t1ce, _t2, _seg`` (to 2022) or
    ``-t2f, -t1n, -t1c, -t2w, -seg`` (2023 on). Hidden files and ``.partial`` folders are not read.
    Links are followed, also out of ``brats_dir``.

    :param channels: the modalities that every case must have.
    :raises ValueError: no folder, no case, a missing or doubled modality, several cases in one
        folder, one case name in two folders, a folder that cannot be read, or a broken link.
    """
    if not os.path.isdir(brats_dir):
        raise ValueError(f"--brats_dir {brats_dir} is not a folder.")
    cases: dict[str, Case] = {}
    other_name = None
    for folder, names in _walk(brats_dir):
        matches = [match for name in names if (match := _NIFTI_NAME.fullmatch(name))]
        if not matches:
            others = (name for name in names if name.lower().endswith((".nii", ".nii.gz")))
            other_name = other_name or next(others, None)
            continue
        case = _case_in_folder(folder, matches, channels)
        if case.name in cases:
            raise ValueError(
                f"case {case.name} is in two folders, {cases[case.name].folder} and {folder};"
                " keep one of them."
            )
        cases[case.name] = case
    if not cases:
        found = f" It holds {other_name}: rename such files." if other_name else ""
        raise ValueError(
            f"no BraTS case found in {brats_dir}: expected a folder per patient with files that"
            " end in _flair, _t1, _t1ce, _t2, _seg (or, as from 2023 on, -t2f, -t1n, -t1c, -t2w,"
            f" -seg) and .nii or .nii.gz.{found}"
        )
    return sorted(cases.values(), key=lambda case: natural_key(case.name))


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Folders below ``root`` with their file names; follows links, but into no folder twice."""

    def refuse(error: OSError) -> None:
        raise ValueError(
            f"the folder {error.filename} cannot be read: {error.strerror}; make it readable or"
            " remove it."
        ) from error

    seen = {os.path.realpath(root)}
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        fresh = []
        for name in sorted(subfolders):
            real = os.path.realpath(os.path.join(folder, name))
            if real not in seen and not name.startswith(".") and not name.endswith(".partial"):
                seen.add(real)
                fresh.append(name)
        subfolders[:] = fresh
        visible = sorted(name for name in names if not name.startswith("."))
        for path in (os.path.join(folder, name) for name in visible):
            if is_broken_link(path):
                raise ValueError(f"{path} is a link that leads nowhere: restore or remove it.")
        yield folder, visible


def _case_in_folder(folder: str, matches: list[re.Match], channels: Iterable[str]) -> Case:
    files: dict[str, str] = {}
    prefixes = set()
    for match in matches:
        suffix = match["suffix"].lower()
        if suffix != _FOREIGN_PREFIX_SUFFIX:
            prefixes.add(unicodedata.normalize("NFC", match["prefix"] or ""))
    if len(prefixes) > 1:
        raise ValueError(
            f"{folder} holds files of more than one case ({', '.join(sorted(prefixes)[:3])});"
            " give each case a folder of its own."
        )
    for match in matches:
        channel = _NIFTI_SUFFIXES[match["suffix"].lower()]
        if channel in files:
            raise ValueError(
                f"{folder} holds two {channel} files, {os.path.basename(files[channel])} and"
                f" {match.string}; keep one of them."
            )
        files[channel] = os.path.join(folder, match.string)
    missing = [channel for channel in channels if channel not in files]
    if missing:
        raise ValueError(
            f"the case in {folder} has no {' and no '.join(missing)} file: it holds"
            f" {', '.join(sorted(files))}; add the file, or leave the modality out of --channels."
        )
    if not any(channel in files for channel in COVERAGE_ORDER):
        raise ValueError(
            f"the case in {folder} has only a segmentation: one of {', '.join(COVERAGE_ORDER)} is"
            " needed to decide which slices show enough brain."
        )
    name = next(iter(prefixes), "") or os.path.basename(os.path.abspath(folder))
    return Case(name=name, folder=folder, files=files)


# ---------------------------------------------------------------------------------- reading volumes


def read_case(case: Case, channels: Iterable[str]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Read and check a case's volumes one after the other, the coverage modality first.

    :param channels: which modalities; the coverage modality is read even where it is not one.
    :returns: ``(channel, volume [X, Y, Z], affine [4, 4])``: images in their stored type, masks
        as labels (uint8); the affine maps voxel indices to millimetres (RAS+).
    :raises ValueError: anything wrong with a file, or volumes that do not lie on one grid.
    """
    first = case.coverage_modality
    wanted = [first, *(channel for channel in CHANNELS if channel in channels and channel != first)]
    largest = (IMAGE_SIZE, IMAGE_SIZE, MAX_SLICES)
    shape = affine = unplaced = turned = None
    for channel in wanted:
        path = case.files[channel]
        volume, own_affine, orientation = read_volume(path, largest)
        if channel == MASK_CHANNEL:
            volume = check_labels(volume, path)
        else:
            check_intensities(volume, path)
        if orientation is None:
            unplaced = path
        elif orientation != ORIENTATION:
            turned = f"{path} is stored as {orientation}"
        if unplaced and turned:
            raise ValueError(
                f"{unplaced} does not say how it lies (its sform and qform codes are 0), but"
                f" {turned}, not {ORIENTATION}, so the two cannot be matched: give both an affine."
            )
        if shape is None:
            shape = volume.shape
        elif volume.shape != shape:
            raise ValueError(
                f"{path} has {shape_text(volume.shape)} voxels but {case.files[first]} has"
                f" {shape_text(shape)}: the volumes of a case must have the same shape;"
                " resample one of them or leave the case out."
            )
        if own_affine is not None:
            if affine is None:
                affine = own_affine
            elif (gap := _corner_gap_mm(shape, affine, own_affine)) > _AFFINE_TOLERANCE_MM:
                raise ValueError(
                    f"{path} lies up to {gap:.1f} mm away from the other volumes of its case"
                    " according to its affine: the volumes of a case must be co-registered on one"
                    " grid; resample it or leave the case out."
                )
        yield channel, volume, np.eye(4) if affine is None else affine


def check_intensities(volume: np.ndarray, path: str) -> None:
    """Refuse an image volume that holds NaN or infinity, nothing above 0, or much below 0."""
    if volume.dtype.kind == "f":
        bad = volume.size - int(np.count_nonzero(np.isfinite(volume)))
        if bad:
            raise ValueError(
                f"{path} holds {bad} voxels that are NaN or infinite: repair or replace the file."
            )
    if volume.max() <= 0:
        raise ValueError(f"{path} has no voxel above 0: the volume is empty; replace the file.")
    negative = np.count_nonzero(volume < 0) / np.count_nonzero(volume)
    if negative > _NEGATIVE_FRACTION:
        raise ValueError(
            f"{path} has {negative:.0%} of its voxels other than 0 below 0, which would all become"
            " black: it seems normalised (z-scores) or no MRI; give the intensities as BraTS"
            " publishes them."
        )


def check_labels(volume: np.ndarray, path: str) -> np.ndarray:
    """Segmentation volume as uint8 labels.

    :raises ValueError: values other than 0 to 4, or both 3 and 4 (two meanings of enhancing).
    """
    found = np.unique(volume)
    unknown = [value for value in found.tolist() if value not in LABEL_CODES]
    if unknown:
        listed = ", ".join(f"{value:g}" for value in unknown[:5])
        raise ValueError(
            f"{path} holds {listed} as a label: a BraTS segmentation holds 0, 1, 2 and 4 (to 2022)"
            " or 0, 1, 2 and 3 (from 2023 on); correct or replace it."
        )
    if 3 in found and 4 in found:
        raise ValueError(
            f"{path} holds both label 3 and label 4: each means enhancing tumour in one BraTS"
            " convention, so the file follows neither; correct or replace it."
        )
    return volume.astype(np.uint8)


def _corner_gap_mm(shape: Sequence[int], a: np.ndarray, b: np.ndarray) -> float:
    """Largest distance between where two affines put the corners of a volume, in mm."""
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in shape], indexing="ij"))
    voxels = np.vstack([corners.reshape(3, -1), np.ones(8)])  # [4, 8]
    with np.errstate(over="ignore"):
        return float(np.linalg.norm(((a - b) @ voxels)[:3], axis=0).max())


# -------------------------------------------------------------------------------- volumes to slices


def intensity_scale(volume: np.ndarray, recipe: str, path: str = "the volume") -> dict[str, float]:
    """The numbers by which a recipe maps a whole volume to 0..255.

    :param volume: [X, Y, Z] with at least one voxel above 0 (see ``check_intensities``).
    :returns: ``{"max": ...}`` for ``report``; ``{"low": ..., "high": ...}`` for ``percentile``.
    :raises ValueError: unknown recipe, or (percentile) voxels that nearly all have one value.
    """
    if recipe == "report":
        return {"max": float(volume.max())}
    if recipe == "percentile":
        low, high = np.percentile(volume[volume > 0], (0.5, 99.5)).tolist()
        if high <= low:
            raise ValueError(
                f"{path}: the 0.5 and 99.5 percentiles of its voxels above 0 are both {low:g}, so"
                " there is no range to scale; use --recipe report or replace the file."
            )
        return {"low": low, "high": high}
    raise ValueError(f"--recipe {recipe}: the recipes are {' and '.join(RECIPES)}.")


def apply_scale(values: np.ndarray, scale: dict[str, float]) -> np.ndarray:
    """Scaled values in [0, 255], float64, not rounded; voxels at or below 0 stay 0."""
    values = np.asarray(values, dtype=np.float64)
    if "max" in scale:
        return np.maximum(values, 0.0) / scale["max"] * 255
    scaled = (values - scale["low"]) / (scale["high"] - scale["low"]) * 255
    return np.where(values > 0, np.clip(scaled, 0.0, 255.0), 0.0)


def covered_slices(volume: np.ndarray, scale: dict[str, float]) -> list[int]:
    """1-based numbers of the slices that show enough brain.

    A slice is kept if more than 15 % of its 256 x 256 pixels are above 50 after scaling.

    :param volume: [X, Y, Z], the coverage modality.
    """
    needed = COVERAGE_FRACTION * IMAGE_SIZE * IMAGE_SIZE
    return [
        z + 1
        for z in range(volume.shape[2])
        if np.count_nonzero(apply_scale(volume[:, :, z], scale) > COVERAGE_THRESHOLD) > needed
    ]


def padding(shape: Sequence[int]) -> list[list[int]]:
    """Zero pixels before and after axes X and Y: 240 -> [8, 8]; an odd pixel goes after."""
    return [
        [(IMAGE_SIZE - size) // 2, IMAGE_SIZE - size - (IMAGE_SIZE - size) // 2]
        for size in shape[:2]
    ]


def image_slice(volume: np.ndarray, z: int, scale: dict[str, float]) -> np.ndarray:
    """Slice number ``z`` (1-based) of an image volume: uint8 [256, 256], rounded, padded."""
    levels = np.rint(apply_scale(volume[:, :, z - 1], scale)).astype(np.uint8)
    return np.pad(levels, padding(volume.shape))


def mask_slice(labels: np.ndarray, z: int) -> np.ndarray:
    """Slice number ``z`` (1-based) of a label volume: uint8 [256, 256] of label codes."""
    table = np.zeros(256, dtype=np.uint8)
    table[list(LABEL_CODES)] = list(LABEL_CODES.values())
    return np.pad(table[labels[:, :, z - 1]], padding(labels.shape))


# --------------------------------------------------------------------------------------- data sets


def label_convention(labels: dict[str, Iterable[int]]) -> str:
    """Which labels a data set uses: "2020" (4 is enhancing), "2023" (3 is), or "either".

    :param labels: case name -> the labels in its segmentation.
    :raises ValueError: some cases hold label 3 and others label 4.
    """
    with_3 = next((name for name, found in labels.items() if 3 in found), None)
    with_4 = next((name for name, found in labels.items() if 4 in found), None)
    if with_3 and with_4:
        raise ValueError(
            f"case {with_3} holds label 3 and case {with_4} label 4: each means enhancing tumour in"
            " one BraTS convention; prepare data of the two conventions separately."
        )
    return "2023" if with_3 else "2020" if with_4 else "either"


def convention_codes(convention: str) -> dict[int, int]:
    """Label -> grey code of one convention ("either" is written as 2020)."""
    enhancing = 3 if convention == "2023" else 4
    return {label: LABEL_CODES[label] for label in (0, 1, 2, enhancing)}


def read_dataset_json(folder: str) -> dict[str, Any] | None:
    """The ``dataset.json`` of a slice folder (local or remote); None where it has none.

    :raises ValueError: the file is there but is damaged or of another format.
    """
    path = bf.join(folder, DATASET_FILE)
    if not bf.exists(path) and not is_broken_link(path):
        return None
    with open_file(path) as file:
        try:
            dataset = json.loads(file.read().decode("utf-8-sig"))
            found = dataset["format"], dataset["version"]
            known = found == (DATASET_FORMAT, DATASET_VERSION)
            if known:
                _check_dataset(dataset)
        except Exception as error:  # what arbitrary content raises has no bound
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}: {error}): restore it, or prepare the"
                " folder anew with scripts/brats_prepare.py."
            ) from error
    if not known:
        raise ValueError(
            f"{path} has format {found[0]!r:.80} version {found[1]!r:.80}:"
            f" expected {DATASET_FORMAT!r} version {DATASET_VERSION}; prepare the folder anew with"
            " scripts/brats_prepare.py."
        )
    return dataset


def _check_dataset(dataset: dict[str, Any]) -> None:
    """See that what others rely on has the right types, and that no slice is listed twice.

    :raises ValueError: it has not; other errors where it is of quite another form.
    """
    listed = set()
    for case in dataset["cases"]:
        subject, slices = case["subject"], case["slices"]
        if case["split"] not in ("train", "test") or not isinstance(subject, str):
            raise ValueError("a case lacks its subject or split")
        if not isinstance(slices, list) or not all(type(z) is int and z > 0 for z in slices):
            raise ValueError(f"the slices of {subject!r:.80} are no list of numbers")
        own = {f"{unicodedata.normalize('NFC', subject)}_slice_{z}" for z in slices}
        if len(own) < len(slices) or own & listed:
            raise ValueError(f"a slice of {subject!r:.80} is listed twice")
        listed |= own
    if geometry := dataset.get("geometry"):
        affine = np.array(geometry["affine"], dtype=np.float64)
        shape, padding = geometry["volume_shape"], geometry["padding"]
        numbers = [*shape, *padding[0], *padding[1], dataset["image_size"]]
        sound = (
            (affine.shape, len(shape), len(padding), len(numbers)) == ((4, 4), 3, 2, 8)
            and affine[3].tolist() == [0, 0, 0, 1]
            and np.abs(affine).max() < MAX_PLACE_MM
            and all(type(number) is int and 0 <= number < 2**31 for number in numbers)
            and dataset["image_size"] > 0
            and dataset["label_convention"] in (None, "2020", "2023", "either")
        )
        if not sound:
            raise ValueError("its geometry is not that of slices")
