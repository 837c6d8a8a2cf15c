"""What ``segmentation_eval.py`` does with its flags.

The folder that it writes::

    segmentation.json    all numbers: settings, versions, Dice per arm, seed, patient and region,
                         means, comparisons
    segmentation.csv     arm, seed, patient, region, dice: a row for each number
    dice.png             the patients' scores, by region and arm
    examples.png         test slices with the true outlines and each arm's
    runs/                the result of every training, by which an interrupted start is continued
    settings.json        what they were begun with
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import blobfile as bf
import numpy as np

import brats_dataset
from improved_diffusion import brats, cli, dist_util, plots
from improved_diffusion.evaluation import nnunet, segmentation
from improved_diffusion.evaluation.segmentation import Data, Slices
from improved_diffusion.files import atomic_write
from improved_diffusion.script_util import add_dict_to_argparser
from improved_diffusion.seeds import check_seed
from improved_diffusion.segmentation_report import REFERENCE, choose_examples, write_results

SETTINGS, RUNS = "settings.json", "runs"

# Flag: default and explanation.
FLAGS: dict[str, tuple[Any, str]] = {
    "real": (
        "",
        "slice folder with dataset.json: its training patients train, its test patients score",
    ),
    "samples": (
        "",
        "synthetic slices with masks: a sample folder; of a slice folder with dataset.json, the "
        "training patients",
    ),
    "num_samples": (0, "synthetic slices to use, the first ones; 0: all"),
    "channels": (
        "",
        "image channels that the segmenter sees, e.g. FLAIR,T1CE (empty: all that both folders "
        "have)",
    ),
    "image_size": (0, "height and width to resize to, 32 or more; 0: as stored"),
    "arms": (
        ",".join(segmentation.ARMS),
        "what to train on; real-20%replaced: with the slices of so many patients replaced, any "
        "share from 1% to 99%",
    ),
    "seeds": (3, "trainings of each arm, with other weights and orders; 0: none, only an export"),
    "seed": (0, "the first of the seeds"),
    "steps": (5000, "optimizer steps of a training, the same for each arm"),
    "batch_size": (16, "slices in a step"),
    "lr": (5e-3, "learning rate at the start, from which it falls to 0"),
    "out_dir": ("Segmentation", "folder of the results; the same command continues it"),
    "nnunet_dir": (
        "",
        "write the sets as raw data sets of nnU-Net into this folder, its nnUNet_raw",
    ),
    "nnunet_id": (nnunet.FIRST_ID, "number of the first of these data sets"),
}


def evaluate(description: str) -> None:
    """Read the command line, train and score every arm, and write what came out."""
    args = create_argparser(description).parse_args()
    arms = segmentation.parse_arms(args.arms)
    check_flags(args, arms)
    if args.seeds:
        segmentation.check_installed()
        plots.new_figure()  # tells at once if matplotlib is missing
    dist_util.setup_dist()
    data = read_data(args)
    trainings = {
        (arm, seed): segmentation.training_slices(
            arm, data.real.patients, len(data.synthetic), seed
        )
        for seed, arm in itertools.product(range(args.seed, args.seed + args.seeds), arms)
    }
    settings = settings_of(args, data)
    if trainings:
        begin(args.out_dir, settings)
    if args.nnunet_dir:
        export(args, data)
    if not trainings:
        return
    with cli.stop_at_signals():
        try:
            train_missing(args, data, trainings)
            write_results(args.out_dir, settings, data, list(read_runs(args, trainings).values()))
        except cli.Stopped as stop:
            print(
                f"{stop}: {len(read_runs(args, trainings))} of {len(trainings)} trainings are kept "
                f"in {args.out_dir}; continue with: {cli.command_line(sys.argv)}",
                flush=True,
            )


def create_argparser(description: str) -> argparse.ArgumentParser:
    """The parser of :data:`FLAGS`."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    defaults = {name: default for name, (default, _) in FLAGS.items()}
    add_dict_to_argparser(parser, defaults, {name: text for name, (_, text) in FLAGS.items()})
    return parser


