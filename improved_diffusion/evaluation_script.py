"""What ``image_eval.py`` does: are samples valid, like real slices, new?"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blobfile as bf
import numpy as np

import brats_dataset
from improved_diffusion import __version__, brats, cli, dist_util, figures
from improved_diffusion.evaluation import (
    distribution,
    extractors,
    intervals,
    memorisation,
    pictures,
    report,
    validity,
)
from improved_diffusion.fp16_util import allow_tf32
from improved_diffusion.samples import write_sample_folder
from improved_diffusion.script_util import add_dict_to_argparser

BLOCK = 256  # slices that are copied at once
SHOWN = 16  # real slices and samples in the picture
RECORD, PAGE = "evaluation.json", "report.html"

# Flag: default and explanation.
FLAGS: dict[str, tuple[Any, str]] = {
    "real": (
        "",
        "slice folder of real slices; with a dataset.json its test patients are compared with, "
        "and its training patients give the noise floor and the slices that may be copied",
    ),
    "samples": ("", "sample folder, its .npz, or a slice folder"),
    "train": (
        "",
        "slice folder whose training patients the model was trained on (default: those of --real)",
    ),
    "out_dir": ("Evaluation", "folder to make"),
    "channels": ("", "channels to compare, e.g. T1CE,Seg (default: the samples')"),
    "num_samples": (0, "evaluate the first so many samples; 0: all"),
    "extractor": (
        "random",
        f"what turns images into features: {', '.join(extractors.EXTRACTORS)}; random needs no "
        "file, the others --extractor_weights",
    ),
    "extractor_weights": ("", "file of the extractor's weights"),
    "extractor_sha256": (
        "",
        "how the file's SHA-256 starts, 8 digits or more, where it is not the published file",
    ),
    "neighbours": (distribution.NEIGHBOURS, "k of precision, recall, density and coverage"),
    "pairs": (distribution.PAIRS, "random pairs of which MS-SSIM is taken"),
    "filter_to": ("", "also write a sample folder without the flagged samples here"),
}


@dataclass(frozen=True)
class SliceSet:
    """Slices of one kind.

    :param images: uint8 [N, H, W, C].
    :param names: of the N slices.
    :param patients: [N], whose slice each is.
    """

    images: np.ndarray
    names: list[str]
    patients: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shared(self) -> np.ndarray | None:
        """``patients``, where one has several slices: else each slice is drawn alone."""
        return self.patients if len(np.unique(self.patients)) < len(self) else None


def evaluate(description: str) -> None:
    """Read the command line, evaluate, and write the report into a new folder."""
    parser = argparse.ArgumentParser(description=description)
    add_dict_to_argparser(
        parser,
        {name: default for name, (default, _) in FLAGS.items()},
        {name: text for name, (_, text) in FLAGS.items()},
    )
    args = parser.parse_args()
    _check_flags(args)
    allow_tf32(False)
    extractor = extractors.open_extractor(
        args.extractor, args.extractor_weights, args.extractor_sha256, dist_util.dev()
    )
    with tempfile.TemporaryFile() as room:
        rows = _Rows(room)
        sampled, patients = _read_samples(args, rows)
        channels = list(sampled.channels or [])
        real, train = _read_real(args, channels, sampled.samples.shape[1], rows)
        whose = {
            name: own
            for name, own in (
                ("real", real.shared),
                ("samples", patients),
                ("train", train and train.shared),
            )
            if own is not None
        }
        sets = {"real": real.images, "samples": sampled.samples}
        distribution.check_sets(sets | ({"train": train.images} if train else {}), channels)
        partial = Path(f"{args.out_dir}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            flags = _evaluate(args, sampled, channels, real, train, whose, extractor, partial, rows)
            if args.filter_to:
                _filter(args, sampled, channels, flags)
            if bf.isdir(args.out_dir):
                Path(args.out_dir).rmdir()
            partial.rename(args.out_dir)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    print(f"wrote {Path(args.out_dir) / PAGE}")


def _check_flags(args: argparse.Namespace) -> None:
    for flag in ("real", "samples"):
        if not vars(args)[flag]:
            raise ValueError(f"--{flag} is missing; name a folder")
    for flag, least in (("num_samples", 0), ("neighbours", 1), ("pairs", 1)):
        if vars(args)[flag] < least:
            raise ValueError(f"--{flag} {vars(args)[flag]}: give {least} or more")
    for flag in ("out_dir", "filter_to"):
        folder = vars(args)[flag]
        if folder and bf.exists(folder) and (not bf.isdir(folder) or list(bf.listdir(folder))):
            raise ValueError(
                f"--{flag} {folder} already holds something, and nothing is overwritten; choose "
                "another folder"
            )


# ---------------------------------------------------------------------------------- reading slices


class _Rows:
    """Room for slices in one file without a name, so that large sets need no memory."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.size = 0

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        start, self.size = self.size, self.size + int(np.prod(shape))
        return np.memmap(self.file, np.uint8, "r+" if start else "w+", start, shape)


