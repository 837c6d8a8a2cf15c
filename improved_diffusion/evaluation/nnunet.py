"""Slices as raw data sets of nnU-Net (version 2), for those who want the strongest segmenter.

The format is nnU-Net's ``documentation/dataset_format.md``::

    Dataset501_RealSlices/
        dataset.json            channels, labels, number of cases
        splits_final.json       five folds that part no patient's slices
        imagesTr/Subject_001_slice_70_0000.png     a case is a slice; 0000 is its first channel
        labelsTr/Subject_001_slice_70.png          0 background, 1, 2, 3
        imagesTs/, labelsTs/    the test patients
    Dataset502_SyntheticSlices/                    as 501, without test slices and folds
    Dataset503_RealAndSyntheticSlices/             no slices of its own: dataset.json names those of
        dataset.json, splits_final.json            the two; a fold is validated on real ones alone

nnU-Net takes ``splits_final.json`` from here when it plans its experiments.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from improved_diffusion.evaluation.segmentation import CLASS_NAMES, Slices
from improved_diffusion.files import atomic_write
from improved_diffusion.seeds import check_seed

NAMES = ("RealSlices", "SyntheticSlices", "RealAndSyntheticSlices")
FIRST_ID = 501  # below, nnU-Net's own data sets have their numbers
ENDING = ".png"
FOLDS = 5
# Case identifiers of synthetic slices begin with it, whatever their files are called.
SYNTHETIC = "synthetic_"

Progress = Callable[..., Iterable[Any]]


def export(
    raw_dir: str,
    channels: Sequence[str],
    real: Slices,
    test: Slices,
    synthetic: Slices | None,
    *,
    first_id: int = FIRST_ID,
    seed: int = 0,
    progress: Progress = lambda items, **kwargs: items,
) -> list[str]:
    """Write up to three data sets into ``raw_dir``, nnU-Net's ``nnUNet_raw``.

    A data set has its name when it is complete; one that is there with the same slices is kept.

    :param channels: names of the C image channels.
    :param real: training slices.
    :param test: slices of other patients.
    :param synthetic: None: the real slices alone are written.
    :param first_id: the first data set's number; the others follow.
    :param seed: draws the folds.
    :returns: the data sets' folders.
    :raises ValueError: a number that is taken or not between 1 and 997, or a single patient.
    """
    check_seed(seed)
    if not 1 <= first_id <= 1000 - len(NAMES):
        raise ValueError(f"--nnunet_id {first_id}: give a number from 1 to {1000 - len(NAMES)}")
    names = [f"Dataset{first_id + i:03d}_{name}" for i, name in enumerate(NAMES)]
    if synthetic is None:
        names = names[:1]
    for name in names:
        _check_number_is_free(raw_dir, name)
    folds = patient_folds(real.names, real.patients, seed)
    write = partial(_write, raw_dir, progress=progress)
    digests = {"slices_sha256": real.digest(), "test_slices_sha256": test.digest()}
    about = {**_dataset_json(channels, len(real)), **digests}
    write(names[0], about, folds, {"Tr": real, "Ts": test})
    if synthetic is not None:
        cases = [f"{SYNTHETIC}{name}" for name in synthetic.names]
        named = Slices(synthetic.images, synthetic.classes, cases, synthetic.patients)
        about = {**_dataset_json(channels, len(cases)), "slices_sha256": synthetic.digest()}
        write(names[1], about, None, {"Tr": named})
        both = {
            **_references(names[0], real.names, len(channels)),
            **_references(names[1], cases, len(channels)),
        }
        about = {**_dataset_json(channels, len(both)), "dataset": both}
        folds = [{"train": fold["train"] + cases, "val": fold["val"]} for fold in folds]
        write(names[2], about, folds, {})
    return [os.path.join(raw_dir, name) for name in names]


def patient_folds(
    names: Sequence[str], patients: Sequence[str], seed: int
) -> list[dict[str, list[str]]]:
    """Folds for cross-validation: every patient's slices are validated on in exactly one.

    :param names: the slices' names; ``patients`` tells whose each is.
    :returns: five folds, or one per patient where there are fewer, as ``splits_final.json`` has
        them: names under ``train`` and ``val``.
    :raises ValueError: a single patient.
    """
    unique = list(dict.fromkeys(patients))
    if len(unique) < 2:
        raise ValueError(
            f"--nnunet_dir: there is one training patient only, {unique[0]}, and folds need two"
        )
    shuffled = np.random.default_rng((seed, *b"folds")).permutation(unique).tolist()
    folds = []
    for i in range(min(FOLDS, len(unique))):
        held_out = set(shuffled[i::FOLDS])
        parts: dict[str, list[str]] = {"train": [], "val": []}
        for name, patient in zip(names, patients):
            parts["val" if patient in held_out else "train"].append(name)
        folds.append(parts)
    return folds


def _check_number_is_free(raw_dir: str, name: str) -> None:
    """nnU-Net knows a data set by its number alone."""
    number = name.partition("_")[0]
    taken = re.compile(rf"{number}_(?!.*\.partial$).*")
    for other in os.listdir(raw_dir) if os.path.isdir(raw_dir) else ():
        if taken.fullmatch(other) and other != name:
            raise ValueError(
                f"--nnunet_dir {raw_dir} already holds {other}, whose number {name} would have; "
                "choose others with --nnunet_id"
            )


def _dataset_json(channels: Sequence[str], cases: int) -> dict[str, Any]:
    return {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": {name: i for i, name in enumerate(CLASS_NAMES)},
        "numTraining": cases,
        "file_ending": ENDING,
    }


def _image(case: str, channel: int) -> str:
    return f"{case}_{channel:04d}{ENDING}"


def _references(dataset: str, cases: Sequence[str], channels: int) -> dict[str, Any]:
    """Cases of another data set, by their files' paths relative to this one."""
    return {
        case: {
            "images": [f"../{dataset}/imagesTr/{_image(case, i)}" for i in range(channels)],
            "label": f"../{dataset}/labelsTr/{case}{ENDING}",
        }
        for case in cases
    }


