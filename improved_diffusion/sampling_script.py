"""What ``image_sample.py`` and ``super_res_sample.py`` do with their flags."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
from typing import Any

import numpy as np
import torch

from improved_diffusion import brats, checkpoint, cli, dist_util, execution, figures
from improved_diffusion.cost import (
    free_memory,
    is_out_of_memory,
    largest_microbatch,
    sampling_memory,
)
from improved_diffusion.fp16_util import (
    PRECISIONS,
    allow_tf32,
    choose_precision,
    precision_name,
)
from improved_diffusion.nifti_export import BRATS_GEOMETRY
from improved_diffusion.samples import (
    begun_with,
    count_complete,
    parse_formats,
    write_sample_folder,
)
from improved_diffusion.sampling import (
    AUTO,
    DEFAULT_SAMPLER,
    DEFAULT_SPACING,
    DEFAULT_STEPS,
    SAMPLERS,
    choose_plan,
    draw,
    to_levels,
)
from improved_diffusion.script_util import (
    Loaded,
    given_flags,
    load_model_and_diffusion,
    provenance,
    script_parser,
    str2bool,
)
from improved_diffusion.solvers import SPACINGS
from improved_diffusion.unet import UNetModel

# --batch_size auto takes no more: a batch is what an interruption loses.
MOST_ON_GPU = 256
MOST_ON_CPU = 16

# Flag: default and explanation.
SAMPLING_FLAGS: dict[str, tuple[Any, str]] = {
    "model_path": ("", "model or EMA file, e.g. Checkpoints/ema_0.9999_060000.pt"),
    "channels": (
        "",
        "names of the channels, e.g. T1CE,Seg, for a checkpoint that does not hold them",
    ),
    "sample_dir": (
        "Samples",
        "folder to make; until it is complete it has .partial behind its name, and the same "
        "command continues it",
    ),
    "num_samples": (10_000, "samples to draw"),
    "batch_size": ("16", "samples drawn at a time; auto: as many as fit into the free memory"),
    "format": (
        "npz,png",
        "what to write: npz (raw levels), png (a folder of slices for each channel), nifti "
        "(volumes of one slice that lie where the training data do)",
    ),
    "sampler": (
        AUTO,
        f"how to go from noise to an image: {', '.join(SAMPLERS)}; auto: {DEFAULT_SAMPLER}, but "
        "ancestral where --timestep_respacing is given and ddim with --use_ddim",
    ),
    "sampling_steps": (
        0,
        f"steps of the sampler (heun evaluates twice in each); 0: {DEFAULT_STEPS}, but every "
        "timestep for ancestral and ddim and where --timestep_respacing is given",
    ),
    "timestep_spacing": (
        AUTO,
        f"which timesteps: {', '.join(SPACINGS)}; auto: uniform for ancestral and ddim, else "
        f"{DEFAULT_SPACING}",
    ),
    "use_ddim": (False, "the same as --sampler ddim"),
    "precision": (
        AUTO,
        f"type in which the network computes: {', '.join(PRECISIONS)}, or auto: bf16 on GPUs that "
        "have it in hardware, else fp32",
    ),
    "compile": (
        AUTO,
        "run the network through torch.compile: on, off, or auto: on a GPU, where it is worth its "
        "time",
    ),
    "tf32": (True, "let float32 products on a GPU round their inputs to 10 bits"),
    "clip_denoised": (
        AUTO,
        "limit every step's predicted image to [-1, 1]: True, False, or auto: with ancestral and "
        "ddim always, else where noise outweighs the signal",
    ),
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


def parse_clip(text: str) -> bool | str:
    """``--clip_denoised`` as :func:`improved_diffusion.sampling.draw` takes it.

    :raises ValueError: neither a boolean nor ``auto``.
    """
    if text == AUTO:
        return AUTO
    try:
        return str2bool(text)
    except argparse.ArgumentTypeError:
        raise ValueError(f"--clip_denoised {text}: give True, False or {AUTO}") from None


@dist_util.one_of_several()
def sample(description: str, *, super_res: bool = False) -> None:
    """Read the command line, draw samples and write them.

    :param super_res: make large samples from small ones.
    """
    own_flags = SUPER_RES_FLAGS if super_res else SAMPLING_FLAGS
    parser = script_parser(description, "sampling", own_flags, super_res)
    args = parser.parse_args()
    dist_util.setup_dist(several=True)
    if not args.model_path:
        raise ValueError("--model_path is missing; name a model or EMA file")
    least = 0 if super_res else 1
    if args.num_samples < least:
        raise ValueError(f"--num_samples {args.num_samples}: give {least} or more")
    formats = parse_formats(args.format)
    args.clip_denoised = parse_clip(args.clip_denoised)
    device = dist_util.dev()
    dtype, remark = choose_precision(args.precision, device)
    if remark:
        print(remark, file=sys.stderr)
    allow_tf32(args.tf32)
    if super_res and not args.base_samples:
        raise ValueError(
            "--base_samples is missing; name the folder that image_sample.py wrote, or its .npz"
        )

    loaded = load_model_and_diffusion(args.model_path, given_flags(parser), super_res=super_res)
    size = loaded.flags["large_size" if super_res else "image_size"]
    plan = choose_plan(
        loaded.diffusion,
        sampler=args.sampler,
        steps=args.sampling_steps,
        spacing=args.timestep_spacing,
        use_ddim=args.use_ddim,
        respaced=bool(loaded.flags["timestep_respacing"]),
    )
    geometry = loaded.metadata.get("geometry") or BRATS_GEOMETRY
    if "nifti" in formats and not loaded.channels:
        raise ValueError(
            "--format nifti: the model draws ordinary pictures, or its channels are not known; "
            "leave nifti out, or name BraTS channels with --channels"
        )
    labels = np.asarray(choose_classes(args.classes, loaded))
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

    shape = (loaded.encoding.width, size, size)
    shapes: dict[str, tuple[int, ...]] = {"y": ()} if loaded.classes else {}
    if base is not None:
        shapes["low_res"] = tuple(base.shape[1:])
    loaded.model.compute_dtype = dtype
    batch_size = choose_batch_size(args, loaded.model, shape, shapes, device)
    count = math.ceil(args.num_samples / batch_size)
    steps = len(plan.timesteps)
    network = execution.for_sampling(
        loaded.model, dtype, args.compile, device, evaluations=count * plan.evaluations
    )
    if loaded.classes:
        labels = labels[np.arange(args.num_samples) % len(labels)]

    precise = precision_name(dtype)
    settings = {
        "a checkpoint of SHA-256": checkpoint.sha256(args.model_path),
        "--seed": args.seed,
        "--sampler": plan.sampler,
        "--sampling_steps": steps,
        "--timestep_spacing": plan.spacing,
        "--clip_denoised": args.clip_denoised,
        "--batch_size": batch_size,
        "--format": ",".join(formats),
        "--channels": ",".join(loaded.channels),
        "--classes": args.classes,
        "--precision": precise,
        "--compile": args.compile,
        "--tf32": args.tf32,
        "device": device.type,
        # A checkpoint that holds no flags takes them from the command line.
        **{f"--{name}": value for name, value in loaded.flags.items()},
        "--base_samples of SHA-256": None if base is None else _digest(base.numpy()),
        "labels of SHA-256": _digest(labels) if loaded.classes else None,
    }
    if dist_util.rank() == 0:
        print(
            f"{args.num_samples} samples by {plan.sampler}, {plan.evaluations} evaluations each, "
            f"{batch_size} at a time on {device} in {precise}",
            file=sys.stderr,
            flush=True,
        )
    progress: list[cli.Progress] = []

    def on_step() -> None:
        if progress:
            progress[0].advance()

    fitting = batch_size  # how many samples the memory takes at once

    def draw_levels(indices: range) -> np.ndarray:
        nonlocal fitting
        parts = []
        start = indices.start
        while start < indices.stop:
            part = range(start, min(start + fitting, indices.stop))
            try:
                parts.append(draw_at_once(part))
                start = part.stop
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
                fitting = (len(part) + 1) // 2
                print(
                    f"{len(part)} samples at once do not fit into memory: going on with {fitting}",
                    file=sys.stderr,
                    flush=True,
                )
        return np.concatenate(parts)

    def draw_at_once(indices: range) -> np.ndarray:
        kwargs = {}
        if loaded.classes:
            kwargs["y"] = torch.from_numpy(labels[indices.start : indices.stop])
        if base is not None:
            kwargs["low_res"] = base[torch.arange(indices.start, indices.stop) % len(base)]
        samples = draw(
            network,
            loaded.diffusion,
            indices,
            shape,
            seed=args.seed,
            device=device,
            sampler=plan.sampler,
            timesteps=plan.timesteps,
            clip_denoised=args.clip_denoised,
            on_step=on_step,
            model_kwargs=kwargs,
        )
        return to_levels(loaded.encoding.decode(samples))

    def on_start(left: int) -> None:
        if dist_util.rank() == 0 and left:
            progress.append(cli.Progress(left * steps, "sampling", "step"))

    record = {
        **provenance(args, loaded),
        "sampler": plan.sampler,
        "timesteps": plan.timesteps,
        "evaluations": plan.evaluations,
        "precision": precise,
        "batch_size": batch_size,
    }
    if "nifti" in formats:
        record["geometry"] = loaded.metadata.get("geometry") or "BraTS default"
    with cli.stop_at_signals():
        stopped = ""
        try:
            write_sample_folder(
                args.sample_dir,
                loaded.channels,
                draw_levels,
                record,
                num_samples=args.num_samples,
                batch_size=batch_size,
                shape=(size, size, loaded.flags["in_channels"]),
                settings=settings,
                labels=labels if loaded.classes else None,
                classes=loaded.classes,
                formats=formats,
                geometry=geometry,
                on_start=on_start,
            )
        except cli.Stopped as stop:
            stopped = str(stop)
        for shown in progress:
            shown.close()
        if dist_util.rank() != 0:
            return
        if stopped and not os.path.exists(os.path.join(args.sample_dir, "samples.json")):
            kept = count_complete(args.sample_dir)
            print(
                f"{stopped}: {kept} of {args.num_samples} samples are kept in "
                f"{os.path.normpath(args.sample_dir)}.partial; continue with: "
                f"{cli.command_line(sys.argv)}",
                flush=True,
            )
        else:
            print(f"wrote {args.num_samples} samples to {args.sample_dir}", flush=True)


def choose_batch_size(
    args: argparse.Namespace,
    model: UNetModel,
    shape: tuple[int, int, int],
    model_kwargs: dict[str, tuple[int, ...]],
    device: torch.device,
) -> int:
    """What ``--batch_size`` stands for.

    ``auto`` is the size with which the folder's samples were begun, else as many images as fit
    into the memory that is free, at most :data:`MOST_ON_GPU` or, on a CPU, where larger batches
    are no faster, :data:`MOST_ON_CPU`.

    :raises ValueError: neither a number above 0 nor ``auto``.
    """
    if args.batch_size != AUTO:
        if not args.batch_size.isdecimal() or int(args.batch_size) < 1:
            raise ValueError(
                f"--batch_size {args.batch_size}: give a number of samples, 1 or more, or {AUTO}"
            )
        return int(args.batch_size)

    def choose() -> int:
        begun = begun_with(args.sample_dir).get("--batch_size")
        if isinstance(begun, int) and begun > 0:
            return begun
        image_bytes = sampling_memory(model, shape, model_kwargs=model_kwargs)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        most = min(args.num_samples, MOST_ON_GPU if device.type == "cuda" else MOST_ON_CPU)
        return largest_microbatch(image_bytes, weights, free_memory(device), most)

    return dist_util.on_first(choose)


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values)).hexdigest()


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