def _read_samples(
    args: argparse.Namespace, rows: _Rows
) -> tuple[figures.SampleSet, np.ndarray | None]:
    """The samples, their channels in the order in which they stand in the arrays.

    Samples of a slice folder may be real slices: then also their patients, see
    :attr:`SliceSet.shared`.

    :raises ValueError: no samples, without names of their channels, or too few.
    """
    path, patients = args.samples, None
    is_folder = bf.isdir(path)
    is_slices = is_folder and not any(name.endswith(".npz") for name in bf.listdir(path))
    if is_slices and any(bf.isdir(bf.join(path, name)) for name in brats.CHANNELS):
        names = [name for name in brats.CHANNELS if bf.isdir(bf.join(path, name))]
        names = brats.parse_channels(args.channels) if args.channels else names
        found = read_slices(path, names, "all", None, rows)
        patients = found.shared
        sampled = figures.SampleSet(path, found.images, {"channels": names})
    else:
        sampled = figures.read_sample_set(path, mapped=True)
        names = brats.parse_channels(args.channels) if args.channels else sampled.channels
        if not names:
            raise ValueError(
                f"--samples {path} names no channels, so these are no slices; name the channels "
                "of the array with --channels"
            )
        if unknown := [name for name in names if name not in brats.CHANNELS]:
            raise ValueError(
                f"--samples {path}: its samples.json names a channel {unknown[0]!r}, but slices "
                f"have {', '.join(brats.CHANNELS)}; correct it, or choose with --channels"
            )
        known = sampled.channels or names
        if missing := [name for name in names if name not in known]:
            raise ValueError(
                f"--samples {path} has no channel {missing[0]}: its channels are {', '.join(known)}"
            )
        if len(known) != sampled.samples.shape[3]:
            raise ValueError(
                f"--samples {path} has {sampled.samples.shape[3]} channels, but {len(known)} are "
                f"named ({', '.join(known)})"
            )
        places = [known.index(name) for name in names]
        samples = sampled.samples
        if places != list(range(len(known))):
            samples = rows.take((*samples.shape[:3], len(places)))
            for start in range(0, len(samples), BLOCK):
                block = slice(start, start + BLOCK)
                samples[block] = sampled.samples[block][..., places]
        record = {**sampled.record, "channels": names}
        sampled = dataclasses.replace(sampled, samples=samples, record=record)
    count = len(sampled.samples)
    if args.num_samples > count:
        raise ValueError(f"--num_samples {args.num_samples}: --samples {path} holds {count}")
    if args.num_samples:
        labels = None if sampled.labels is None else sampled.labels[: args.num_samples]
        sampled = dataclasses.replace(
            sampled, samples=sampled.samples[: args.num_samples], labels=labels
        )
        patients = None if patients is None else patients[: args.num_samples]
    return sampled, patients


