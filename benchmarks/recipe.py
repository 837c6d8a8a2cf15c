"""Which training gives valid image-and-mask pairs soonest: one arm for each thing to compare.

Every arm trains the same small network on the same slices in the same order, for the same number of
images, and draws the same noise with the same sampler; it differs by the flags that ARMS names. Its
samples are measured from raw values, see :mod:`improved_diffusion.evaluation`: channels that are
noise only, constant or saturated; the background; mask pixels off the label codes before they are
set to them; tumour outside the brain; each label's share of the slice; agreement of the image
channels; kernel distance of file-free features to test patients, whose floor is that of as many
training slices. Writes recipe.json and recipe.png, a picture of each arm's first samples, and
prints a table. What is there already is not made again, and an interrupted training is continued.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from improved_diffusion import brats, cli, dist_util, execution, figures, sampling
from improved_diffusion.evaluation import distribution, validity
from improved_diffusion.sampling_script import parse_clip
from improved_diffusion.script_util import load_model_and_diffusion
from improved_diffusion.training_data import find_training_data

ROOT = Path(__file__).resolve().parent.parent
EMA = "ema_0.9999"
BROKEN = ("noise_only", "constant", "saturated")  # flags of a channel that shows nothing
LABELS = dict(zip(("core", "oedema", "enhancing"), brats.MASK_CODES[1:]))
SHOWN = 6  # samples of each arm in the picture
NETWORK = (
    "--image_size 64 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1,2,4 "
    "--attention_resolutions 8 --num_heads 1"
)
TRAINING = (
    "--batch_size 8 --lr 1e-3 --warmup_steps 50 --grad_clip 0 --log_interval 25 --num_workers 0 "
    "--sample_interval 0 --eval_interval 0 --precision fp32 --compile off"
)


@dataclass(frozen=True)
class Arm:
    """What an arm adds to the flags of all.

    :param flags: of ``image_train.py``.
    :param average: the averaged model that is sampled from, as its file's name begins.
    :param sampling: ``sampler:steps:clip_denoised``, each of which may be empty: the default
        sampler, its steps, and True, so that every predicted image is limited to [-1, 1].
    :param trained_as: the arm whose training this one samples from; empty: its own.
    """

    flags: str = ""
    average: str = EMA
    sampling: str = ""
    trained_as: str = ""


VELOCITY = "--predict_v True --learn_sigma False --sigma_small True"
# The report's process. Its learning rate of 1e-4 and its average without a warm-up are left out:
# with them nothing at all is learned for so few images.
REPORT = (
    "--learn_sigma True --noise_schedule linear --rescale_learned_sigmas False "
    "--rescale_timesteps False --use_scale_shift_norm False"
)
COSINE = f"{VELOCITY} --noise_schedule cosine"
ARMS = {
    "report": Arm(REPORT),
    "report, 250 steps": Arm(sampling="ancestral:250", trained_as="report"),
    "noise": Arm("--learn_sigma False --sigma_small True"),
    "velocity": Arm(VELOCITY),
    # One thing more than velocity each.
    "annealed": Arm(f"{VELOCITY} --lr_anneal_steps {{steps}}"),
    "self-conditioned": Arm(f"{VELOCITY} --self_condition True"),
    "one-hot": Arm(f"{VELOCITY} --mask_encoding onehot"),
    "bits": Arm(f"{VELOCITY} --mask_encoding bits"),
    "cosine": Arm(COSINE),
    # One thing more than cosine each.
    "cosine, auto clip": Arm(sampling="::auto", trained_as="cosine"),
    "cosine, min-SNR": Arm(f"{COSINE} --loss_weighting min_snr"),
    "cosine, debiased": Arm(f"{COSINE} --loss_weighting debiased"),
    "cosine, sigmoid": Arm(f"{COSINE} --loss_weighting sigmoid"),
    "cosine, zero terminal": Arm(f"{COSINE} --zero_terminal_snr True"),
    "cosine, less noise": Arm(f"{COSINE} --snr_shift 4"),
    "cosine, more noise": Arm(f"{COSINE} --snr_shift 0.25"),
    "cosine, augmented": Arm(f"{COSINE} --augment 0.5"),
    "cosine, self-conditioned": Arm(f"{COSINE} --self_condition True"),
    "cosine, one-hot": Arm(f"{COSINE} --mask_encoding onehot"),
    "cosine, bits": Arm(f"{COSINE} --mask_encoding bits"),
    "cosine, distances": Arm(f"{COSINE} --mask_encoding sdf"),
    # The image and a learned variance: the bound trains the last layer alone, or everything.
    "image, learned variance": Arm("--predict_xstart True --learn_sigma True"),
    "image, full gradient": Arm("--predict_xstart True --learn_sigma True --sigma_gradient full"),
    # What --preset brats sets, sampled as image_sample.py does.
    "brats": Arm("--preset brats", sampling="::auto"),
    "brats, grey masks": Arm("--preset brats --mask_encoding grey", sampling="::auto"),
    "brats, min-SNR": Arm("--preset brats --loss_weighting min_snr", sampling="::auto"),
    # For long trainings: a rate that falls to 0, and an average over a good part of the training
    # (Karras et al. 2024).
    "brats, long": Arm(
        "--preset brats --lr_anneal_steps {steps} --ema_sigma_rel 0.2", "ema_p0.2", "::auto"
    ),
    # For images larger than 64 x 64.
    "brats, shifted": Arm("--preset brats --snr_shift auto", sampling="::auto"),
}


def main() -> None:
    args = create_argparser().parse_args()
    if args.draw:
        draw(args.draw, args.out_dir, args.samples, args.seed, args.sampling)
        return
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(ARMS) if args.arms == "all" else args.arms.split(";")
    for name in names:
        if name not in ARMS:
            raise ValueError(f"--arms {name}: choose from {'; '.join(ARMS)}")
    study = Study(args, folder)
    study.run(names)
    rows = study.measure(names)
    (folder / "recipe.json").write_text(json.dumps(rows, indent=1) + "\n")
    print_table(rows)


class Study:
    """The trainings and samples below a folder.

    A set of samples lies in ``<arm>/seed<seed>/samples<images>.npz``: ``levels`` uint8
    [N, H, W, C], and ``off_code`` [N], NaN for signed distances, which have no codes.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.flags = f"{NETWORK} {TRAINING} {args.flags}"
        self.batch = _value_of("--batch_size", self.flags)
        self.steps = [round(args.images * part / self.batch) for part in args.at]
        self.size = _value_of("--image_size", self.flags)
        self.channels = brats.parse_channels(args.channels)
        self.seeds = range(args.seed, args.seed + args.seeds)

    def run(self, names: list[str]) -> None:
        """Train and sample what is missing, several arms side by side on a thread each."""
        # Made before the arms read it.
        data = find_training_data(
            self.args.data_dir, channels=self.channels, in_channels=None, split=self.args.split
        )
        data.batches(self.batch, self.size, seed=0, pack_dir=str(self.folder / "pack"))
        jobs = [(name, seed) for seed in self.seeds for name in names]
        trained = [job for job in jobs if not ARMS[job[0]].trained_as]
        others = [job for job in jobs if ARMS[job[0]].trained_as]
        with ThreadPoolExecutor(self.args.workers) as pool:
            for stage in (trained, others):
                list(pool.map(lambda job: self._run_arm(*job), stage))

    def _run_arm(self, name: str, seed: int) -> None:
        arm = ARMS[name]
        own = self._folder(name, seed)
        own.mkdir(parents=True, exist_ok=True)
        run = self._folder(arm.trained_as or name, seed) / "run"
        if not arm.trained_as and not (run / f"{EMA}_{self.steps[-1]:06d}.pt").exists():
            flags = f"{self.flags} {arm.flags.format(steps=self.steps[-1])}"
            command = [sys.executable, str(ROOT / "scripts/image_train.py"), *flags.split()]
            command += ["--data_dir", self.args.data_dir, "--channels", ",".join(self.channels)]
            command += ["--split", self.args.split]
            command += ["--pack_dir", str(self.folder / "pack"), "--seed", str(seed)]
            command += ["--max_steps", str(self.steps[-1]), "--save_interval", str(self.steps[0])]
            command += ["--out_dir", str(run), "--resume_checkpoint", "latest"]
            self._call(command, own / "train.txt")
        for steps in self.steps:
            target = own / f"samples{steps * self.batch}.npz"
            if not target.exists():
                command = [sys.executable, "-m", "benchmarks.recipe", "--out_dir", str(target)]
                command += ["--draw", str(run / f"{arm.average}_{steps:06d}.pt")]
                command += ["--samples", str(self.args.samples), "--sampling", arm.sampling]
                self._call([*command, "--seed", str(seed)], own / "sample.txt")
        print(f"{name}, seed {seed}: done", flush=True)

    def _call(self, command: list[str], log: Path) -> None:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        with open(log, "a") as file:
            result = subprocess.run(command, stdout=file, stderr=file, env=environment)
        if result.returncode:
            raise ValueError(f"{shlex.join(command)} failed; {log} tells why")

    def _folder(self, name: str, seed: int) -> Path:
        return self.folder / name.replace(", ", "_").replace(" ", "_") / f"seed{seed}"

    def _slices(self, split: str) -> np.ndarray:
        """The slices of a split at the trained size: uint8 [N, H, W, C]."""
        dataset = find_training_data(
            self.args.data_dir, channels=self.channels, in_channels=None, split=split
        ).dataset(self.size)
        images = np.stack([dataset[i][0].numpy() for i in range(len(dataset))])
        return ((images + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)

    def measure(self, names: list[str]) -> list[dict[str, Any]]:
        """A row for the floor, then one for each arm, number of images seen, and seed."""
        train, test = self._slices("train"), self._slices("test")
        limits = validity.calibrate(validity.measure(train, self.channels))
        test_features = distribution.features(test)
        chosen = np.random.default_rng(0).permutation(len(train))[: self.args.samples]
        rows = [
            {
                "arm": "real test slices",
                **measures(test, np.zeros(len(test)), self.channels, limits),
                "distance": _distance(train[chosen], test_features),
            }
        ]
        first = []
        for name in names:
            for steps in self.steps:
                for seed in self.seeds:
                    images = steps * self.batch
                    with np.load(self._folder(name, seed) / f"samples{images}.npz") as arrays:
                        levels, off_code = arrays["levels"], arrays["off_code"]
                    found = measures(levels, off_code, self.channels, limits)
                    distance = _distance(levels, test_features)
                    about = {"arm": name, "images": images, "seed": seed}
                    rows.append({**about, **found, "distance": distance})
            first.append(levels)
        shown = min(SHOWN, len(test), *map(len, first))
        spread = test[np.linspace(0, len(test) - 1, shown).astype(int)]
        sets = [spread, *(levels[:shown] for levels in first)]
        picture = figures.beside_grid(sets, ["real", *names], self.channels)
        figures.save_grid(picture, str(self.folder / "recipe.png"))
        return rows


def draw(model_path: str, target: str, num_samples: int, seed: int, how: str) -> None:
    """Draw samples and write their levels, and which share of each mask is off the codes."""
    loaded = load_model_and_diffusion(model_path)
    sampler, steps, clip = [*how.split(":"), "", ""][:3]
    clip_denoised = parse_clip(clip or "True")
    plan = sampling.choose_plan(
        loaded.diffusion, sampler=sampler or sampling.AUTO, steps=int(steps or 0)
    )
    size = loaded.flags["image_size"]
    device = dist_util.dev()
    network = execution.for_sampling(loaded.model, torch.float32, "off", device, evaluations=0)
    parts, off_code = [], []
    for indices in sampling.batches(num_samples, 20 if device.type == "cpu" else 100):
        samples = sampling.draw(
            network,
            loaded.diffusion,
            indices,
            (loaded.encoding.width, size, size),
            seed=seed,
            device=device,
            sampler=plan.sampler,
            timesteps=plan.timesteps,
            clip_denoised=clip_denoised,
        )
        parts.append(sampling.to_levels(loaded.encoding.decode(samples)))
        shares = loaded.encoding.off_code(samples)
        off_code.append(np.full(len(samples), np.nan) if shares is None else shares.cpu().numpy())
    partial = f"{target}.partial.npz"
    np.savez(partial, levels=np.concatenate(parts), off_code=np.concatenate(off_code))
    os.replace(partial, target)


def _distance(levels: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    return distribution.kernel_distance(
        *distribution.scale(reference, distribution.features(levels))
    )


def measures(
    levels: np.ndarray, off_code: np.ndarray, channels: list[str], limits: validity.Thresholds
) -> dict[str, Any]:
    """What a row of the table holds: shares and means with their intervals."""
    measured = validity.measure(levels, channels)
    flags = validity.check(measured, limits)
    found = validity.report(measured, flags)
    mask = brats.MASK_CHANNEL
    images = [name for name in channels if name != mask]
    background = np.stack(list(measured.values["background_level"].values()))

    def broken(own: Iterable[str]) -> dict[str, float]:
        kinds = [flags.flagged[kind] for kind in BROKEN]
        found = [kind[name] for kind in kinds for name in own if name in kind]
        return validity.share_interval(np.any(found, axis=0))

    snapped = brats.snap_mask(levels[..., channels.index(mask)])
    row = {
        "broken_image": broken(images),
        "broken_mask": broken([mask]),
        "black": validity.share_interval((background <= validity.BACKGROUND_LEVEL).all(axis=0)),
        "background": validity.mean_interval(background.max(axis=0)),
        **({} if np.isnan(off_code).any() else {"off_code": validity.mean_interval(off_code)}),
        "valid": found["valid_share"],
        "drawn_noise": validity.share_interval(looks_like_noise(levels, channels, limits)),
        "snapped_noise": validity.share_interval(noise_with(snapped, levels, channels, limits)),
    }
    for name in ("mask_outside_brain", "channel_agreement", "empty_mask_share", "tumour_area"):
        if name in found:
            row[name] = found[name]
    if "label_shares" in found:
        row.update({name: found["label_shares"][str(code)] for name, code in LABELS.items()})
    return row


def looks_like_noise(
    levels: np.ndarray, channels: list[str], limits: validity.Thresholds
) -> np.ndarray:
    """Whether a mask looks like noise when drawn as the report drew it: bool [N].

    There every panel was stretched from its own darkest to its brightest level.
    """
    panels = levels[..., channels.index(brats.MASK_CHANNEL)].astype(np.float64)
    low, high = (f(panels, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    stretched = ((panels - low) / np.maximum(high - low, 1) * 255).round()
    return noise_with(stretched, levels, channels, limits)


def noise_with(
    masks: np.ndarray, levels: np.ndarray, channels: list[str], limits: validity.Thresholds
) -> np.ndarray:
    """Whether the mask is noise, bool [N], when these take the place of the samples' masks."""
    samples = levels.copy()
    samples[..., channels.index(brats.MASK_CHANNEL)] = masks
    flags = validity.check(validity.measure(samples, channels), limits)
    return flags.flagged["noise_only"][brats.MASK_CHANNEL]


# Name of a row's entry: heading, and the factor for the table.
COLUMNS = {
    "valid": ("without a flag, %", 100),
    "broken_image": ("broken image, %", 100),
    "broken_mask": ("broken mask, %", 100),
    "drawn_noise": ("mask drawn as noise, %", 100),
    "snapped_noise": ("noise when snapped, %", 100),
    "black": ("background 0 to 1, %", 100),
    "background": ("background level", 1),
    "off_code": ("off the codes, %", 100),
    "mask_outside_brain": ("outside the brain, %", 100),
    "channel_agreement": ("agreement", 1),
    "empty_mask_share": ("empty masks, %", 100),
    "core": ("necrotic core, %", 100),
    "oedema": ("oedema, %", 100),
    "enhancing": ("enhancing tumour, %", 100),
    "distance": ("distance", 1),
}


def print_table(rows: list[dict[str, Any]]) -> None:
    shown = {name: own for name, own in COLUMNS.items() if any(name in row for row in rows)}
    print("| arm | images | seed | " + " | ".join(text for text, _ in shown.values()) + " |")
    print("|" + "---|" * (3 + len(shown)))
    for row in rows:
        cells = []
        for name, (_, factor) in shown.items():
            value, low, high = (
                (factor * row[name][key] for key in ("value", "low", "high"))
                if name in row
                else (None, None, None)
            )
            cells.append("" if value is None else f"{value:.3g} [{low:.3g}, {high:.3g}]")
        print(
            f"| {row['arm']} | {row.get('images', '')} | {row.get('seed', '')} | "
            + " | ".join(cells)
            + " |"
        )


def _value_of(flag: str, flags: str) -> int:
    """The last value counts, as on a command line."""
    words = flags.split()
    return int(words[max(i for i, word in enumerate(words) if word == flag) + 1])


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", help="slice folder with dataset.json")
    parser.add_argument("--out_dir", required=True, help="receives a folder for each arm")
    parser.add_argument("--channels", default="T1CE,Seg", help="channels, Seg among them")
    parser.add_argument(
        "--split",
        default="train",
        help="patients to train on: train, or all, those that are compared with among them",
    )
    parser.add_argument("--arms", default="all", help="names of ARMS, separated by semicolons")
    parser.add_argument(
        "--flags", default="", help="of every training, in place of the same flags here"
    )
    parser.add_argument("--images", type=int, default=3000, help="images seen in a training")
    parser.add_argument(
        "--at",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[1 / 3, 1.0],
        help="shares of the images at which to sample, ascending (default: a third and all)",
    )
    parser.add_argument("--samples", type=int, default=200, help="samples of each set")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each arm")
    parser.add_argument("--workers", type=int, default=2, help="arms side by side")
    parser.add_argument("--draw", default="", help="only draw from this model into --out_dir")
    parser.add_argument(
        "--sampling", default="", help="with --draw: sampler:steps:clip_denoised, see Arm"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first training; with --draw: of the noise"
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
