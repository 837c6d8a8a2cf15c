"""The report's experiments: one definition of each, for training and for sampling.

Beside them stand two of this project's own, in its recipe for BraTS slices. The scripts in the
folders beside this file call ``train(name)`` and ``sample(name)``. README.md says how to run them.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import blobfile as bf

from improved_diffusion import cli
from improved_diffusion.brats import CHANNELS

# What needs torch or draws pictures is imported where it is used: a wrong flag is told at once.

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

Flags = dict[str, object]

# The unconditional LSUN bedroom model of Nichol & Dhariwal 2021, which every experiment on BraTS
# uses.
LSUN_NETWORK: Flags = {
    "image_size": 256,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 1,
    "learn_sigma": True,
    "use_scale_shift_norm": False,
    "attention_resolutions": 16,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "rescale_learned_sigmas": False,
    "rescale_timesteps": False,
}
# Of these what the recipe leaves to the user; whatever else sets it apart is the recipe's.
ARCHITECTURE = (
    "image_size",
    "num_channels",
    "num_res_blocks",
    "num_heads",
    "use_scale_shift_norm",
    "attention_resolutions",
)
# Their unconditional CIFAR-10 model, trained on L_hybrid.
CIFAR10_NETWORK: Flags = {
    "image_size": 32,
    "num_channels": 128,
    "num_res_blocks": 3,
    "learn_sigma": True,
    "dropout": 0.3,
    "diffusion_steps": 4000,
    "noise_schedule": "cosine",
}
RGB: Flags = {"in_channels": 3}

RAW = "model"
EMA_AND_RAW = ("ema_0.9999", RAW)
# The length of the recipe's average, as a share of the training (--ema_sigma_rel).
LONG_AVERAGE = "0.2"

# As many samples as figures.py shows by default.
EVOLUTION_ROWS = 4
BESIDE_SAMPLES = 8


@dataclass(frozen=True)
class Training:
    """The flags of ``image_train.py`` that set one experiment apart from the others.

    ``None`` leaves a flag out: the recipe or its default decides.
    """

    max_steps: int
    batch_size: int
    lr: str = "1e-4"
    microbatch: int | str = -1
    save_interval: int = 10_000
    pictures: str = ""  # the folder of ordinary pictures that --data_dir must name; else slices
    ema_warmup: bool | None = False
    more: Flags = field(default_factory=dict)  # which the others leave at their defaults


@dataclass(frozen=True)
class Sampling:
    """What is sampled by default, and how."""

    batch_size: int | str
    num_samples: int
    steps: tuple[int, ...] = ()
    types: tuple[str, ...] = ("ema_0.9999",)
    timestep_respacing: str = ""
    sampler: str = "ancestral"  # where no timesteps are named; empty: the default, in few steps
    published: str = ""  # address of a checkpoint that others have trained; then there are no steps


@dataclass(frozen=True)
class Experiment:
    """An experiment of the report, or one in the recipe.

    :param network: the flags that training and sampling must agree on.
    :param training: None: others have trained it.
    """

    network: Flags
    training: Training | None
    sampling: Sampling
    in_report: bool = True


@dataclass(frozen=True)
class SampleFolder:
    """A checkpoint and the folder of its samples.

    :param kind: ``model`` or ``ema_<rate>``; empty, as is the step, for a checkpoint that was
        named by its path.
    """

    checkpoint: str
    folder: str
    kind: str = ""
    step: int = 0


def slices(channels: str) -> Flags:
    """The network of the experiments on slices of these channels."""
    return {"channels": channels, "in_channels": len(channels.split(",")), **LSUN_NETWORK}


def in_recipe(channels: str, max_steps: int) -> Experiment:
    """The same network of these channels, trained as ``--preset brats`` says, with a learning rate
    that falls to 0 and a long average, as docs/recipe.md advises where the end is known.

    :param max_steps: a third of the steps, and so of the images, of the report's experiment.
    """
    architecture = {flag: LSUN_NETWORK[flag] for flag in ARCHITECTURE}
    return Experiment(
        {
            "preset": "brats",
            "channels": channels,
            "in_channels": len(channels.split(",")),
            **architecture,
        },
        Training(
            max_steps=max_steps,
            batch_size=128,
            microbatch="auto",
            save_interval=5_000,
            ema_warmup=None,
            more={
                "precision": "auto",
                "keep_checkpoints": 4,
                "lr_anneal_steps": max_steps,
                "ema_sigma_rel": LONG_AVERAGE,
            },
        ),
        Sampling(
            batch_size="auto",
            num_samples=1000,
            steps=(max_steps,),
            types=(f"ema_p{LONG_AVERAGE}",),
            sampler="",
        ),
        in_report=False,
    )


EXPERIMENTS = {
    # The report says neither how long it trained nor how it sampled: both are chosen here.
    "cifar10": Experiment(
        {**RGB, **CIFAR10_NETWORK},
        Training(
            max_steps=50_000, batch_size=128, pictures="the folder that cifar10_pictures.py made"
        ),
        Sampling(batch_size=64, num_samples=64, steps=(50_000,), timestep_respacing="250"),
    ),
    "lsun_bedroom": Experiment(
        # The preset knows the timesteps too; the folders' names are made of them here.
        {"preset": "lsun_bedroom", "diffusion_steps": 1000},
        None,
        Sampling(
            batch_size=42,
            num_samples=252,
            timestep_respacing="250",
            published="https://openaipublic.blob.core.windows.net/diffusion/march-2021/"
            "lsun_uncond_100M_1200K_bs128.pt",
        ),
    ),
    "one_channel_exp1": Experiment(
        {**RGB, **LSUN_NETWORK},
        Training(
            max_steps=100_000,
            batch_size=1,
            pictures="the folder T1CE of a slice folder, such as SLICES/T1CE",
        ),
        Sampling(batch_size=10, num_samples=40, steps=(100_000,)),
    ),
    "one_channel_exp2": Experiment(
        slices("T1CE"),
        Training(max_steps=230_000, batch_size=1),
        Sampling(batch_size=8, num_samples=64, steps=(230_000,)),
    ),
    "two_channel_exp1": Experiment(
        slices("T1CE,Seg"),
        Training(max_steps=250_000, batch_size=1),
        Sampling(batch_size=8, num_samples=64, steps=(250_000,)),
    ),
    "two_channel_exp2": Experiment(
        slices("T1CE,Seg"),
        Training(max_steps=160_000, batch_size=6),
        Sampling(batch_size=36, num_samples=72, steps=(160_000,)),
    ),
    "two_channel_exp3": Experiment(
        slices("T1CE,Seg"),
        Training(max_steps=220_000, batch_size=7, lr="1e-6"),
        Sampling(
            batch_size=42,
            num_samples=42,
            steps=(220_000,),
            types=EMA_AND_RAW,
            timestep_respacing="250",
        ),
    ),
    "two_channel_exp4": Experiment(
        slices("T1CE,Seg"),
        Training(max_steps=60_000, batch_size=128, microbatch=7),
        Sampling(
            batch_size=42,
            num_samples=42,
            steps=(60_000,),
            types=EMA_AND_RAW,
            timestep_respacing="250",
        ),
    ),
    "five_channel_exp1": Experiment(
        slices("FLAIR,Seg,T1,T1CE,T2"),
        Training(max_steps=45_000, batch_size=128, microbatch=6, save_interval=5_000),
        Sampling(
            batch_size=42,
            num_samples=84,
            steps=(10_000, 15_000, 20_000, 25_000, 30_000),
            types=EMA_AND_RAW,
            timestep_respacing="250",
        ),
    ),
    "two_channel_brats": in_recipe("T1CE,Seg", max_steps=20_000),
    "five_channel_brats": in_recipe("FLAIR,Seg,T1,T1CE,T2", max_steps=15_000),
}


# --- training -----------------------------------------------------------------------------------


def train(name: str) -> None:
    """Become ``scripts/image_train.py`` with the experiment's flags and this process's arguments.

    The process is replaced, not wrapped, so its ID stays the one that ``run_script.sh`` recorded.
    """
    cli.run(lambda: become_training(name))


def become_training(name: str) -> None:
    """What :func:`train` does, with ``ValueError`` for what the user can mend."""
    experiment = EXPERIMENTS[name]
    training = experiment.training
    assert training is not None
    parser = argparse.ArgumentParser(
        description=f"Train {name}{' of the report' if experiment.in_report else ''}. Any flag of "
        "scripts/image_train.py may be added and wins over the experiment's, for example "
        "--data_dir SLICES.",
        allow_abbrev=False,
    )
    add_print_flag(parser)
    args, extra = parser.parse_known_args()
    if training.pictures:
        check_pictures(extra, training.pictures)
    flags = {
        "out_dir": f"Checkpoints/{name}",
        "log_interval": 10,
        "save_interval": training.save_interval,
        **experiment.network,
        "lr": training.lr,
        "batch_size": training.batch_size,
        "microbatch": training.microbatch,
        "ema_rate": "0.9999",
        "ema_warmup": training.ema_warmup,
        "max_steps": training.max_steps,
        **training.more,
    }
    flags = {flag: value for flag, value in flags.items() if value is not None}
    command = command_line("image_train.py", flags, extra)
    if args.print:
        print(shlex.join(command))
    else:
        os.execv(command[0], command)


def check_pictures(extra: Sequence[str], expected: str) -> None:
    """Refuse a command line that does not lead to a folder of ordinary pictures.

    :param expected: what ``--data_dir`` must name.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--data_dir", "--resume_checkpoint"):
        parser.add_argument(flag, default="")
    args, _ = parser.parse_known_args(extra)
    # A continued run knows its folder.
    if not args.data_dir and not args.resume_checkpoint:
        raise ValueError(f"--data_dir is missing: name {expected}")
    if args.data_dir and any(os.path.isdir(os.path.join(args.data_dir, name)) for name in CHANNELS):
        raise ValueError(f"--data_dir {args.data_dir} is a slice folder: name {expected}")