def _read_real(
    args: argparse.Namespace, channels: Sequence[str], size: int, rows: _Rows
) -> tuple[SliceSet, SliceSet | None]:
    """Real slices to compare with, and those of the training, where there are any."""

    def splits(folder: str) -> set[str]:
        dataset = brats.read_dataset_json(folder) if bf.isdir(folder) else None
        return {case["split"] for case in dataset["cases"] if case["slices"]} if dataset else set()

    both = splits(args.real) >= {"train", "test"}
    real = read_slices(args.real, channels, "test" if both else "all", size, rows)
    if args.train:
        split = "train" if "train" in splits(args.train) else "all"
        return real, read_slices(args.train, channels, split, size, rows)
    return real, read_slices(args.real, channels, "train", size, rows) if both else None


def read_slices(
    folder: str,
    channels: Sequence[str],
    split: str,
    size: int | None,
    rows: _Rows | None = None,
) -> SliceSet:
    """Slices of a folder, as training at ``size`` sees them, on whole levels.

    :param size: height and width, at most the stored ones; None: as stored.
    :raises ValueError: anything wrong with the folder, or slices smaller than ``size``.
    """
    dataset = brats_dataset.open_slices(channels, folder, split, image_size=size)
    if size is not None:
        with bf.BlobFile(dataset.channel_paths[0][0], "rb") as file:
            stored = figures.Image.open(file).size[0]
        if stored < size:
            raise ValueError(
                f"the slices in {folder} have {stored}x{stored} pixels, the samples {size}x{size}: "
                "compare with slices of that size or larger ones"
            )
    count = len(dataset)
    channel_count, height, width = dataset[0][0].shape
    shape = (count, height, width, channel_count)
    images = np.empty(shape, np.uint8) if rows is None else rows.take(shape)

    def read(i: int) -> np.ndarray:
        return ((dataset[i][0].numpy() + 1) * 127.5).round().astype(np.uint8)

    with ThreadPoolExecutor() as pool:
        found = pool.map(read, range(count))
        for i, levels in enumerate(
            cli.progress(found, total=count, desc=f"reading {folder}", unit="slice")
        ):
            images[i] = levels.transpose(1, 2, 0)
    names = [
        brats.split_slice_name(bf.basename(paths[0]), channels[0])
        for paths in dataset.channel_paths
    ]
    described = brats.read_dataset_json(folder) or {"cases": []}
    patient_of = {case["subject"]: case.get("patient") for case in described["cases"]}
    subjects = [name.rpartition("_slice_")[0] or name for name in names]
    patients = [patient_of.get(subject) or subject for subject in subjects]
    return SliceSet(images, names, np.array(patients))


# -------------------------------------------------------------------------------------- evaluation


