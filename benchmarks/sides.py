"""Several sides that do the same work in turn, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from improved_diffusion.script_util import (
    add_dict_to_argparser,
    model_and_diffusion_defaults,
    str2bool,
)

ROOT = Path(__file__).resolve().parent.parent
# Between two sides, for the threads of the last one to go to sleep.
PAUSE = 0.5
# The network of the report's experiments on two channels. Their images are random numbers, in which
# there is no mask to encode.
NETWORK = {
    **model_and_diffusion_defaults(),
    "in_channels": 2,
    "image_size": 256,
    "num_heads": 1,
    "use_scale_shift_norm": False,
    "attention_resolutions": "16",
    "rescale_learned_sigmas": False,
    "rescale_timesteps": False,
}
del NETWORK["mask_encoding"]


class Side:
    """A worker process, see :mod:`benchmarks.workers`."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name = name.removesuffix("_sampling")
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workers", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.seconds: list[float] = []  # per step, one entry for each round
        self.about = self.ask(json.dumps(settings))
        self.peak_bytes = 0

    def ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise ValueError(f"{self.name} failed; its error is above")
        return json.loads(answer)

    def run(self, steps: int) -> None:
        answer = self.ask(str(steps))
        self.seconds.append(answer["seconds"] / steps)
        self.peak_bytes = answer["peak_bytes"]

    def ratio_to(self, other: Side) -> float:
        """How many times as long as ``other``: the median over the rounds of the paired ratios."""
        return statistics.median(b / a for a, b in zip(other.seconds, self.seconds))

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def take_turns(args: argparse.Namespace, steps: int, *, suffix: str = "") -> list[Side]:
    """Run ours and the sides that ``args`` chooses, round by round.

    :param args: of a parser that :func:`side_parser` began.
    :param steps: in a turn.
    :param suffix: behind the sides' names in :data:`benchmarks.workers.SIDES`.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            **vars(args),
            "model": {name: vars(args)[name] for name in NETWORK},
            "reference": os.path.abspath(args.reference) if args.reference else "",
            "weights": os.path.join(folder, "weights.pt"),
        }
        sides = [Side(f"ours{suffix}", settings)]
        try:
            if args.reference:
                sides.append(Side(f"reference{suffix}", settings))
            if args.diffusers:
                sides.append(Side(f"diffusers{suffix}", settings))
            run_rounds(sides, args.rounds, steps)
        finally:
            for side in sides:
                side.close()
    return sides


def run_rounds(sides: list[Side], rounds: int, steps: int) -> None:
    """Let each side run so many steps while the others wait, again and again."""
    for _ in range(rounds):
        for side in sides:
            time.sleep(PAUSE)
            side.run(steps)


def print_machine() -> None:
    """On what was measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, {platform.processor() or platform.machine()}, torch {torch.__version__}")


def print_heading(own: Side, args: argparse.Namespace) -> None:
    """On what, and what work, was measured."""
    print_machine()
    size = args.image_size
    print(
        f"{size}x{size}, {args.in_channels} channels, batch {args.batch_size}, "
        f"{own.about['precision']}, {own.about['parameters']:,} parameters"
    )


def side_parser(description: str) -> argparse.ArgumentParser:
    """A parser of the flags that all comparisons have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", help="folder of a copy of openai/improved-diffusion")
    parser.add_argument(
        "--diffusers", type=str2bool, default=False, help="compare with diffusers, if installed"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="images in a batch")
    parser.add_argument("--precision", default="auto", help="ours, and that of diffusers")
    parser.add_argument("--compile", default="auto", help="ours: auto, on or off")
    parser.add_argument("--tf32", type=str2bool, default=True, help="ours: allow TF32")
    parser.add_argument(
        "--reference_tf32", type=str2bool, default=True, help="leave the reference torch's TF32"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument(
        "--threads", type=int, default=0, help="threads on a CPU; 0: torch's choice"
    )
    add_dict_to_argparser(parser.add_argument_group("network and process"), NETWORK)
    return parser
