"""What ``image_sample.py`` and ``super_res_sample.py`` do with their flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from improved_diffusion import brats, dist_util, figures
from improved_diffusion.samples import write_sample_folder
from improved_diffusion.sampling import draw_batches
from improved_diffusion.script_util import (
    Loaded,
    given_flags,
    load_model_and_diffusion,
    provenance,
    script_parser,
)

ModelKwargs = Callable[[range], dict[str, torch.Tensor]]

# Flag: default and explanation.
SAMPLING_FLAGS: dict[str, tuple[Any, str]] = {
    "model_path": ("", "model or EMA file, e.g. Checkpoints/ema_0.9999_060000.pt"),
    "channels": (
        "",
        "names of the channels, e.g. T1CE,Seg, for a checkpoint that does not hold them",
    ),
    "sample_dir": ("Samples", "folder to make"),
    "num_samples": (10_000, "samples to draw"),
    "batch_size": (16, "samples drawn at a time"),
    "use_ddim": (False, "deterministic DDIM steps instead of ancestral ones"),
    "clip_denoised": (True, "limit every step's predicted image to [-1, 1]"),
    "classes": (
        "",
        "of a class-conditional model: names or numbers of the classes to draw in turn, e.g. "
        "tumour (empty: all)",
    ),
    "seed": (0, "seed of the noise; sample i depends on it and i alone"),
}
SUPER_RES_FLAGS = {
    **SAMPLING_FLAGS,
    "base_samples": ("", "samples to enlarge: a sample folder or its .npz"),
    "num_samples": (0, "samples to draw, from the base samples in turn; 0: one from each"),
    "classes": (
        "",
        "of a class-conditional model: names or numbers of the classes to draw in turn (empty: "
        "the base samples' own)",
    ),
}


def sample(description: str, *, super_res: bool = False) -> None:
    """Read the command line, draw samples and write them.

    :param super_res: make large samples from small ones.
    """
    own_flags = SUPER_RES_FLAGS if super_res else SAMPLING_FLAGS
    parser = script_parser(description, "sampling", own_flags, super_res)
    args = parser.parse_args()
    dist_util.setup_dist()
    if not args.model_path:
        raise ValueError("--model_path is missing; name a model or EMA file")
    smallest = {"num_samples": 0 if super_res else 1, "batch_size": 1}
    for flag, least in smallest.items():
        if vars(args)[flag] < least:
            raise ValueError(f"--{flag} {vars(args)[flag]}: give {least} or more")
    if super_res and not args.base_samples:
        raise ValueError(
            "--base_samples is missing; name the folder that image_sample.py wrote, or its .npz"
        )

    loaded = load_model_and_diffusion(args.model_path, given_flags(parser), super_res=super_res)
    model = loaded.model.to(dist_util.dev()).eval()
    size = loaded.flags["large_size" if super_res else "image_size"]
    labels = choose_classes(args.classes, loaded)
    base = None
    if super_res:
        base, base_labels = read_base(args.base_samples, loaded)
        args.num_samples = args.num_samples or len(base)
        if loaded.classes and not args.classes:
            if base_labels is None or base_labels.max() >= len(loaded.classes):
                raise ValueError(
                    f"--base_samples {args.base_samples} holds no labels (arr_1) below "
                    f"{len(loaded.classes)}, which this class-conditional model needs; name the "
                    "classes to draw with --classes"
                )
            labels = base_labels

    def label_of(index: int) -> int:
        return int(labels[index % len(labels)])

    def model_kwargs(indices: range) -> dict[str, torch.Tensor]:
        kwargs = {}
        if loaded.classes:
            kwargs["y"] = torch.tensor([label_of(i) for i in indices])
        if base is not None:
            kwargs["low_res"] = base[torch.tensor([i % len(base) for i in indices])]
        return kwargs

    batches = draw_batches(
        model,
        loaded.diffusion,
        args.num_samples,
        args.batch_size,
        (loaded.flags["in_channels"], size, size),
        seed=args.seed,
        device=dist_util.dev(),
        use_ddim=args.use_ddim,
        clip_denoised=args.clip_denoised,
        progress=True,
        model_kwargs_of=model_kwargs,
    )
    record = provenance(args, loaded)
    drawn = [label_of(i) for i in range(args.num_samples)] if loaded.classes else None
    write_sample_folder(
        args.sample_dir, loaded.channels, batches, record, labels=drawn, classes=loaded.classes
    )
    print(f"wrote {args.num_samples} samples to {args.sample_dir}")


def choose_classes(text: str, loaded: Loaded) -> list[int]:
    """Numbers of the classes that ``--classes`` names; all of the model's where it is empty.

    :raises ValueError: an unknown class, or a model without any.
    """
    if not text:
        return list(range(len(loaded.classes)))
    if not loaded.classes:
        raise ValueError(f"--classes {text}: the model has no classes; leave the flag out")
    numbers = []
    for part in text.split(","):
        if part in loaded.classes:
            numbers.append(loaded.classes.index(part))
        elif part.isdecimal() and int(part) < len(loaded.classes):
            numbers.append(int(part))
        else:
            known = ", ".join(loaded.classes[:10]) + (", ..." if len(loaded.classes) > 10 else "")
            raise ValueError(f"--classes {text}: there is no class {part!r}; the model has {known}")
    return numbers


def read_base(path: str, loaded: Loaded) -> tuple[torch.Tensor, np.ndarray | None]:
    """The samples to enlarge, float32 [N, C, h, w] in [-1, 1], and their labels [N].

    A mask is set to its nearest label codes, the only levels with which the model was trained.

    :raises ValueError: samples of another size, other channels or other classes.
    """
    found = figures.read_sample_set(path)
    samples, channels, classes = found.samples, found.channels, found.record.get("classes")
    small = loaded.flags["small_size"]
    expected = (small, small, loaded.flags["in_channels"])
    if samples.shape[1:] != expected:
        raise ValueError(
            f"--base_samples {path} holds samples of height, width and channels "
            f"{'x'.join(map(str, samples.shape[1:]))}, but the model enlarges "
            f"{'x'.join(map(str, expected))}; draw base samples of that size"
        )
    if channels and loaded.channels and channels != loaded.channels:
        raise ValueError(
            f"--base_samples {path} holds {','.join(channels)}, but the model was trained on "
            f"{','.join(loaded.channels)}"
        )
    if found.labels is not None and classes and loaded.classes and classes != loaded.classes:
        raise ValueError(
            f"--base_samples {path} has the classes {', '.join(classes)}, but the model "
            f"{', '.join(loaded.classes)}"
        )
    samples = samples.copy()
    for i, name in enumerate(loaded.channels):
        if name == brats.MASK_CHANNEL:
            samples[..., i] = brats.snap_mask(samples[..., i])
    low_res = torch.from_numpy(samples).permute(0, 3, 1, 2).float() / 127.5 - 1
    return low_res, found.labels