# --- sampling -----------------------------------------------------------------------------------


def sample(name: str) -> None:
    """Run ``scripts/image_sample.py`` on each chosen checkpoint in turn, then draw the figures."""
    cli.run(lambda: sample_each(name))


def sample_each(name: str) -> None:
    """What :func:`sample` does, with ``ValueError`` for what the user can mend."""
    experiment = EXPERIMENTS[name]
    args, extra = sample_parser(name, experiment).parse_known_args()
    # Samples of other timesteps lie beside the report's own, not in their place.
    suffix = ""
    if args.timestep_respacing != experiment.sampling.timestep_respacing:
        suffix = f"_{args.timestep_respacing or experiment.network['diffusion_steps']}steps"
    folders = chosen_folders(args, suffix)
    flags: Flags = {
        "batch_size": experiment.sampling.batch_size,
        "num_samples": experiment.sampling.num_samples,
    }
    if args.timestep_respacing:
        flags["timestep_respacing"] = args.timestep_respacing
    elif experiment.sampling.sampler and "--use_ddim" not in extra:
        flags["sampler"] = experiment.sampling.sampler

    def command(own: SampleFolder) -> list[str]:
        # With a network that was trained with other flags, the experiment's would contradict it.
        network = {} if holds_flags(own.checkpoint) else experiment.network
        paths = {"model_path": own.checkpoint, "sample_dir": own.folder}
        return command_line("image_sample.py", {**network, **flags, **paths}, extra)

    if args.print:
        print("\n".join(shlex.join(command(own)) for own in folders))
        return
    left = [own for own in folders if not (os.path.isdir(own.folder) and os.listdir(own.folder))]
    # Not after hours of sampling the checkpoints that come first.
    missing = [own.checkpoint for own in left if not bf.exists(own.checkpoint)]
    if missing:
        raise ValueError(missing_text(name, experiment, missing))
    wanted = SampleFlags(flags, extra)
    for own in folders:
        if own not in left:
            wanted.check(own)
            print(f"{own.folder} holds these samples already", flush=True)
    status = run_in_turn([command(own) for own in left])
    # A stopped program may have ended with status 0; its folder has no name then.
    if status == 0 and all(os.path.isdir(own.folder) for own in folders):
        write_figures(folders, args.sample_dir, suffix, wanted.values["num_samples"])
    sys.exit(status)