def _evaluate(
    args: argparse.Namespace,
    sampled: figures.SampleSet,
    channels: list[str],
    real: SliceSet,
    train: SliceSet | None,
    whose: dict[str, np.ndarray],
    extractor: extractors.Extractor,
    folder: Path,
    rows: _Rows,
) -> validity.Flags:
    """``whose``: set -> the patients of its slices, where one has several."""
    samples = sampled.samples
    found: dict[str, Any] = {
        "version": __version__,
        "command": cli.command_line(sys.argv),
        "samples": {
            "path": args.samples,
            "count": len(samples),
            "size": list(samples.shape[1:3]),
            **({"patients": len(set(whose["samples"].tolist()))} if "samples" in whose else {}),
        },
        "made": {key: value for key, value in sampled.record.items() if key != "channels"},
        "channels": channels,
        "real": _counts(args.real, real),
        "train": _counts(args.train or args.real, train) if train else None,
    }
    sections = [("What was compared", _overview(found))]

    measured = validity.measure(samples, channels, progress=cli.progress)
    of_real = validity.measure(real.images, channels, progress=cli.progress)
    calibrated = (
        validity.measure(train.images, channels, progress=cli.progress) if train else of_real
    )
    limits = validity.calibrate(calibrated)
    flags, real_flags = validity.check(measured, limits), validity.check(of_real, limits)
    found["validity"] = {
        "limits": limits.limits,
        "samples": validity.report(measured, flags, whose.get("samples")),
        "real": validity.report(of_real, real_flags, whose.get("real")),
        "flagged": flags.reasons,
    }
    shown = min(SHOWN, len(samples), len(real))
    figures.compare_grid(
        _spread(real.images, shown), samples[:shown], channels, str(folder / "compare.png")
    )
    sections.append(("Validity", _validity_section(found["validity"], folder)))
    if flags.reasons:
        sheet = pictures.flagged_sheet(samples, channels, flags.reasons)
        figures.save_grid(sheet, str(folder / "flagged.png"))
        caption = f"The first of the {int(flags.any().sum())} samples with a flag."
        text = _shown(folder / "flagged.png", caption) + report.flagged_table(flags.reasons)
        sections[-1] = ("Validity", sections[-1][1] + text)

    sets = [len(real), len(samples), *([min(len(train), len(samples))] if train else [])]
    with _counting(distribution.passes(sets, channels), "features") as count:
        found["distribution"] = distribution.table(
            real.images,
            samples,
            channels,
            extractor,
            train=train.images if train else None,
            patients=whose,
            neighbours=args.neighbours,
            pairs=args.pairs,
            progress=count,
        )
    sections.append(("Distribution", _distribution_section(found["distribution"])))

    if train:
        found["memorisation"] = _memorisation(
            samples, channels, real, train, whose.get("samples"), extractor, folder, rows
        )
        sections.append(("Memorisation", _memorisation_section(found, folder)))
    else:
        text = "Not measured: --real has no training patients beside its test patients; name the "
        sections.append(("Memorisation", report.paragraph(text + "training slices with --train.")))
    sections.append(("Command", f"<pre>{report.html.escape(found['command'])}</pre>\n"))
    (folder / RECORD).write_text(json.dumps(found, indent=1) + "\n")
    (folder / PAGE).write_text(report.page(f"Evaluation of {args.samples}", sections))
    _print(found)
    return flags


def _counts(path: str, slices: SliceSet) -> dict[str, Any]:
    return {"path": path, "count": len(slices), "patients": len(set(slices.patients.tolist()))}


def _spread(images: np.ndarray, count: int) -> np.ndarray:
    return images[np.linspace(0, len(images) - 1, count).astype(int)]


class _counting:  # noqa: N801 (used as a function)
    """A progress display to be called with a number of items."""

    def __init__(self, total: int, desc: str) -> None:
        self.shown = cli.Progress(total, desc, "image")

    def __enter__(self) -> Callable[[int], None]:
        return self.shown.advance

    def __exit__(self, *error: object) -> None:
        self.shown.close()


def _memorisation(
    samples: np.ndarray,
    channels: Sequence[str],
    real: SliceSet,
    train: SliceSet,
    sample_patients: np.ndarray | None,
    extractor: extractors.Extractor,
    folder: Path,
    rows: _Rows,
) -> dict[str, Any]:
    small, small_samples = (
        memorisation.shrink(own, channels, out=rows.take(shape), progress=cli.progress)
        for own in (train.images, samples)
        for shape in [memorisation.shrunk_shape(own.shape)]
    )
    own = memorisation.nearest(small_samples, small, channels, progress=cli.progress)
    groups = {"sample_groups": real.patients, "train_groups": train.patients}
    others = memorisation.nearest(real.images, small, channels, **groups, progress=cli.progress)
    sets = (train.images, samples, real.images)
    with _counting(sum(map(len, sets)), "features") as count:
        features = [extractor(images, count) for images in sets]
    if extractor.scaled:
        features = distribution.scale(*features)
    of_train, of_samples, of_real = features
    neighbours = (
        memorisation.nearest_features(of_samples, of_train, progress=cli.progress),
        memorisation.nearest_features(of_real, of_train, **groups, progress=cli.progress),
    )
    found = memorisation.report(
        own,
        others,
        features=neighbours,
        held_out_groups=real.patients,
        sample_groups=sample_patients,
    )
    path = str(folder / "memorisation.png")
    pictures.similarity_figure(own, others, found, path, features=neighbours)
    if found["worst"]:
        sheet = pictures.pairs_sheet(
            samples, train.images, channels, found["worst"], names=train.names
        )
        figures.save_grid(sheet, str(folder / "nearest.png"))
    for pair in found["worst"]:
        pair["train_slice"] = train.names[pair["train_index"]]
    return found


