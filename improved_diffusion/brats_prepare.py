"""From BraTS cases to a slice folder: the engine behind ``scripts/brats_prepare.py``.

The folder grows as ``<out_dir>.partial``: ``slices/`` is what will be renamed to ``out_dir``,
``state/`` holds the settings and one small record per finished case, written after the case's
last slice. A second start with the same settings keeps every case that has a record.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from improved_diffusion import brats
from improved_diffusion.files import atomic_write
from improved_diffusion.parallel import Progress, default_workers, no_progress, process_map
from improved_diffusion.seeds import check_seed

# 56 of the 369 patients of BraTS 2020 were held out in the published preparation.
_TEST_SHARE = 56 / 369
# Fixed, so that the bytes do not depend on a library's default.
_PNG_OPTIONS = {"format": "PNG", "compress_level": 6, "optimize": False}
_AXES = {  # of the volume as nifti_import turns it
    "rows": "volume axis 0, to the left",
    "columns": "volume axis 1, to the back",
    "slice_number": "volume axis 2, upwards, counted from 1",
}


# File -> size and time of change: tells whether a case is still what was read before.
_Sources = dict[str, list[int]]


class _Task(NamedTuple):
    """What a worker needs to convert one case."""

    case: brats.Case
    sources: _Sources  # when the case was checked
    subject: str
    channels: list[str]
    recipe: str
    partial: str


def prepare(
    brats_dir: str,
    out_dir: str,
    *,
    channels: Sequence[str] = brats.CHANNELS,
    recipe: str = "report",
    test_patients: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress = no_progress,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write the slices of all cases below ``brats_dir`` and ``dataset.json`` to ``out_dir``.

    All input is read and checked before the first file is written, so bad input leaves nothing
    behind. The result is the same, byte for byte, for any number of workers and interruptions.

    :param channels: modalities to write; every case must have them.
    :param recipe: ``report`` (scaled by the volume's maximum) or ``percentile``.
    :param test_patients: how many patients to hold out; None: 56 of 369 in proportion, at least
        one of two or more.
    :param seed: chooses the test patients.
    :param workers: processes; None: one per core.
    :param progress: shows how far a loop has come, e.g. ``cli.progress``.
    :param log: takes one line at a time for the user.
    :returns: the contents of ``dataset.json``.
    :raises ValueError: anything that the user can mend: input, settings, an output folder in use.
    """
    channels = brats.parse_channels(",".join(channels))
    if recipe not in brats.RECIPES:
        raise ValueError(f"--recipe {recipe}: the recipes are {' and '.join(brats.RECIPES)}.")
    cases = brats.find_cases(brats_dir, channels)
    subjects = [f"Subject_{number:03d}" for number in range(1, len(cases) + 1)]
    test = choose_test_patients([case.patient for case in cases], test_patients, seed)
    settings = {
        "brats_dir": brats_dir,
        "cases": [case.name for case in cases],
        "channels": channels,
        "recipe": recipe,
        "test_patients": len(test),
        "seed": seed,
    }
    out_dir = os.path.realpath(out_dir) if os.path.islink(out_dir) else os.path.normpath(out_dir)
    partial = f"{out_dir}.partial"
    done = _existing_result(out_dir, settings)
    if done is not None:
        log(f"{out_dir} is already prepared with these settings: nothing to do.")
        shutil.rmtree(partial, ignore_errors=True)
        return done
    _check_can_create(partial)
    records = _reusable_records(partial, settings, cases, subjects)
    if records:
        log(f"continuing {partial}: {len(records)} of {len(cases)} cases are complete.")
    open_cases = [pair for pair in zip(cases, subjects) if pair[1] not in records]

    workers = min(default_workers() if workers is None else workers, max(1, len(open_cases)))
    with process_map(workers) as pmap:
        checks = pmap(_check_case, [(case, channels, recipe) for case, _ in open_cases])
        checks = list(progress(checks, total=len(open_cases), desc="checking", unit="patient"))
        labels = {case.name: found for (case, _), (found, _) in zip(open_cases, checks)}
        labels |= {record["case"]: record["labels"] for record in records.values()}
        convention = brats.label_convention(labels) if brats.MASK_CHANNEL in channels else None
        with _partial_folder(partial, settings, channels):
            _remove_unfinished(partial, channels, keep=set(records))
            tasks = [
                _Task(case, sources, subject, channels, recipe, partial)
                for (case, subject), (_, sources) in zip(open_cases, checks)
            ]
            done_tasks = pmap(_convert_case, tasks)
            list(progress(done_tasks, total=len(tasks), desc="preparing", unit="patient"))
            records = {subject: _read_record(partial, subject) for subject in subjects}
            dataset = _dataset(settings, convention, [*records.values()], test)
            if dataset["counts"]["slices"] == 0:
                shutil.rmtree(partial)
                raise ValueError(
                    f"no slice of {brats_dir} shows enough brain (more than"
                    f" {brats.COVERAGE_FRACTION:.0%} of {brats.IMAGE_SIZE}x{brats.IMAGE_SIZE}"
                    f" pixels above {brats.COVERAGE_THRESHOLD} after scaling): check the"
                    " intensities, or try --recipe percentile."
                )
            for case in dataset["cases"]:
                if not case["slices"]:
                    log(f"warning: {case['case']} keeps no slice: {case['note']}.")
            _write_dataset_json(os.path.join(partial, "slices", brats.DATASET_FILE), dataset)
            os.replace(os.path.join(partial, "slices"), out_dir)
            shutil.rmtree(partial)
    counts = dataset["counts"]
    log(
        f"{out_dir}: {counts['slices']} slices per channel of {counts['patients']} patients"
        f" ({counts['train_slices']} for training, {counts['test_slices']} for testing)."
    )
    return dataset