def missing_text(name: str, experiment: Experiment, missing: Sequence[str]) -> str:
    """What to do about checkpoints that are not there."""
    if experiment.training is None:
        return (
            f"no checkpoint {missing[0]}: download it from {experiment.sampling.published}, or "
            "name another place with --model_path"
        )
    return (
        f"no checkpoint {', '.join(missing)}: train {name} first, or choose others with --out_dir, "
        "--steps and --types"
    )


def chosen_folders(args: argparse.Namespace, suffix: str) -> list[SampleFolder]:
    """The checkpoints that the command line chooses, and a folder for the samples of each.

    :param suffix: ends the names of the folders.
    """

    def folder(checkpoint: str) -> str:
        return bf.join(args.sample_dir, bf.basename(checkpoint).removesuffix(".pt") + suffix)

    if args.model_path is not None:
        return [SampleFolder(args.model_path, folder(args.model_path))]
    return [
        SampleFolder(path, folder(path), kind, step)
        for step in args.steps
        for kind in args.types
        for path in [bf.join(args.out_dir, f"{kind if kind == RAW else kind + '_'}{step:06d}.pt")]
    ]


def holds_flags(path: str) -> bool:
    """Whether a checkpoint on this machine tells how it was trained.

    One that is not there yet doesn't, and a remote one is not fetched only to ask it.
    """
    if not os.path.exists(path):
        return False
    from improved_diffusion import checkpoint

    return "flags" in checkpoint.metadata_of(checkpoint.load_weights(path))