def _filter(
    args: argparse.Namespace,
    sampled: figures.SampleSet,
    channels: Sequence[str],
    flags: validity.Flags,
) -> None:
    """Write the samples without a flag as a sample folder."""
    kept = np.flatnonzero(~flags.any())
    if not len(kept):
        raise ValueError(f"--filter_to {args.filter_to}: every sample has a flag, none is left")
    record = {**sampled.record, "filtered_from": args.samples, "kept": kept.tolist()}
    for name in ("channels", "shape", "classes", "seconds_per_sample"):
        record.pop(name, None)
    classes = sampled.record.get("classes", [])
    write_sample_folder(
        args.filter_to,
        channels,
        lambda indices: sampled.samples[kept[indices.start : indices.stop]],
        record,
        num_samples=len(kept),
        batch_size=BLOCK,
        shape=sampled.samples.shape[1:],
        settings={"--samples": args.samples, "kept": kept.tolist()},
        labels=None if sampled.labels is None else sampled.labels[kept],
        classes=classes,
    )


# ------------------------------------------------------------------------------------------ report


def _shown(path: Path, caption: str) -> str:
    return report.picture(path.read_bytes(), caption)


def _overview(found: dict[str, Any]) -> str:
    size = " x ".join(map(str, found["samples"]["size"]))
    rows = [
        *(
            (name, str(own["count"]), str(own.get("patients", "")), own["path"])
            for name, own in (
                ("samples", found["samples"]),
                ("real slices compared with", found["real"]),
                ("training slices", found["train"]),
            )
            if own
        ),
    ]
    made = found["made"]
    text = (
        f"Channels {', '.join(found['channels'])}, {size} pixels. Larger real slices are resized "
    )
    text += "as in training. "
    if made.get("checkpoint"):
        text += f"Drawn from {made['checkpoint']}, step {made.get('step')}. "
    text += (
        "Brackets hold 95 % intervals; coloured rows differ by more than these. Slices of one "
        "patient are alike: where a set holds several of one, its intervals cover the chance in "
        "its patients, otherwise in its images as if each were drawn alone. No interval covers the "
        "chance in the training."
    )
    text += _few_patients(found)
    header = ("set", "slices", "patients", "path")
    return report.paragraph(text) + report.table(header, [(row, False) for row in rows])


def _few_patients(found: dict[str, Any]) -> str:
    """What to think of intervals over a handful of patients; nothing where there are more."""
    few = [
        f"The {name} are of {own['patients']} patient{'s' if own['patients'] > 1 else ''} only"
        for name, own in (("real slices", found["real"]), ("samples", found["samples"]))
        if own.get("patients", own["count"]) < min(intervals.FEWEST_PATIENTS, own["count"])
    ]
    if not few:
        return ""
    return (
        f" {'; '.join(few)}: fewer than {intervals.FEWEST_PATIENTS} tell hardly anything of others."
        " Their intervals of shares and means are therefore Student's, or as wide as if all slices "
        "of a patient were equal, or, of one patient, all that is possible; where none is given, "
        "nothing is known. That of the share of near samples in the part on memorisation is too "
        "narrow."
    )


