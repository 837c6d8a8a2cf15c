"""Train a diffusion model on the slices of a folder."""

import argparse
import shlex
import sys
from typing import Any

import torch

import brats_dataset
from improved_diffusion import __version__, checkpoint, cli, dist_util, logger
from improved_diffusion.resample import NAMES, create_named_schedule_sampler
from improved_diffusion.respace import respaced
from improved_diffusion.script_util import (
    create_model_and_diffusion,
    given_flags,
    load_model_and_diffusion,
    model_flags_of,
    script_parser,
)
from improved_diffusion.seeds import derive_seed
from improved_diffusion.train_util import Preview, TrainLoop, parse_ema_rates

# Flag: default and explanation.
TRAINING_FLAGS: dict[str, tuple[Any, str]] = {
    "data_dir": ("", "slice folder, as brats_prepare.py writes it (default: brats_dataset.ROOT)"),
    "channels": ("", "channels to train on, e.g. T1CE,Seg (default: brats_dataset.CHANNELS)"),
    "split": ("train", "patients to train on: train, test or all"),
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
    "batch_size": (1, "slices per optimizer step"),
    "microbatch": (-1, "slices that go through the network at once; -1: the whole batch"),
    "ema_rate": ("0.9999", "rates of the averaged models, separated by commas"),
    "ema_warmup": (True, "let the averages forget the untrained weights in the first steps"),
    "log_interval": (10, "steps between rows of progress.csv"),
    "save_interval": (10_000, "steps between checkpoints"),
    "sample_interval": (10_000, "steps between preview pictures; 0: none"),
    "sample_respacing": ("100", "timesteps of the previews' sampling, as --timestep_respacing"),
    "seed": (0, "seed of weights, data order, timesteps and noise"),
    "num_workers": (1, "processes that decode slices; 0: none beside the training"),
}
# A continued run takes these from its own command line, all others from the checkpoint.
NOT_CONTINUED = ("out_dir", "resume_checkpoint", "num_workers")


def main() -> None:
    parser = script_parser(__doc__, "training", TRAINING_FLAGS)
    flags, given = vars(parser.parse_args()), given_flags(parser)
    dist_util.setup_dist()

    resume = checkpoint.find_resume_checkpoint(flags["resume_checkpoint"], flags["out_dir"])
    loaded, step = None, 0
    if resume:
        loaded = load_model_and_diffusion(resume, given)
        step = checkpoint.step_of(resume, loaded.metadata)
        saved = checkpoint.training_flags(resume, step)
        kept = {name: value for name, value in saved.items() if name not in NOT_CONTINUED}
        flags = {**flags, **kept, **loaded.flags, **given}
    args = argparse.Namespace(**flags)
    channels = loaded.channels if loaded else []
    if not channels:
        number = loaded.flags["in_channels"] if loaded else given.get("in_channels")
        channels = brats_dataset.resolve_channels(given.get("channels"), number)
    args.channels, args.in_channels = ",".join(channels), len(channels)
    check_numbers(args)

    data = brats_dataset.load_data(
        data_dir=args.data_dir,
        batch_size=args.batch_size,
        image_size=args.image_size,
        class_cond=args.class_cond,
        brats_channels=channels,
        split=args.split,
        seed=args.seed,
        start_batch=step,
        num_workers=args.num_workers,
    )
    model_flags = model_flags_of(vars(args))
    if loaded:
        model, diffusion = loaded.model, loaded.diffusion
    else:
        torch.manual_seed(derive_seed(args.seed, "weights", 0))
        model, diffusion = create_model_and_diffusion(**model_flags)
    schedule_sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion)
    parse_ema_rates(args.ema_rate)
    respacing = args.sample_respacing
    if respacing.isdigit():
        respacing = str(min(int(respacing), args.diffusion_steps))
    preview = Preview(
        respaced(diffusion, respacing),
        (len(channels), args.image_size, args.image_size),
        channels,
        seed=args.seed,
    )
    # Nothing is written before everything that was given has been checked.
    logger.configure(args.out_dir)
    loop = TrainLoop(
        model=model,
        diffusion=diffusion,
        data=data,
        batch_size=args.batch_size,
        microbatch=args.microbatch,
        lr=args.lr,
        ema_rate=args.ema_rate,
        log_interval=args.log_interval,
        save_interval=args.save_interval,
        resume_checkpoint=resume,
        schedule_sampler=schedule_sampler,
        weight_decay=args.weight_decay,
        lr_anneal_steps=args.lr_anneal_steps,
        max_steps=args.max_steps,
        seed=args.seed,
        ema_warmup=args.ema_warmup,
        sample_interval=args.sample_interval,
        preview=preview,
        metadata={"version": __version__, "flags": model_flags, "channels": channels},
        flags=vars(args),
    )
    parameters = sum(p.numel() for p in model.parameters())
    logger.log(
        f"{parameters:,} parameters on {dist_util.dev()}, channels {', '.join(channels)}, "
        f"{diffusion.num_timesteps} timesteps"
    )
    if loop.run_loop():
        logger.log(f"stopped at step {loop.step}; continue with: {continue_command()}")
    else:
        logger.log(f"finished at step {loop.step}")


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers with which nothing can be trained."""
    for flag in ("log_interval", "lr"):
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


def continue_command() -> str:
    """This command line, made to go on from the latest checkpoint."""
    words = list(sys.argv)
    for i, word in enumerate(words):
        if word == "--resume_checkpoint":
            del words[i : i + 2]
            break
        if word.startswith("--resume_checkpoint="):
            del words[i]
            break
    return shlex.join(["python", *words, "--resume_checkpoint", "latest"])


if __name__ == "__main__":
    cli.run(main)