class SampleFlags:
    """The flags of ``image_sample.py`` with which samples are drawn, to be found in samples.json.

    :param flags: the experiment's.
    :param extra: the user's, which win.
    """

    # Where and in which portions samples are drawn does not change them. The checkpoint, which is
    # compared, holds its channels or decides with the flags of the network what is drawn.
    NOT_COMPARED = ("model_path", "sample_dir", "batch_size", "channels", "preset")

    def __init__(self, flags: Flags, extra: Sequence[str]) -> None:
        from improved_diffusion.sampling_script import SAMPLING_FLAGS
        from improved_diffusion.script_util import given_flags, script_parser

        argv = [*pairs(flags), *extra]
        parser = script_parser("Flags of scripts/image_sample.py.", "sampling", SAMPLING_FLAGS)
        self.values: dict[str, Any] = vars(parser.parse_args(argv))
        compared = {*SAMPLING_FLAGS, "timestep_respacing", *given_flags(parser, argv)}
        self.compared = sorted(compared.difference(self.NOT_COMPARED))

    def check(self, own: SampleFolder) -> None:
        """Whether a folder holds the samples that these flags draw from its checkpoint.

        :raises ValueError: it doesn't; the message says in which flag they differ.
        """
        from improved_diffusion import checkpoint, figures

        record = figures.read_sample_set(own.folder).record
        if bf.exists(own.checkpoint):
            same = record.get("checkpoint_sha256") == checkpoint.sha256(own.checkpoint)
        else:  # it may have been removed when its samples were complete
            same = bf.basename(record.get("checkpoint", "")) == bf.basename(own.checkpoint)
        if not same:
            raise ValueError(
                f"{own.folder} holds samples of another checkpoint than {own.checkpoint}; move it "
                "away, or choose another --sample_dir"
            )
        for name in self.compared:
            found, expected = record.get("flags", {}).get(name), self.values[name]
            if found != expected:
                raise ValueError(
                    f'{own.folder} holds samples that were drawn with --{name} "{found}" and not '
                    f'"{expected}"; move it away, or choose another --sample_dir'
                )


