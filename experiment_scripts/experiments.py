"""The report's experiments on BraTS: one definition of each, for training and for sampling.

The folders beside this file hold a ``train.py`` and a ``sample.py`` per experiment, which call
``train(name)`` and ``sample(name)``. README.md says how to run them.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import blobfile as bf

from improved_diffusion import cli

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

# The unconditional LSUN bedroom model of Nichol & Dhariwal 2021, which every experiment uses.
MODEL_FLAGS = {
    "image_size": 256,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 1,
    "learn_sigma": True,
    "use_scale_shift_norm": False,
    "attention_resolutions": 16,
}
DIFFUSION_FLAGS = {
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "rescale_learned_sigmas": False,
    "rescale_timesteps": False,
}
EMA_AND_RAW = ("ema_0.9999", "model")


@dataclass(frozen=True)
class Experiment:
    """What sets one experiment apart from the others."""

    channels: str
    max_steps: int
    batch_size: int
    sample_batch_size: int
    num_samples: int
    sample_steps: tuple[int, ...]
    sample_types: tuple[str, ...] = ("ema_0.9999",)
    timestep_respacing: str = ""
    lr: str = "1e-4"
    microbatch: int = -1
    save_interval: int = 10_000

    def network_flags(self) -> dict[str, object]:
        """The flags that training and sampling must agree on."""
        in_channels = len(self.channels.split(","))
        channels = {"channels": self.channels, "in_channels": in_channels}
        return {**channels, **MODEL_FLAGS, **DIFFUSION_FLAGS}


EXPERIMENTS = {
    "one_channel_exp2": Experiment(
        channels="T1CE",
        max_steps=230_000,
        batch_size=1,
        sample_batch_size=8,
        num_samples=64,
        sample_steps=(230_000,),
    ),
    "two_channel_exp1": Experiment(
        channels="T1CE,Seg",
        max_steps=250_000,
        batch_size=1,
        sample_batch_size=8,
        num_samples=64,
        sample_steps=(250_000,),
    ),
    "two_channel_exp2": Experiment(
        channels="T1CE,Seg",
        max_steps=160_000,
        batch_size=6,
        sample_batch_size=36,
        num_samples=72,
        sample_steps=(160_000,),
    ),
    "two_channel_exp3": Experiment(
        channels="T1CE,Seg",
        max_steps=220_000,
        batch_size=7,
        lr="1e-6",
        sample_batch_size=42,
        num_samples=42,
        sample_steps=(220_000,),
        sample_types=EMA_AND_RAW,
        timestep_respacing="250",
    ),
    "two_channel_exp4": Experiment(
        channels="T1CE,Seg",
        max_steps=60_000,
        batch_size=128,
        microbatch=7,
        sample_batch_size=42,
        num_samples=42,
        sample_steps=(60_000,),
        sample_types=EMA_AND_RAW,
        timestep_respacing="250",
    ),
    "five_channel_exp1": Experiment(
        channels="FLAIR,Seg,T1,T1CE,T2",
        max_steps=45_000,
        batch_size=128,
        microbatch=6,
        save_interval=5_000,
        sample_batch_size=42,
        num_samples=84,
        sample_steps=(10_000, 15_000, 20_000, 25_000, 30_000),
        sample_types=EMA_AND_RAW,
        timestep_respacing="250",
    ),
}


def train(name: str) -> None:
    """Become ``scripts/image_train.py`` with the experiment's flags and this process's arguments.

    The process is replaced, not wrapped, so its ID stays the one that ``run_script.sh`` recorded.
    """
    experiment = EXPERIMENTS[name]
    parser = argparse.ArgumentParser(
        description=f"Train {name} of the report. Any flag of scripts/image_train.py may be added "
        "and wins over the experiment's, for example --data_dir SLICES.",
        allow_abbrev=False,
    )
    add_print_flag(parser)
    args, extra = parser.parse_known_args()
    flags = {
        "out_dir": f"Checkpoints/{name}",
        "log_interval": 10,
        "save_interval": experiment.save_interval,
        **experiment.network_flags(),
        "lr": experiment.lr,
        "batch_size": experiment.batch_size,
        "microbatch": experiment.microbatch,
        "ema_rate": "0.9999",
        "ema_warmup": False,
        "max_steps": experiment.max_steps,
    }
    command = command_line("image_train.py", flags, extra)
    if args.print:
        print(shlex.join(command))
    else:
        os.execv(command[0], command)


def sample(name: str) -> None:
    """Run ``scripts/image_sample.py`` on each chosen checkpoint of the experiment in turn."""
    cli.run(lambda: sample_each(name))


def sample_each(name: str) -> None:
    experiment = EXPERIMENTS[name]
    args, extra = sample_parser(name, experiment).parse_known_args()
    if args.model_path is not None:
        checkpoints = [args.model_path]
    else:
        checkpoints = [
            bf.join(args.out_dir, f"{kind if kind == 'model' else kind + '_'}{step:06d}.pt")
            for step in args.steps
            for kind in args.types
        ]
    commands = []
    for checkpoint in checkpoints:
        samples = bf.join(args.sample_dir, bf.basename(checkpoint).removesuffix(".pt"))
        flags = {**experiment.network_flags(), "batch_size": experiment.sample_batch_size}
        flags["num_samples"] = experiment.num_samples
        if args.timestep_respacing:
            flags["timestep_respacing"] = args.timestep_respacing
        if args.timestep_respacing != experiment.timestep_respacing:
            # Beside the report's own samples, not in their place.
            taken = args.timestep_respacing or DIFFUSION_FLAGS["diffusion_steps"]
            samples = f"{samples}_{taken}steps"
        flags.update(model_path=checkpoint, sample_dir=samples)
        commands.append(command_line("image_sample.py", flags, extra))
    if args.print:
        print("\n".join(map(shlex.join, commands)))
        return
    # Not after hours of sampling the checkpoints that come first.
    missing = [checkpoint for checkpoint in checkpoints if not bf.exists(checkpoint)]
    if missing:
        raise ValueError(
            f"no checkpoint {', '.join(missing)}: train {name} first, or choose others with "
            "--out_dir, --steps and --types"
        )
    sys.exit(run_in_turn(commands))


def sample_parser(name: str, experiment: Experiment) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f"Sample from checkpoints of {name} as the report did. Any flag of "
        "scripts/image_sample.py may be added and wins over the experiment's.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--steps",
        type=steps,
        default=experiment.sample_steps,
        help=f"e.g. 10000,20000 (default: {','.join(map(str, experiment.sample_steps))})",
    )
    parser.add_argument(
        "--types",
        type=model_types,
        default=experiment.sample_types,
        help=f"e.g. ema_0.9999,model (default: {','.join(experiment.sample_types)})",
    )
    parser.add_argument(
        "--timestep_respacing",
        default=experiment.timestep_respacing,
        help='"" takes every timestep (default: "%(default)s")',
    )
    parser.add_argument(
        "--out_dir",
        default=f"Checkpoints/{name}",
        help="where training put the checkpoints (default: %(default)s)",
    )
    parser.add_argument(
        "--model_path",
        help="sample from this checkpoint alone, whatever --steps, --types and --out_dir say",
    )
    parser.add_argument(
        "--sample_dir",
        default=f"Samples/{name}",
        help="receives a folder for each checkpoint (default: %(default)s)",
    )
    add_print_flag(parser)
    return parser


def add_print_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--print", action="store_true", help="print what would be run, and stop")


def steps(text: str) -> tuple[int, ...]:
    """Training steps from a flag such as ``10000,20000``."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not steps such as 10000,20000")
    return tuple(map(int, parts))