def _validity_section(found: dict[str, Any], folder: Path) -> str:
    text = (
        "Measured on raw levels. A flag means that no real slice resembles the sample in this "
        "measure: the limits lie beyond those of the real slices. Measures of background, "
        "agreement and tumour leave out channels that are all noise or constant. "
    )
    if "patients" in found["real"]:
        text += (
            f"Intervals of the real slices are over their {found['real']['patients']} patients; of "
            "a flag that none or all of the slices have as if all slices of a patient were equal. "
        )
    text += (
        "A flag that no real slice has is coloured also where the samples' interval lies above "
        f"{100 * (1 - validity.REAL_PASS):.0f} %, the most that the limits leave out of the slices "
        "that they are set on."
    )
    rows = report.validity_rows(found["samples"], found["real"])
    return (
        report.paragraph(text, note=True)
        + report.table(("measure", "samples", "real"), rows)
        + _shown(folder / "compare.png", "Real slices, and the first samples.")
    )


def _distribution_section(found: dict[str, Any]) -> str:
    extractor, counts = found["extractor"], found["counts"]
    text = f"Features: {extractor['name']}"
    if extractor["sha256"]:
        text += f", SHA-256 {extractor['sha256']}"
    sizes = ", ".join(f"{count} {name}" for name, count in counts.items())
    text += (
        f". Images: {sizes}. The floor is what real training slices measure against the same real "
        "slices: a perfect model comes down to it, and one that copies may come below. In the row "
        "of MS-SSIM the last column is that of the real slices. What the intervals cover: "
    )
    text += "; ".join(
        f"{report.DISTANCES[key]}, {words}" for key, words in found["intervals"].items()
    )
    if found["patients"]:
        patients = " and ".join(f"{count} in {name}" for name, count in found["patients"].items())
        text += f". The chance in slices that share patients is that in the patients: {patients}."
    else:
        text += "."
    header = ("channel", "measure", "samples", "floor")
    return report.paragraph(text, note=True) + report.table(header, report.distribution_rows(found))


def _memorisation_section(everything: dict[str, Any], folder: Path) -> str:
    found, patients = everything["memorisation"], everything["real"]["patients"]
    text = (
        "Each sample's nearest training slice, by correlation at 64 x 64 pixels (flips included) "
        "and by distance of features; the same for held-out real slices, without their own "
        "patient. A model that does not memorise has about the expected share of samples nearer "
        "than 99 % of the held-out slices. The interval covers the chance in the "
        f"{patients} held-out patients, which set the threshold, and in the samples."
    )
    header = ("by", "share nearer", "expected", "threshold", "samples / held-out slices")
    shown = _shown(folder / "memorisation.png", "How near the sets come to the training slices.")
    if found["worst"]:
        shown += _shown(folder / "nearest.png", "The samples nearest to a training slice.")
    rows = report.memorisation_rows(found)
    return report.paragraph(text, note=True) + report.table(header, rows) + shown


def _print(found: dict[str, Any]) -> None:
    """The report's tables in short, for the terminal."""
    rows = report.validity_rows(found["validity"]["samples"], found["validity"]["real"])
    together = list(found["distribution"]["channels"])[-1]
    rows += [
        ((f"{name}: {channel}", own, floor), marked)
        for (channel, name, own, floor), marked in report.distribution_rows(found["distribution"])
        if channel == together
    ]
    if "memorisation" in found:
        rows += [
            ((f"nearer to training slices, by {what}", share, expected), marked)
            for (what, share, expected, *_), marked in report.memorisation_rows(
                found["memorisation"]
            )
        ]
    width = max(len(row[0]) for row, _ in rows)
    print(f"{'':<{width}}  {'samples':<28}  real or floor")
    for (what, own, other), marked in rows:
        print(f"{what:<{width}}  {own:<28}  {other}{'   *' if marked else ''}")
    if few := _few_patients(found):
        print(few.strip())