def check_flags(args: argparse.Namespace, arms: Sequence[str]) -> None:
    """Refuse what makes no sense, before anything is read.

    :raises ValueError: naming the flag.
    """
    check_seed(args.seed)
    at_least = {"steps": 1, "batch_size": 1, "seeds": 0, "num_samples": 0, "image_size": 0}
    for name, least in at_least.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: give {least} or more")
    if not args.lr > 0:
        raise ValueError(f"--lr {args.lr}: give a number above 0")
    if not args.seeds and not args.nnunet_dir:
        raise ValueError("--seeds 0: there is nothing to do; give 1 or more, or --nnunet_dir")
    if not args.real:
        raise ValueError(
            "--real is missing; name a slice folder that scripts/brats_prepare.py made"
        )
    needing = [arm for arm in arms if arm != REFERENCE]
    if args.seeds and needing and not args.samples:
        raise ValueError(
            f"--samples is missing, which the arm {needing[0]} needs; name a folder that "
            f"scripts/image_sample.py made, or give --arms {REFERENCE}"
        )


def export(args: argparse.Namespace, data: Data) -> None:
    """Write nnU-Net's data sets and print where."""
    folders = nnunet.export(
        args.nnunet_dir,
        data.channels,
        data.real,
        data.test,
        data.synthetic if args.samples else None,
        first_id=args.nnunet_id,
        seed=args.seed,
        progress=cli.progress,
    )
    for folder in folders:
        print(f"nnU-Net data set: {folder}", flush=True)


# ---------------------------------------------------------------------------------- reading slices


def read_data(args: argparse.Namespace) -> Data:
    """Read all slices that the flags name.

    :raises ValueError: a folder or flag that does not fit, or a set that shows no tumour.
    """
    patient_of = read_split(args.real)
    folders = {"--real": args.real}
    if args.samples:
        if not bf.isdir(args.samples):
            raise ValueError(f"--samples {args.samples}: there is no such folder")
        folders["--samples"] = args.samples
    channels = choose_channels(args.channels, folders)
    read = brats.parse_channels(",".join([*channels, brats.MASK_CHANNEL]))

    def open_split(folder: str, split: str) -> brats_dataset.load_channels_from_dir:
        return brats_dataset.open_slices(read, folder, split, image_size=args.image_size or None)

    train, test = (open_split(args.real, split) for split in ("train", "test"))
    drawn = [open_split(args.samples, "train")] if args.samples else []
    check_sizes(args, [own[0][0].shape[-1] for own in (train, *drawn)])
    most = len(drawn[0]) if drawn else 0
    if args.num_samples > most:
        raise ValueError(f"--num_samples {args.num_samples}: --samples holds {most} slices")
    pool = read_slices(
        [
            (train, len(train), patient_of),
            *((own, args.num_samples or most, {}) for own in drawn),
        ]
    )
    real, synthetic = pool.part(0, len(train)), pool.part(len(train), len(pool))
    data = Data(channels, pool, real, synthetic, read_slices([(test, len(test), patient_of)]))
    sets = {
        "the training patients of --real": data.real,
        "--samples": data.synthetic,
        "the test patients of --real": data.test,
    }
    for what, own in sets.items():
        if len(own) and not own.classes.any():
            raise ValueError(
                f"none of the {len(own)} slices of {what} shows a tumour, so no segmenter can be "
                "trained or scored on them; name other slices"
            )
    return data


def read_split(folder: str) -> dict[str, str]:
    """Subject -> patient of a slice folder, both as its ``dataset.json`` names them.

    :raises ValueError: no such folder, no ``dataset.json``, or a split without slices.
    """
    if not bf.isdir(folder):
        raise ValueError(f"--real {folder}: there is no such folder")
    dataset = brats.read_dataset_json(folder)
    if dataset is None:
        raise ValueError(
            f"--real {folder} has no {brats.DATASET_FILE}, which tells training from test "
            "patients; prepare the slices with scripts/brats_prepare.py"
        )
    for split in ("train", "test"):
        if not any(case["split"] == split and case["slices"] for case in dataset["cases"]):
            raise ValueError(
                f"--real {folder} has no slice of the split {split!r}; prepare the slices with "
                "another number of --test_patients"
            )
    return {case["subject"]: case.get("patient", case["subject"]) for case in dataset["cases"]}