def choose_test_patients(
    patients: Sequence[str], test_patients: int | None, seed: int
) -> frozenset[str]:
    """The patients to hold out for testing.

    :param patients: the patient of every case, in order; a patient may occur more than once.
    :param test_patients: how many; None: 56 of 369 in proportion, at least one of two or more.
    :raises ValueError: a negative number, or so many that no patient is left for training.
    """
    check_seed(seed)
    distinct = list(dict.fromkeys(patients))
    if test_patients is None:
        test_patients = max(1, round(_TEST_SHARE * len(distinct))) if len(distinct) > 1 else 0
    if not 0 <= test_patients < len(distinct):
        raise ValueError(
            f"--test_patients {test_patients}: with {len(distinct)} patients it must lie between 0"
            f" and {len(distinct) - 1}, so that at least one is left for training."
        )
    order = np.random.default_rng(seed).permutation(len(distinct))
    return frozenset(distinct[i] for i in order[:test_patients])


# ------------------------------------------------------------------------------------ one case


def _check_case(task: tuple[brats.Case, list[str], str]) -> tuple[list[int], _Sources]:
    """Read a whole case and find out whether it can be converted: its labels, and its files."""
    case, channels, recipe = task
    sources = _source_state(case)
    labels: list[int] = []
    for channel, volume, _ in brats.read_case(case, channels):
        if channel == brats.MASK_CHANNEL:
            labels = np.unique(volume).tolist()
        else:
            brats.intensity_scale(volume, recipe, case.files[channel])
    return labels, sources


def _convert_case(task: _Task) -> str:
    """Write a case's slices, then the record that says so; gives the subject's name."""
    case, sources, subject, channels, recipe, partial = task
    slices: list[int] = []
    scales: dict[str, dict[str, float]] = {}
    labels: list[int] = []
    for channel, volume, affine in brats.read_case(case, channels):
        grid = {"shape": list(volume.shape), "affine": affine.tolist()}
        if channel == brats.MASK_CHANNEL:
            labels = np.unique(volume).tolist()
        else:
            scales[channel] = brats.intensity_scale(volume, recipe, case.files[channel])
        if channel == case.coverage_modality:
            slices = brats.covered_slices(volume, scales[channel])
        if channel not in channels:
            continue
        for z in slices:
            if channel == brats.MASK_CHANNEL:
                levels = brats.mask_slice(volume, z)
            else:
                levels = brats.image_slice(volume, z, scales[channel])
            name = brats.slice_name(f"{subject}_slice_{z}", channel)
            Image.fromarray(levels).save(
                os.path.join(partial, "slices", channel, name), **_PNG_OPTIONS
            )
    if _source_state(case) != sources:
        raise ValueError(
            f"the files in {case.folder} changed while they were read: start again when they are"
            " complete."
        )
    record = {
        "case": case.name,
        "patient": case.patient,
        "subject": subject,
        "sources": sources,
        "labels": labels,
        "slices": slices,
        "scale": {channel: scales[channel] for channel in brats.CHANNELS if channel in scales},
        "coverage_modality": case.coverage_modality,
        **grid,  # of the last volume read: they all share it
    }
    _write_json(_record_path(partial, subject), record)
    return subject