def write_figures(
    folders: Sequence[SampleFolder], sample_dir: str, suffix: str, num_samples: int
) -> None:
    """Draw what several checkpoints made: over the steps of each type, and EMA beside raw.

    :param suffix: ends the pictures' names.
    :param num_samples: how many each folder holds.
    """
    from improved_diffusion import figures

    by_kind: dict[str, list[str]] = {}
    by_step: dict[int, dict[str, str]] = {}
    for own in folders:
        by_kind.setdefault(own.kind, []).append(own.folder)
        by_step.setdefault(own.step, {})[own.kind] = own.folder
    for kind, paths in by_kind.items():
        if len(paths) > 1:
            picture = bf.join(sample_dir, f"evolution_{kind}{suffix}.png")
            figures.write_evolution(paths, picture, num=min(EVOLUTION_ROWS, num_samples))
            print(f"wrote {picture}", flush=True)
    for step, kinds in by_step.items():
        if RAW in kinds and len(kinds) > 1:
            picture = bf.join(sample_dir, f"ema_beside_raw_{step:06d}{suffix}.png")
            paths = [*(path for kind, path in kinds.items() if kind != RAW), kinds[RAW]]
            figures.write_beside(paths, picture, num=min(BESIDE_SAMPLES, num_samples))
            print(f"wrote {picture}", flush=True)


def sample_parser(name: str, experiment: Experiment) -> argparse.ArgumentParser:
    """The flags of the ``sample.py`` of an experiment."""
    sampling = experiment.sampling
    every = "every timestep" if sampling.sampler else "the few steps of the default sampler"
    parser = argparse.ArgumentParser(
        description=f"Sample from {name}{' as the report did' if experiment.in_report else ''}. "
        "Any flag of scripts/image_sample.py may be added and wins over the experiment's.",
        allow_abbrev=False,
    )
    if sampling.published:
        parser.add_argument(
            "--model_path",
            default=f"Checkpoints/{bf.basename(sampling.published)}",
            help=f"the checkpoint of {sampling.published} (default: %(default)s)",
        )
    else:
        parser.add_argument(
            "--steps",
            type=steps,
            default=sampling.steps,
            help=f"e.g. 10000,20000 (default: {','.join(map(str, sampling.steps))})",
        )
        parser.add_argument(
            "--types",
            type=model_types,
            default=sampling.types,
            help=f"e.g. ema_0.9999,model (default: {','.join(sampling.types)})",
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
        "--timestep_respacing",
        default=sampling.timestep_respacing,
        help=f'"" takes {every} (default: "%(default)s")',
    )
    parser.add_argument(
        "--sample_dir",
        default=f"Samples/{name}",
        help="receives a folder for each checkpoint, and the figures (default: %(default)s)",
    )
    add_print_flag(parser)
    return parser


def add_print_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--print``."""
    parser.add_argument("--print", action="store_true", help="print what would be run, and stop")


def steps(text: str) -> tuple[int, ...]:
    """Training steps from a flag such as ``10000,20000``; a step counts once."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not steps such as 10000,20000")
    return tuple(dict.fromkeys(map(int, parts)))


def model_types(text: str) -> tuple[str, ...]:
    """Model types from a flag such as ``ema_0.9999,model``; a type counts once."""
    parts = text.split(",")
    if not all(part == RAW or part.startswith("ema_") for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not types such as ema_0.9999,model")
    return tuple(dict.fromkeys(parts))


# --- processes ----------------------------------------------------------------------------------


def pairs(flags: Mapping[str, object]) -> list[str]:
    """Flags as the words of a command line."""
    return [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]


def command_line(script: str, flags: Mapping[str, object], extra: Sequence[str]) -> list[str]:
    """The command that runs a script; of a flag that is given twice the last one, extra's, wins."""
    return [sys.executable, str(SCRIPTS / script), *pairs(flags), *extra]


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

    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            previous[number] = signal.signal(number, on_signal)

    status = 0
    try:
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
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 - status if status < 0 else status  # as a shell reports a signal