def choose_channels(text: str, folders: dict[str, str]) -> list[str]:
    """The image channels that ``--channels`` names, or all that every folder has.

    The mask, which is what is predicted, may be named or not.

    :param folders: flag -> folder.
    :raises ValueError: an unknown channel, or no image among them.
    """
    found = [
        name
        for name in brats.CHANNELS
        if all(bf.isdir(bf.join(folder, name)) for folder in folders.values())
    ]
    names = brats.parse_channels(text) if text else found
    images = [name for name in names if name != brats.MASK_CHANNEL]
    if images:
        return images
    if text:
        raise ValueError(f"--channels {text}: name an image channel, which the segmenter sees")
    where = " and ".join(f"{flag} {folder}" for flag, folder in folders.items())
    raise ValueError(
        f"no image channel in {where}: expected the same one of the folders "
        f"{', '.join(name for name in brats.CHANNELS if name != brats.MASK_CHANNEL)} in each"
    )


def check_sizes(args: argparse.Namespace, sizes: Sequence[int]) -> None:
    """Refuse sizes that differ between the sets, or that the network does not take.

    :param sizes: of the real and, if there are any, of the synthetic slices.
    """
    if len(set(sizes)) > 1:
        raise ValueError(
            f"--real {args.real} has slices of {sizes[0]}x{sizes[0]} pixels, but --samples "
            f"{args.samples} of {sizes[1]}x{sizes[1]}; give one size for both with --image_size"
        )
    if sizes[0] < segmentation.LEAST_SIZE:
        raise ValueError(
            f"slices of {sizes[0]}x{sizes[0]} pixels: the segmenter needs "
            f"{segmentation.LEAST_SIZE} or more; give a size with --image_size"
        )


def read_slices(
    sets: Sequence[tuple[brats_dataset.load_channels_from_dir, int, dict[str, str]]],
) -> Slices:
    """Read slices into memory, one set after the other.

    Images are rounded to whole levels, masks to label codes.

    :param sets: data sets of the same channels, the mask among them; how many of the first slices
        to read of each; and its subjects' patients. Without one a slice is its own patient.
    """
    items = [(dataset, i, patient_of) for dataset, count, patient_of in sets for i in range(count)]
    first = sets[0][0]
    channels = [bf.basename(bf.dirname(path)) for path in first.channel_paths[0]]
    mask = channels.index(brats.MASK_CHANNEL)
    count, height, width = first[0][0].shape
    images = np.empty((len(items), count - 1, height, width), np.uint8)
    classes = np.empty((len(items), height, width), np.uint8)

    def read(item: tuple[brats_dataset.load_channels_from_dir, int, dict[str, str]]) -> np.ndarray:
        dataset, i, _ = item
        return ((dataset[i][0].numpy() + 1) * 127.5).round().astype(np.uint8)

    with ThreadPoolExecutor() as pool:
        found = cli.progress(pool.map(read, items), total=len(items), desc="reading", unit="slice")
        for i, levels in enumerate(found):
            images[i] = np.delete(levels, mask, axis=0)
            classes[i] = np.searchsorted(brats.MASK_CODES, brats.snap_mask(levels[mask]))
    names, patients = [], []
    for dataset, i, patient_of in items:
        name = brats.split_slice_name(bf.basename(dataset.channel_paths[i][0]), channels[0])
        names.append(name)
        patients.append(patient_of.get(name.rpartition("_slice_")[0], name))
    return Slices(images, classes, names, patients)


# --------------------------------------------------------------------------------------- trainings


