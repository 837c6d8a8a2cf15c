"""What ``image_train.py`` and ``super_res_train.py`` do with their flags."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import blobfile as bf
import numpy as np
import torch
from torch.utils.data import default_collate

from improved_diffusion import __version__, checkpoint, cli, dist_util, logger
from improved_diffusion.architecture import NO_PRESET, RECIPES, preset_flags
from improved_diffusion.augmentation import Augmentation
from improved_diffusion.brats import MASK_CHANNEL
from improved_diffusion.cost import free_memory, largest_microbatch, training_cost
from improved_diffusion.encodings import GREY, MaskEncoding
from improved_diffusion.evaluation.in_training import Evaluation
from improved_diffusion.fp16_util import allow_tf32, choose_precision, precision_name
from improved_diffusion.power_ema import parse_sigma_rels
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
    "warmup_steps": (0, "raise the learning rate linearly from 0 over so many steps; 0: off"),
    "grad_clip": (0.0, "scale gradients down to this L2 norm; 0: off"),
    "max_skipped_steps": (
        50,
        "end the run, with its state saved, when so many steps in a row were skipped because the "
        "loss or gradient was not finite",
    ),
    "lr_anneal_steps": (0, "lower the learning rate linearly to 0 at this step, and stop; 0: off"),
    "max_steps": (0, "stop after so many optimizer steps in total; 0: train until stopped"),
    "batch_size": (1, "images per optimizer step, on each of several processes"),
    "microbatch": (
        "-1",
        "images that go through the network at once; -1: the whole batch; auto: as many as fit "
        "into the free memory",
    ),
    "ema_rate": ("0.9999", "rates of the averaged models, separated by commas"),
    "ema_warmup": (True, "let the averages forget the untrained weights in the first steps"),
    "ema_sigma_rel": (
        "",
        "also keep averages whose length is a share of the training, e.g. 0.05,0.10, from which "
        "ema_posthoc.py makes those of other lengths; empty: none",
    ),
    "ema_snapshot_interval": (
        0,
        "steps between snapshots of these averages alone, beside those of the checkpoints; 0: none",
    ),
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
    "keep_checkpoints": (
        0,
        "thin out checkpoints to so many in all: the two newest, and others spread evenly over "
        "the run; snapshots of --ema_sigma_rel stay; 0: keep all",
    ),
    "sample_interval": (10_000, "steps between preview pictures; 0: none"),
    "sample_respacing": ("100", "timesteps of the previews' sampling, as --timestep_respacing"),
    "eval_interval": (
        10_000,
        "of slices: steps between evaluations of a few samples of the average, whose validity and "
        "distance from real slices are logged as eval_...; 0: none",
    ),
    "eval_samples": (32, "samples of such an evaluation"),
    "seed": (0, "seed of weights, data order, timesteps and noise"),
    "augment": (
        0.0,
        "of slices: share of the training slices that are changed at random, image and mask "
        "together; 0: none",
    ),
    "augment_rotate": (10.0, "turn them by up to so many degrees to either side"),
    "augment_scale": (0.1, "enlarge or shrink them by up to this share"),
    "augment_shift": (0.05, "move them along rows and columns by up to this share of the size"),
    "augment_intensity": (0.1, "change gain and gamma of every image by up to this share"),
    "augment_flip": (
        False,
        "mirror every other of them, left to right; off, because brains are not symmetric",
    ),
    "num_workers": (1, "processes that decode images; 0: none beside the training"),
    "pack_dir": (
        "",
        "read the images from a memory-mapped file in this folder, made at the first start, "
        "instead of decoding them over and over",
    ),
    "dry_run": (False, "print what these flags cost in operations and memory, and stop"),
}
# Training slices with which samples are compared during training.
EVAL_REAL = 256

# Set by torchrun: how often it has started the processes again.
RESTARTS_VARIABLE = "TORCHELASTIC_RESTART_COUNT"

# A continued run takes these from its own command line, all others from the checkpoint.
NOT_CONTINUED = ("out_dir", "resume_checkpoint", "num_workers", "pack_dir", "dry_run")


def train(description: str, *, super_res: bool = False) -> None:
    """Read the command line and train, from the beginning or from a checkpoint.

    Nothing is written before everything that was given has been checked. Under several processes
    all call this.

    :param super_res: train a super-resolution model.
    """
    parser = script_parser(description, "training", TRAINING_FLAGS, super_res)
    flags, given = vars(parser.parse_args()), given_flags(parser)
    with dist_util.one_of_several(), ExitStack() as held:
        dist_util.setup_dist(several=True)
        _train(flags, given, super_res, held)


def _train(flags: dict[str, Any], given: dict[str, Any], super_res: bool, held: ExitStack) -> None:
    out_dir = flags["out_dir"]

    def take_folder() -> None:
        held.enter_context(checkpoint.exclusive(out_dir))

    existed = dist_util.on_first(lambda: bf.isdir(out_dir))
    if existed and not flags["dry_run"]:
        dist_util.on_first(take_folder)
    asked = flags["resume_checkpoint"]
    if int(os.environ.get(RESTARTS_VARIABLE, 0)):
        # torchrun starts the same command again. Before the first checkpoint in this folder a run
        # that was given one of another folder is not to begin without it.
        saved = dist_util.on_first(lambda: checkpoint.complete_steps(out_dir))
        asked = "latest" if saved or not asked else asked
    resume, damaged = dist_util.on_first(lambda: checkpoint.find_resume_checkpoint(asked, out_dir))
    loaded, step, before = None, 0, {}
    if resume:
        loaded = load_model_and_diffusion(resume, given, super_res=super_res)
        step = checkpoint.step_of(resume, loaded.metadata)
        before = checkpoint.training_state(resume, step)
        saved = before.get("flags", {})
        kept = {name: value for name, value in saved.items() if name not in NOT_CONTINUED}
        flags = {**flags, **kept, **given, **loaded.flags}
    elif (preset := flags["preset"]) not in ("", NO_PRESET):
        # A recipe sets flags of the training, too.
        defaults = flags if preset in RECIPES and not super_res else model_flags_of(flags)
        flags = {**flags, **preset_flags(preset, defaults), **given}
    args = argparse.Namespace(**flags)
    size = args.large_size if super_res else args.image_size
    low_res_size = args.small_size if super_res else None

    data = _find_data(args, given, loaded, resume)
    args.channels, args.in_channels = ",".join(data.channels), data.in_channels
    if data.classes and not args.num_classes:
        args.num_classes = len(data.classes)
    _check_numbers(args)
    has_mask = MASK_CHANNEL in data.channels
    if not super_res and not has_mask and "mask_encoding" not in given:
        args.mask_encoding = GREY  # whatever a recipe names for the mask
    encoding = MaskEncoding(vars(args).get("mask_encoding", GREY), data.channels, data.in_channels)
    augmentation = _augmentation(args, data, super_res)
    _check_classes(args, data, loaded, resume)
    dtype, _ = choose_precision(args.precision, dist_util.dev())
    allow_tf32(args.tf32)
    microbatch = parse_microbatch(args.microbatch)
    rates = parse_ema_rates(args.ema_rate)
    sigma_rels = parse_sigma_rels("--ema_sigma_rel", args.ema_sigma_rel)
    if resume and asked != "latest":  # which has been verified
        dist_util.on_first(lambda: checkpoint.verify(resume, rates, sigma_rels))
    batches = data.batches(
        args.batch_size,
        size,
        seed=args.seed,
        start=before.get("samples", step * args.batch_size * dist_util.world_size()),
        num_workers=args.num_workers,
        low_res_size=low_res_size,
        pack_dir="" if args.dry_run else args.pack_dir,
    )
    held.callback(batches.close)
    model_flags = model_flags_of(vars(args))
    if loaded:
        model, diffusion = loaded.model, loaded.diffusion
    else:
        torch.manual_seed(derive_seed(args.seed, "weights", 0))
        if super_res:
            model, diffusion = sr_create_model_and_diffusion(**model_flags)
        else:
            model, diffusion = create_model_and_diffusion(**model_flags, labels=encoding.posterior)
    schedule_sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion)
    preview = _preview(args, diffusion, data, encoding, size, low_res_size)
    if args.dry_run:
        _print_cost(args, model, data, encoding, size, low_res_size, dtype)
        return

    evaluates = bool(args.eval_interval and data.channels and not super_res)
    evaluation = None
    if evaluates and dist_util.rank() == 0:
        evaluation = _evaluation(args, diffusion, data, encoding, size)
    parameters = sum(p.numel() for p in model.parameters())
    disk = dist_util.on_first(
        lambda: _disk_need(args, parameters, len(rates), len(sigma_rels), step)
    )
    if not existed:
        dist_util.on_first(take_folder)
    logger.configure(out_dir, None if dist_util.rank() == 0 else [])
    for sentence in damaged:
        logger.warn(f"not continued from: {sentence}")
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
        warmup_steps=args.warmup_steps,
        grad_clip=args.grad_clip,
        max_skipped_steps=args.max_skipped_steps,
        keep_checkpoints=args.keep_checkpoints,
        files_at=lambda begin, end: data.files_at(size, seed=args.seed, begin=begin, end=end),
        restart=asked == "latest",
        lr_anneal_steps=args.lr_anneal_steps,
        max_steps=args.max_steps,
        seed=args.seed,
        ema_warmup=args.ema_warmup,
        ema_sigma_rel=args.ema_sigma_rel,
        ema_snapshot_interval=args.ema_snapshot_interval,
        sample_interval=args.sample_interval,
        preview=preview,
        eval_interval=args.eval_interval if evaluates else 0,
        evaluation=evaluation,
        metadata={
            "version": __version__,
            "flags": model_flags,
            "channels": data.channels,
            "classes": data.classes,
            "geometry": data.geometry(),
        },
        flags={name: value for name, value in vars(args).items() if name not in NOT_CONTINUED},
        channels=encoding.names,
        classes=data.classes,
        precision=args.precision,
        compile=args.compile,
        encoding=encoding,
        augmentation=augmentation,
    )
    what = f"channels {', '.join(data.channels)}" if data.channels else "ordinary pictures"
    if data.classes:
        what += f", {len(data.classes)} classes"
    logger.log(
        f"{parameters:,} parameters on {dist_util.dev()} in {loop.precision}, {what}, "
        f"{diffusion.num_timesteps} timesteps"
    )
    if (processes := dist_util.world_size()) > 1:
        logger.log(
            f"{processes} processes of {args.batch_size} images: {processes * args.batch_size} "
            "images in each step"
        )
    logger.log(disk)
    if loop.run_loop():
        logger.log(f"stopped at step {loop.step}; continue with: {continue_command(sys.argv)}")
    else:
        logger.log(f"finished at step {loop.step}")


def _disk_need(
    args: argparse.Namespace, parameters: int, averages: int, lengths: int, step: int
) -> str:
    """What the run's checkpoints will take, in words.

    :param lengths: how many power averages there are, whose snapshots stay.
    :raises ValueError: the disk holds not even one.
    """
    size = checkpoint.size_in_bytes(parameters, averages + lengths)
    snapshot = 4 * parameters * lengths
    last = min((end for end in (args.max_steps, args.lr_anneal_steps) if end), default=0)
    number = written = None
    left = max(last - step, 0)
    if last:
        written = max(1, math.ceil(left / args.save_interval)) if args.save_interval else 1
        number = written
    if args.keep_checkpoints:
        # One more for a moment: the oldest goes when the newest is complete.
        number = min(number or math.inf, args.keep_checkpoints + 1)
    free = checkpoint.free_bytes(args.out_dir)
    text = f"a checkpoint takes {_in_words(size)}"
    if number:
        text += f", {number} of them {_in_words(number * size)}"
    elif args.save_interval:
        text += f", one every {args.save_interval} steps"
    beside = 0
    if lengths and written:
        beside = written - number + _between(args.ema_snapshot_interval, args.save_interval, left)
        text += f", and {beside} snapshots {_in_words(beside * snapshot)}" if beside else ""
    elif lengths:
        text += f"; {_in_words(snapshot)} of it are a snapshot, which stays"
    if free is None:
        return text
    if free < size:
        raise ValueError(
            f"--out_dir {args.out_dir}: {text}, but {_in_words(free)} are free on its disk; make "
            "room, or choose another folder"
        )
    text += f"; {_in_words(free)} are free"
    if number and number * size + beside * snapshot > free:
        text += ", which is NOT ENOUGH: see --keep_checkpoints and --save_interval"
    return text


def _between(interval: int, save_interval: int, steps: int) -> int:
    """How many multiples of ``interval`` up to ``steps`` are none of ``save_interval``."""
    if not interval:
        return 0
    both = math.lcm(interval, save_interval)
    return steps // interval - (steps // both if both else 0)


def _in_words(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


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


def _augmentation(
    args: argparse.Namespace, data: TrainingData, super_res: bool
) -> Augmentation | None:
    found = Augmentation(
        data.channels,
        args.augment,
        rotate=args.augment_rotate,
        scale=args.augment_scale,
        shift=args.augment_shift,
        intensity=args.augment_intensity,
        flip=args.augment_flip,
    )
    if not args.augment:
        return None
    if super_res or not data.channels:
        what = "super-resolution models" if super_res else "ordinary pictures"
        raise ValueError(f"--augment {args.augment}: not done for {what}; leave it out")
    return found


def _preview(
    args: argparse.Namespace,
    diffusion: SpacedDiffusion,
    data: TrainingData,
    encoding: MaskEncoding,
    size: int,
    low_res_size: int | None,
) -> Preview:
    respacing = args.sample_respacing
    if respacing.isdigit():
        respacing = str(min(int(respacing), args.diffusion_steps))
    preview = Preview(
        respaced(diffusion, respacing),
        (encoding.width, size, size),
        data.channels,
        seed=args.seed,
        encoding=encoding,
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


def _evaluation(
    args: argparse.Namespace,
    diffusion: SpacedDiffusion,
    data: TrainingData,
    encoding: MaskEncoding,
    size: int,
) -> Evaluation:
    """Compare with slices from all over the folder."""
    dataset = data.dataset(size)
    spread = np.linspace(0, len(dataset) - 1, min(len(dataset), EVAL_REAL)).astype(int)
    images = np.stack([dataset[int(i)][0].numpy() for i in spread])
    real = ((images + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
    labels = torch.arange(args.eval_samples) % len(data.classes) if data.classes else None
    return Evaluation(
        diffusion, encoding, data.channels, real, args.eval_samples, seed=args.seed, labels=labels
    )


def _print_cost(
    args: argparse.Namespace,
    model: UNetModel,
    data: TrainingData,
    encoding: MaskEncoding,
    size: int,
    low_res_size: int | None,
    dtype: torch.dtype,
) -> None:
    shapes: dict[str, tuple[int, ...]] = {"y": ()} if data.classes else {}
    if low_res_size is not None:
        shapes["low_res"] = (data.in_channels, low_res_size, low_res_size)
    model.compute_dtype = dtype
    averages = len(parse_ema_rates(args.ema_rate))
    averages += len(parse_sigma_rels("--ema_sigma_rel", args.ema_sigma_rel))
    cost = training_cost(
        model, (encoding.width, size, size), dtype=dtype, averages=averages, model_kwargs=shapes
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
    checkpoint.check_keep(args.keep_checkpoints)
    if args.ema_snapshot_interval and not args.ema_sigma_rel:
        raise ValueError(
            f"--ema_snapshot_interval {args.ema_snapshot_interval}: there is nothing to write "
            "without --ema_sigma_rel, such as 0.05,0.10"
        )
    if args.eval_interval and args.eval_samples < 3:
        raise ValueError(f"--eval_samples {args.eval_samples}: give 3 or more")
    for flag in ("log_interval", "lr", "fp16_scale_growth", "max_skipped_steps"):
        if not vars(args)[flag] > 0:
            raise ValueError(f"--{flag} {vars(args)[flag]}: give a number above 0")
    for flag in (
        "weight_decay",
        "warmup_steps",
        "grad_clip",
        "lr_anneal_steps",
        "max_steps",
        "save_interval",
        "sample_interval",
        "eval_interval",
        "ema_snapshot_interval",
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
    return cli.command_line([*words, "--resume_checkpoint", "latest"], dist_util.launcher())
