"""What ``image_nll.py`` does: the bound on the negative log-likelihood of real images.

Nichol & Dhariwal 2021, section 2: the variational bound L_vlb, Eqs. 4 to 7, in bits per dimension.
The last step's likelihood is that of an 8-bit level, so images must hold whole levels.
An encoded mask (:mod:`improved_diffusion.encodings`) holds the lowest and the highest.

Shapes: N images, C channels, H height, W width, T timesteps.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from typing import Any

import blobfile as bf
import numpy as np
from torch.utils.data import DataLoader, Subset

from improved_diffusion import dist_util
from improved_diffusion.encodings import SDF
from improved_diffusion.files import atomic_write
from improved_diffusion.sampling import SampleNoise
from improved_diffusion.script_util import (
    given_flags,
    load_model_and_diffusion,
    provenance,
    script_parser,
)
from improved_diffusion.seeds import check_seed
from improved_diffusion.training_data import TrainingData, find_training_data

NLL_FLAGS: dict[str, tuple[Any, str]] = {
    "model_path": ("", "model or EMA file, e.g. Checkpoints/ema_0.9999_060000.pt"),
    "data_dir": (
        "",
        "slice folder (default: brats_dataset.ROOT), or a folder of ordinary pictures",
    ),
    "channels": (
        "",
        "of slices: names of the channels, e.g. T1CE,Seg, for a checkpoint that does not hold them",
    ),
    "split": ("train", "of slices: patients to evaluate: train, test or all"),
    "out_dir": ("Likelihood", "folder to make"),
    "num_samples": (1000, "how many of the images, from the first on; 0: all"),
    "batch_size": (1, "images evaluated at a time"),
    "clip_denoised": (True, "limit every step's predicted image to [-1, 1]"),
    "seed": (0, "seed of the noise; image i's depends on it and i alone"),
}
TERMS = ("vb", "mse", "xstart_mse")


def evaluate(description: str) -> None:
    """Read the command line, evaluate images, and write the results into a new folder.

    ``nll.json`` holds the mean and its standard error, ``images.csv`` every image's bits, and
    ``vb_terms.npz``, ``mse_terms.npz`` and ``xstart_mse_terms.npz`` the means [T] of the bound's
    terms, of the noise's and of the predicted image's squared error, the noisiest timestep first.
    """
    parser = script_parser(description, "evaluation", NLL_FLAGS)
    args = parser.parse_args()
    given = given_flags(parser)
    dist_util.setup_dist()
    if not args.model_path:
        raise ValueError("--model_path is missing; name a model or EMA file")
    if args.num_samples < 0 or args.batch_size < 1:
        raise ValueError(
            f"--num_samples {args.num_samples} --batch_size {args.batch_size}: give 0 or more "
            "images, and 1 or more at a time"
        )
    check_seed(args.seed)
    if bf.isdir(args.out_dir) and list(bf.listdir(args.out_dir)):
        raise ValueError(
            f"--out_dir {args.out_dir} already holds something, and nothing is overwritten; "
            "choose another folder"
        )

    loaded = load_model_and_diffusion(args.model_path, given)
    if loaded.encoding.name == SDF:
        raise ValueError(
            f"{args.model_path} was trained with --mask_encoding {SDF}, whose distances are no "
            "levels that could have a likelihood; name a model with another encoding"
        )
    data = find_training_data(
        args.data_dir,
        channels=loaded.channels,
        in_channels=loaded.flags["in_channels"],
        split=args.split,
        class_cond=loaded.flags["class_cond"],
    )
    known = loaded.metadata.get("classes", data.classes)
    if known != data.classes or len(data.classes) > len(loaded.classes):
        raise ValueError(
            f"{args.data_dir} has the classes {', '.join(data.classes)}, but {args.model_path} has "
            f"{len(loaded.classes)}: {', '.join(loaded.classes[:10])}"
        )
    dataset = data.dataset(loaded.flags["image_size"])
    count = min(args.num_samples or len(dataset), len(dataset))
    model = loaded.model.to(dist_util.dev()).eval()

    total, prior, sums = [], [], dict.fromkeys(TERMS, 0.0)
    loader = DataLoader(Subset(dataset, range(count)), args.batch_size)
    for images, cond in loader:
        done = len(total)
        indices = range(done, done + len(images))
        out = loaded.diffusion.calc_bpd_loop(
            model,
            loaded.encoding.encode(images.to(dist_util.dev())),
            clip_denoised=args.clip_denoised,
            model_kwargs={name: value.to(dist_util.dev()) for name, value in cond.items()},
            noise_fn=SampleNoise(args.seed, indices, dist_util.dev()),
        )
        total += out["total_bpd"].tolist()
        prior += out["prior_bpd"].tolist()
        for name in TERMS:
            sums[name] = sums[name] + out[name].double().sum(dim=0).cpu().numpy()
        line = f"done {len(total)} of {count} images: bpd={np.mean(total):.6f}"
        print(line, file=sys.stderr, flush=True)

    for name in TERMS:
        buffer = io.BytesIO()
        np.savez(buffer, (sums[name] / count).astype(np.float32))
        _write(args.out_dir, f"{name}_terms.npz", buffer.getvalue())
    _write(args.out_dir, "images.csv", _table(data, dataset, total, prior))
    deviation = float(np.std(total, ddof=1)) if count > 1 else math.nan
    record = {
        "bits_per_dim": float(np.mean(total)),
        "standard_error": deviation / math.sqrt(count) if count > 1 else None,
        "prior_bits_per_dim": float(np.mean(prior)),
        "images": count,
        "timesteps": loaded.diffusion.num_timesteps,
        "channels": data.channels,
        **provenance(args, loaded),
    }
    _write(args.out_dir, "nll.json", (json.dumps(record, indent=1) + "\n").encode())
    print(f"{record['bits_per_dim']:.4f} bits per dimension, mean of {count} images")


def _table(data: TrainingData, dataset: Any, total: list[float], prior: list[float]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "bits_per_dim", "prior_bits_per_dim"])
    paths = [files[0] for files in dataset.channel_paths] if data.channels else dataset.local_images
    for path, own, own_prior in zip(paths, total, prior):
        writer.writerow([bf.basename(path), f"{own:.6f}", f"{own_prior:.6f}"])
    return text.getvalue().encode()


def _write(folder: str, name: str, content: bytes) -> None:
    with atomic_write(bf.join(folder, name)) as file:
        file.write(content)