def settings_of(args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """What determines a training beside its arm and seed, each under the user's name for it."""
    return {
        "--channels": ",".join(data.channels),
        "--image_size": data.test.classes.shape[1],
        "--steps": args.steps,
        "--batch_size": args.batch_size,
        "--lr": args.lr,
        "device": dist_util.dev().type,
        "training slices of --real with the SHA-256": data.real.digest(),
        "test slices of --real with the SHA-256": data.test.digest(),
        "--samples with the SHA-256": data.synthetic.digest() if args.samples else None,
    }


def begin(out_dir: str, settings: dict[str, Any]) -> None:
    """Make the folder, or see that its trainings were begun with the same settings.

    :raises ValueError: they were not, or the folder holds something else.
    """
    path = bf.join(out_dir, SETTINGS)
    known = _read_json(path)
    if known is None:
        if bf.exists(out_dir) and (not bf.isdir(out_dir) or list(bf.listdir(out_dir))):
            raise ValueError(
                f"--out_dir {out_dir} already holds something else, and nothing is overwritten; "
                "choose another folder"
            )
        _write_json(path, settings)
        return
    for name, value in settings.items():
        if known.get(name) != value:
            raise ValueError(
                f"the trainings in {out_dir} were begun with {name} {known.get(name)}, not "
                f"{value}; give the same flags to continue them, or choose another --out_dir"
            )


# The arm and the seed of a training, and what it trains on, see segmentation.training_slices.
Trainings = dict[tuple[str, int], tuple[np.ndarray, list[str]]]


def read_runs(args: argparse.Namespace, trainings: Trainings) -> dict[tuple[str, int], Any]:
    """The results of the trainings that are complete, in their order."""
    found = {own: _read_json(_run_path(args.out_dir, *own)) for own in trainings}
    return {own: run for own, run in found.items() if run is not None}


def train_missing(args: argparse.Namespace, data: Data, trainings: Trainings) -> None:
    """Train what is not complete, and keep each result as soon as it is there."""
    done = read_runs(args, trainings)
    if done:
        print(f"continuing: {len(done)} of {len(trainings)} trainings are there", flush=True)
    for number, ((arm, seed), (picks, replaced)) in enumerate(trainings.items(), 1):
        if (arm, seed) in done:
            continue
        title = f"{arm}, seed {seed} ({number} of {len(trainings)})"
        found = train_and_score(args, data, seed, picks, title)
        run = {"arm": arm, "seed": seed, "replaced_patients": replaced, **found}
        _write_json(_run_path(args.out_dir, arm, seed), run)


def train_and_score(
    args: argparse.Namespace, data: Data, seed: int, picks: np.ndarray, title: str
) -> dict[str, Any]:
    """Train once on the slices ``picks`` of the pool and score the test patients.

    :param title: of the progress bar.
    :returns: what a file in ``runs`` holds of it.
    """
    device = dist_util.dev()
    network = segmentation.build_network(len(data.channels), seed)
    start = time.monotonic()
    shown = cli.Progress(args.steps, title, "step")
    try:
        loss = segmentation.train(
            network,
            data.pool,
            picks,
            steps=args.steps,
            batch_size=args.batch_size,
            lr=args.lr,
            seed=seed,
            device=device,
            on_step=shown.advance,
        )
    finally:
        shown.close()
    seconds = time.monotonic() - start
    predicted = segmentation.predict(
        network, data.test.images, batch_size=args.batch_size, device=device
    )
    return {
        "slices": len(picks),
        "loss": round(loss, 6),
        "seconds": round(seconds, 1),
        "dice": segmentation.dice_per_patient(predicted, data.test.classes, data.test.patients),
        # A digit for each pixel.
        "examples": ["".join(map(str, predicted[i].ravel())) for i in choose_examples(data.test)],
    }


def _run_path(out_dir: str, arm: str, seed: int) -> str:
    return bf.join(out_dir, RUNS, f"{arm}_seed{seed}.json")


def _read_json(path: str) -> Any:
    """What a JSON file holds; None where there is none."""
    if not bf.exists(path):
        return None
    try:
        with bf.BlobFile(path, "r") as file:
            return json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it") from error


def _write_json(path: str, value: object) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())
