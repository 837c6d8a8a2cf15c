"""What ``image_train.py`` and ``super_res_train.py`` do with their flags."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from improved_diffusion import __version__, checkpoint, cli, dist_util, logger
from improved_diffusion.architecture import NO_PRESET, preset_flags
from improved_diffusion.cost import free_memory, largest_microbatch, training_cost
from improved_diffusion.fp16_util import allow_tf32, choose_precision, precision_name
from improved_diffusion.resample import NAMES, create_named_schedule_sampler
from improved_diffusion.respace import SpacedDiffusion, respaced
from improved_diffusion.script_util import (
    Loaded,
    create_model_and_diffusion,
    given_flags,
    load_model_and_diffusion,
    model_flags_of,
    script_parser,
    sr_create_model_and_diffusion,
)
from improved_diffusion.seeds import derive_seed
from improved_diffusion.train_util import (
    AUTO,
    Preview,
    TrainLoop,
    parse_ema_rates,
    parse_microbatch,
)
from improved_diffusion.training_data import TrainingData, find_training_data
from improved_diffusion.unet import UNetModel

# Flag: default and explanation.
TRAINING_FLAGS: dict[str, tuple[Any, str]] = {
    "data_dir": (
        "",
        "slice folder, as brats_prepare.py writes it (default: brats_dataset.ROOT), or a folder "
        "of ordinary pictures",
    ),
    "channels": (
        "",
        "of slices: channels to train on, e.g. T1CE,Seg (default: brats_dataset.CHANNELS)",
    ),
    "split": ("train", "of slices: patients to train on: train, test or all"),
    "out_dir": ("Checkpoints", "folder of checkpoints, log and previews"),
    "resume_checkpoint": (
        "",
        "continue from this model file, or from the 'latest' complete checkpoint in --out_dir",
    ),
    "schedule_sampler": ("uniform", f"how timesteps are drawn: {' or '.join(NAMES)}"),
    "lr": (1e-4, "learning rate"),
    "weight_decay": (0.0, "weight decay of AdamW"),
    "lr_anneal_steps": (0, "lower the learning rate linearly to 0 at this step, and stop; 0: off"),
    "max_steps": (0, "stop after so many optimizer steps in total; 0: train until stopped"),
    "batch_size": (1, "images per optimizer step"),
    "microbatch": (
        "-1",
        "images that go through the network at once; -1: the whole batch; auto: as many as fit "
        "into the free memory",
    ),
    "ema_rate": ("0.9999", "rates of the averaged models, separated by commas"),
    "ema_warmup": (True, "let the averages forget the untrained weights in the first steps"),
    "precision": (
        "auto",
        "type in which the network computes: fp32, bf16 or fp16, or auto: bf16 on GPUs that have "
        "it, else fp32; weights stay float32",
    ),
    "use_fp16": (False, "the same as --precision fp16"),
    "fp16_scale_growth": (1e-3, "growth of log2 of the float16 loss scale in a step"),
    "compile": ("auto", "run the network through torch.compile: on, off, or auto: on a GPU"),
    "tf32": (
        True,
        "let float32 matrix products and convolutions on a GPU round their inputs to 10 bits",
    ),
    "log_interval": (10, "steps between rows of progress.csv"),
    "save_interval": (10_000, "steps between checkpoints"),
    "sample_interval": (10_000, "steps between preview pictures; 0: none"),
    "sample_respacing": ("100", "timesteps of the previews' sampling, as --timestep_respacing"),
    "seed": (0, "seed of weights, data order, timesteps and noise"),
    "num_workers": (1, "processes that decode images; 0: none beside the training"),
    "pack_dir": (
        "",
        "read the images from a memory-mapped file in this folder, made at the first start, "
        "instead of decoding them over and over",
    ),
    "dry_run": (False, "print what these flags cost in operations and memory, and stop"),
}
# A continued run takes these from its own command line, all others from the checkpoint.
NOT_CONTINUED = ("out_dir", "resume_checkpoint", "num_workers", "pack_dir", "dry_run")


def train(description: str, *, super_res: bool = False) -> None:
    """Read the command line and train, from the beginning or from a checkpoint.

    Nothing is written before everything that was given has been checked.

    :param super_res: train a super-resolution model.
    """
    parser = script_parser(description, "training", TRAINING_FLAGS, super_res)
    flags, given = vars(parser.parse_args()), given_flags(parser)
    dist_util.setup_dist()

    resume = checkpoint.find_resume_checkpoint(flags["resume_checkpoint"], flags["out_dir"])
    loaded, step = None, 0
    if resume:
        loaded = load_model_and_diffusion(resume, given, super_res=super_res)
        step = checkpoint.step_of(resume, loaded.metadata)
        saved = checkpoint.training_flags(resume, step)
        kept = {name: value for name, value in saved.items() if name not in NOT_CONTINUED}
        flags = {**flags, **kept, **given, **loaded.flags}
    elif flags["preset"] not in ("", NO_PRESET):
        flags = {**flags, **preset_flags(flags["preset"], model_flags_of(flags)), **given}
    args = argparse.Namespace(**flags)
    size = args.large_size if super_res else args.image_size
    low_res_size = args.small_size if super_res else None

    data = _find_data(args, given, loaded, resume)
    args.channels, args.in_channels = ",".join(data.channels), data.in_channels
    if data.classes and not args.num_classes:
        args.num_classes = len(data.classes)
    _check_numbers(args)
    _check_classes(args, data, loaded, resume)
    dtype, _ = choose_precision(args.precision, dist_util.dev())
    allow_tf32(args.tf32)
    microbatch = parse_microbatch(args.microbatch)
    batches = data.batches(
        args.batch_size,
        size,
        seed=args.seed,
        start_batch=step,
        num_workers=args.num_workers,
        low_res_size=low_res_size,
        pack_dir="" if args.dry_run else args.pack_dir,
    )
    model_flags = model_flags_of(vars(args))
    if loaded:
        model, diffusion = loaded.model, loaded.diffusion
    else:
        torch.manual_seed(derive_seed(args.seed, "weights", 0))
        create = sr_create_model_and_diffusion if super_res else create_model_and_diffusion
        model, diffusion = create(**model_flags)
    schedule_sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion)
    parse_ema_rates(args.ema_rate)
    preview = _preview(args, diffusion, data, size, low_res_size)
    if args.dry_run:
        _print_cost(args, model, data, size, low_res_size, dtype)
        return

    logger.configure(args.out_dir)
    loop = TrainLoop(
        model=model,
        diffusion=diffusion,
        data=batches,
        batch_size=args.batch_size,
        microbatch=microbatch,
        lr=args.lr,
        ema_rate=args.ema_rate,
        log_interval=args.log_interval,
        save_interval=args.save_interval,
        resume_checkpoint=resume,
        fp16_scale_growth=args.fp16_scale_growth,
        schedule_sampler=schedule_sampler,
        weight_decay=args.weight_decay,
        lr_anneal_steps=args.lr_anneal_steps,
        max_steps=args.max_steps,
        seed=args.seed,
        ema_warmup=args.ema_warmup,
        sample_interval=args.sample_interval,
        preview=preview,
        metadata={
            "version": __version__,
            "flags": model_flags,
            "channels": data.channels,
            "classes": data.classes,
            "geometry": data.geometry(),
        },
        flags=vars(args),
        channels=data.channels,
        classes=data.classes,
        precision=args.precision,
        compile=args.compile,
    )
    parameters = sum(p.numel() for p in model.parameters())
    what = f"channels {', '.join(data.channels)}" if data.channels else "ordinary pictures"
    if data.classes:
        what += f", {len(data.classes)} classes"
    logger.log(
        f"{parameters:,} parameters on {dist_util.dev()} in {loop.precision}, {what}, "
        f"{diffusion.num_timesteps} timesteps"
    )
    if loop.run_loop():
        logger.log(f"stopped at step {loop.step}; continue with: {continue_command(sys.argv)}")
    else:
        logger.log(f"finished at step {loop.step}")


def _find_data(
    args: argparse.Namespace, given: dict[str, Any], loaded: Loaded | None, resume: str
) -> TrainingData:
    channels, number = given.get("channels"), given.get("in_channels")
    if loaded:
        channels, number = loaded.channels or channels, loaded.flags["in_channels"]
    data = find_training_data(
        args.data_dir,
        channels=channels,
        in_channels=number,
        split=args.split,
        class_cond=args.class_cond,
    )
    if loaded and loaded.metadata and data.channels != loaded.channels:
        raise ValueError(
            f"--data_dir {args.data_dir} is a slice folder, but {resume} was trained on ordinary "
            "pictures; name a folder of pictures"
        )
    return data


def _check_classes(
    args: argparse.Namespace, data: TrainingData, loaded: Loaded | None, resume: str
) -> None:
    known = list(loaded.metadata.get("classes", [])) if loaded else []
    if known and known != data.classes:
        raise ValueError(
            f"{args.data_dir} has the classes {', '.join(data.classes)}, but {resume} was trained "
            f"on {', '.join(known)}; name the folder with which the run began"
        )
    if len(data.classes) > args.num_classes:
        raise ValueError(
            f"--num_classes {args.num_classes}: {args.data_dir} has {len(data.classes)} classes "
            f"({', '.join(data.classes[:5])}{', ...' if len(data.classes) > 5 else ''}); give at "
            "least so many"
        )


def _preview(
    args: argparse.Namespace,
    diffusion: SpacedDiffusion,
    data: TrainingData,
    size: int,
    low_res_size: int | None,
) -> Preview:
    respacing = args.sample_respacing
    if respacing.isdigit():
        respacing = str(min(int(respacing), args.diffusion_steps))
    preview = Preview(
        respaced(diffusion, respacing),
        (data.in_channels, size, size),
        data.channels,
        seed=args.seed,
    )
    if not args.sample_interval:
        return preview
    if low_res_size is not None:
        # Images from all over the folder, enlarged again.
        dataset = data.dataset(size, low_res_size)
        spread = np.linspace(0, len(dataset) - 1, preview.num_samples).astype(int)
        preview.model_kwargs = default_collate([dataset[int(i)][1] for i in spread])
    elif data.classes:
        preview.model_kwargs = {"y": torch.arange(preview.num_samples) % len(data.classes)}
    return preview


def _print_cost(
    args: argparse.Namespace,
    model: UNetModel,
    data: TrainingData,
    size: int,
    low_res_size: int | None,
    dtype: torch.dtype,
) -> None:
    shapes: dict[str, tuple[int, ...]] = {"y": ()} if data.classes else {}
    if low_res_size is not None:
        shapes["low_res"] = (data.in_channels, low_res_size, low_res_size)
    model.compute_dtype = dtype
    averages = len(parse_ema_rates(args.ema_rate))
    cost = training_cost(
        model, (data.in_channels, size, size), dtype=dtype, averages=averages, model_kwargs=shapes
    )
    microbatch = parse_microbatch(args.microbatch)
    if microbatch == AUTO:
        free = free_memory(dist_util.dev())
        microbatch = largest_microbatch(cost.image_bytes, cost.state_bytes, free, args.batch_size)
    images = args.batch_size if microbatch == -1 else min(microbatch, args.batch_size)
    memory = cost.state_bytes + images * cost.image_bytes
    print(f"parameters            {cost.parameters:,}")
    print(f"forward, one image    {cost.forward_flops / 1e9:.1f} GFLOP")
    print(f"training, one image   {cost.training_flops / 1e9:.1f} GFLOP")
    print(
        f"a step of {args.batch_size:<11} {cost.training_flops * args.batch_size / 1e12:.2f} TFLOP"
    )
    print(f"weights and optimizer {cost.state_bytes / 2**20:.0f} MiB")
    print(f"activations, an image {cost.image_bytes / 2**20:.0f} MiB in {precision_name(dtype)}")
    print(f"memory                about {memory / 2**30:.1f} GiB with {images} images at once")


def _check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers with which nothing can be trained."""
    if args.use_fp16:
        if args.precision not in (AUTO, "fp16"):
            raise ValueError(f"--use_fp16 True contradicts --precision {args.precision}")
        args.precision = "fp16"
    for flag in ("log_interval", "lr", "fp16_scale_growth"):
        if not vars(args)[flag] > 0:
            raise ValueError(f"--{flag} {vars(args)[flag]}: give a number above 0")
    for flag in (
        "weight_decay",
        "lr_anneal_steps",
        "max_steps",
        "save_interval",
        "sample_interval",
        "num_workers",
    ):
        if not vars(args)[flag] >= 0:
            raise ValueError(f"--{flag} {vars(args)[flag]}: give 0 or more")


def continue_command(argv: Sequence[str]) -> str:
    """The command line ``argv``, made to go on from the latest checkpoint."""
    words = list(argv)
    for i, word in enumerate(words):
        if word == "--resume_checkpoint":
            del words[i : i + 2]
            break
        if word.startswith("--resume_checkpoint="):
            del words[i]
            break
    return cli.command_line([*words, "--resume_checkpoint", "latest"])