def model_types(text: str) -> tuple[str, ...]:
    """Model types from a flag such as ``ema_0.9999,model``."""
    parts = tuple(text.split(","))
    if not all(part == "model" or part.startswith("ema_") for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not types such as ema_0.9999,model")
    return parts


def command_line(script: str, flags: dict[str, object], extra: list[str]) -> list[str]:
    """The command that runs a script; of a flag that is given twice the last one, extra's, wins."""
    pairs = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    return [sys.executable, str(SCRIPTS / script), *pairs, *extra]


def run_in_turn(commands: list[list[str]]) -> int:
    """Run commands one after the other; return the status of the last one, or of the first to fail.

    A signal that asks this process to stop is passed on exactly once, and no further command is
    started. Each command has a process group of its own, because one that ``kill_pid.sh`` or
    Ctrl-C sends to this process's group would otherwise reach it a second time, at which a
    program stops without finishing its step.
    """
    child: subprocess.Popen | None = None
    waiting: list[int] = []
    stopped = False

    def pass_on() -> None:
        while child is not None and waiting:
            child.send_signal(waiting.pop())

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        waiting.append(number)
        pass_on()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, on_signal)

    status = 0
    for done, command in enumerate(commands):
        if stopped:
            print(f"stopped with {len(commands) - done} of {len(commands)} checkpoints left")
            break
        child = subprocess.Popen(command, preexec_fn=os.setpgrp)
        pass_on()  # what came while the child was starting
        status = child.wait()
        child = None
        if status != 0:
            break
    return 128 - status if status < 0 else status  # as a shell reports a signal