def _source_state(case: brats.Case) -> _Sources:
    state = {}
    for path in case.files.values():
        try:
            status = os.stat(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be opened ({error.strerror}): restore it.") from error
        state[os.path.basename(path)] = [status.st_size, status.st_mtime_ns]
    return state


# ------------------------------------------------------------------------- the folder and its state


def _existing_result(out_dir: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """``dataset.json`` of an ``out_dir`` that is complete with these settings; None if absent."""
    if not os.path.lexists(out_dir):
        return None
    if not os.path.isdir(out_dir):
        raise ValueError(f"--out_dir {out_dir} is a file: name a new folder.")
    dataset = brats.read_dataset_json(out_dir)
    if dataset is None:
        if os.listdir(out_dir):
            raise ValueError(f"--out_dir {out_dir} is not empty: name a new folder.")
        return None
    earlier = {
        "brats_dir": dataset.get("source"),
        "cases": [case.get("case") for case in dataset["cases"]],
        **{key: dataset.get(key) for key in ("channels", "recipe", "test_patients", "seed")},
    }
    _refuse_other_settings(out_dir, earlier, settings)
    return dataset


def _refuse_other_settings(folder: str, earlier: dict[str, Any], settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        if earlier.get(key) == value:
            continue
        if key == "cases":
            difference = f"with {len(earlier.get(key) or [])} cases that are not today's"
        else:
            difference = f"with --{key} {_flag(earlier.get(key))}, not {_flag(value)}"
        raise ValueError(
            f"{folder} was made {difference}: give the same settings to continue, name another"
            " --out_dir, or delete the folder."
        )


def _flag(value: object) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


def _check_can_create(path: str) -> None:
    """Refuse a path that could not be created, before any work and without creating anything."""
    parent = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise ValueError(f"{path} cannot be created: {parent} is not a folder; change --out_dir.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(
            f"{path} cannot be created: no permission to write in {parent}; change --out_dir."
        )


def _reusable_records(
    partial: str, settings: dict[str, Any], cases: list[brats.Case], subjects: list[str]
) -> dict[str, dict[str, Any]]:
    """Records of the cases that an earlier start completed and whose sources have not changed.

    :raises ValueError: the folder is not ours, or was begun with other settings.
    """
    if not os.path.lexists(partial) or (os.path.isdir(partial) and not os.listdir(partial)):
        return {}
    settings_path = os.path.join(partial, "state", "settings.json")
    if not os.path.exists(settings_path):
        raise ValueError(f"{partial} is of another origin: delete it or change --out_dir.")
    _refuse_other_settings(partial, _read_json(settings_path), settings)
    names = {
        channel: set(os.listdir(os.path.join(partial, "slices", channel)))
        for channel in settings["channels"]
    }
    records = {}
    for case, subject in zip(cases, subjects):
        if not os.path.exists(_record_path(partial, subject)):
            continue
        record = _read_record(partial, subject)
        written = all(
            brats.slice_name(f"{subject}_slice_{z}", channel) in names[channel]
            for channel in settings["channels"]
            for z in record["slices"]
        )
        if written and record["sources"] == _source_state(case):
            records[subject] = record
    return records


@contextmanager
def _partial_folder(partial: str, settings: dict[str, Any], channels: list[str]) -> Iterator[None]:
    """Create (or take up) the growing folder and lock it; on an error keep it only if it is of use.

    The lock goes with this process, so a killed start never blocks the next one.
    """
    state = os.path.join(partial, "state")
    os.makedirs(state, exist_ok=True)
    with open(os.path.join(state, "lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is writing {partial}: wait for it or stop it first."
            ) from error
        for channel in channels:
            os.makedirs(os.path.join(partial, "slices", channel), exist_ok=True)
        _write_json(os.path.join(state, "settings.json"), settings)
        try:
            yield
        except BaseException:
            if os.path.isdir(state) and not any(
                name.startswith("Subject_") for name in os.listdir(state)
            ):
                shutil.rmtree(partial)
            raise


def _remove_unfinished(partial: str, channels: list[str], keep: set[str]) -> None:
    """Delete what an interrupted start left of cases without a valid record."""
    for name in os.listdir(os.path.join(partial, "state")):
        if name.startswith("Subject_") and os.path.splitext(name)[0] not in keep:
            os.remove(os.path.join(partial, "state", name))
    for channel in channels:
        folder = os.path.join(partial, "slices", channel)
        for name in os.listdir(folder):
            if name.partition("_slice_")[0] not in keep:
                os.remove(os.path.join(folder, name))


def _record_path(partial: str, subject: str) -> str:
    return os.path.join(partial, "state", f"{subject}.json")


def _read_record(partial: str, subject: str) -> dict[str, Any]:
    return _read_json(_record_path(partial, subject))


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (ValueError, TypeError) as error:
        folder = os.path.dirname(os.path.dirname(path))
        raise ValueError(f"{path} is damaged: delete {folder} and start again.") from error


def _write_json(path: str, value: object) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(value).encode())


# --------------------------------------------------------------------------------------- data set


def _dataset(
    settings: dict[str, Any],
    convention: str | None,
    records: list[dict[str, Any]],
    test: frozenset[str],
) -> dict[str, Any]:
    """The contents of ``dataset.json``; the first case's grid stands for all that share it."""
    common = records[0]
    cases = []
    for record in records:
        case = {
            "subject": record["subject"],
            "case": record["case"],
            "patient": record["patient"],
            "split": "test" if record["patient"] in test else "train",
            "slices": record["slices"],
            "scale": record["scale"],
            "coverage_modality": record["coverage_modality"],
        }
        if record["shape"] != common["shape"]:
            case["shape"] = record["shape"]
            case["padding"] = brats.padding(record["shape"])
        if record["affine"] != common["affine"]:
            case["affine"] = record["affine"]
        if not record["slices"]:
            case["note"] = "no slice shows enough brain under the coverage rule"
        cases.append(case)
    coverage_modalities = list(dict.fromkeys(record["coverage_modality"] for record in records))
    codes = {} if convention is None else brats.convention_codes(convention)
    train = [case for case in cases if case["split"] == "train"]
    slices = sum(len(case["slices"]) for case in cases)
    train_slices = sum(len(case["slices"]) for case in train)
    return {
        "format": brats.DATASET_FORMAT,
        "version": brats.DATASET_VERSION,
        "source": settings["brats_dir"],
        "recipe": settings["recipe"],
        "intensity": brats.RECIPES[settings["recipe"]],
        "channels": settings["channels"],
        "label_convention": convention,
        "label_codes": {str(label): code for label, code in codes.items()},
        "image_size": brats.IMAGE_SIZE,
        "geometry": {
            "volume_shape": common["shape"],
            "padding": brats.padding(common["shape"]),
            "affine": common["affine"],
            "axes": _AXES,
        },
        "coverage": {
            "threshold": brats.COVERAGE_THRESHOLD,
            "fraction": brats.COVERAGE_FRACTION,
            "modality": coverage_modalities[0] if len(coverage_modalities) == 1 else "per case",
        },
        "seed": settings["seed"],
        "test_patients": settings["test_patients"],
        "counts": {
            "patients": len({record["patient"] for record in records}),
            "cases": len(cases),
            "train_cases": len(train),
            "test_cases": len(cases) - len(train),
            "slices": slices,
            "train_slices": train_slices,
            "test_slices": slices - train_slices,
            "cases_without_slices": sum(not case["slices"] for case in cases),
        },
        "cases": cases,
    }


def _write_dataset_json(path: str, dataset: dict[str, Any]) -> None:
    """Readable JSON: indented, but a line per case instead of one per slice number."""
    head = json.dumps({**dataset, "cases": []}, indent=2)
    lines = ",\n".join(f"    {json.dumps(case)}" for case in dataset["cases"])
    with open(path, "w", encoding="utf-8") as file:
        file.write(head.replace('"cases": []', f'"cases": [\n{lines}\n  ]') + "\n")