def _write(
    raw_dir: str,
    name: str,
    about: dict[str, Any],
    folds: list[dict[str, list[str]]] | None,
    parts: dict[str, Slices],
    *,
    progress: Progress,
) -> None:
    """Write a data set: ``parts`` are its slices by the ending of their folders' names."""
    target = Path(raw_dir, name)
    if target.exists():
        if _read_json(target / "dataset.json") != about:
            raise ValueError(
                f"{target} already holds other slices, and nothing is overwritten; choose another "
                "--nnunet_dir or --nnunet_id, or delete it"
            )
        return
    growing = target.with_name(f"{name}.partial")
    shutil.rmtree(growing, ignore_errors=True)
    try:
        for ending, slices in parts.items():
            _write_pictures(growing, ending, slices, partial(progress, desc=f"{name} {ending}"))
        if folds:
            _write_json(growing / "splits_final.json", folds)
        _write_json(growing / "dataset.json", about)
        growing.rename(target)
    except BaseException:
        shutil.rmtree(growing, ignore_errors=True)
        raise


def _write_pictures(folder: Path, ending: str, slices: Slices, progress: Progress) -> None:
    images, labels = folder / f"images{ending}", folder / f"labels{ending}"
    images.mkdir(parents=True)
    labels.mkdir()

    def write(i: int) -> None:
        case = slices.names[i]
        for channel, plane in enumerate(slices.images[i]):
            Image.fromarray(plane).save(images / _image(case, channel))
        Image.fromarray(slices.classes[i]).save(labels / f"{case}{ENDING}")

    with ThreadPoolExecutor() as pool:  # compression runs beside Python
        for _ in progress(pool.map(write, range(len(slices))), total=len(slices), unit="slice"):
            pass


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write_json(path: Path, value: object) -> None:
    with atomic_write(str(path)) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())
