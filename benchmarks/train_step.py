"""Time training steps, also beside openai/improved-diffusion and diffusers' UNet2DModel.

All sides train on the same images in batches of one size, this package and the reference also
from the same weights. They take turns: each runs a few steps while the others wait.
"""

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

from improved_diffusion import cli
from improved_diffusion.script_util import (
    add_dict_to_argparser,
    model_and_diffusion_defaults,
    str2bool,
)

ROOT = Path(__file__).resolve().parent.parent
# Between two sides, for the threads of the last one to go to sleep.
PAUSE = 0.5
# The network of the report's experiments on two channels.
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

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    args = create_argparser().parse_args()
    flags = {name: vars(args)[name] for name in NETWORK}
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model": flags,
            "batch_size": args.batch_size,
            "microbatch": args.microbatch,
            "precision": args.precision,
            "compile": args.compile,
            "tf32": args.tf32,
            "reference_tf32": args.reference_tf32,
            "reference": os.path.abspath(args.reference) if args.reference else "",
            "threads": args.threads,
            "weights": os.path.join(folder, "weights.pt"),
        }
        sides = [Side("ours", settings)]
        try:
            if args.reference:
                sides.append(Side("reference", settings))
            if args.diffusers:
                sides.append(Side("diffusers", settings))
            for _ in range(args.rounds):
                for side in sides:
                    time.sleep(PAUSE)
                    side.run(args.steps)
        finally:
            for side in sides:
                side.close()
    report(sides, args)


def report(sides: list[Side], args: argparse.Namespace) -> None:
    """Print what was measured; a ratio is the median over the rounds of the paired ratios."""
    own = sides[0]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, {platform.processor() or platform.machine()}, torch {torch.__version__}")
    size = args.image_size
    print(
        f"{size}x{size}, {args.in_channels} channels, batch {args.batch_size}, "
        f"{own.about['precision']}, {own.about['parameters']:,} parameters"
    )
    print(f"{'':10} {'s/step':>9} {'images/s':>9} {'peak GiB':>9} {'first s':>8} {'ratio':>6}")
    for side in sides:
        seconds = statistics.median(side.seconds)
        ratio = statistics.median(b / a for a, b in zip(own.seconds, side.seconds))
        print(
            f"{side.name:10} {seconds:9.4f} {args.batch_size / seconds:9.2f} "
            f"{side.peak_bytes / 2**30:9.2f} {side.about['first_step']:8.1f} {ratio:6.2f}"
        )
    rate = args.batch_size * own.about["training_flops"] / statistics.median(own.seconds)
    peak = own.about["matrix_flops"]
    print(
        f"{rate / 1e12:.2f} TFLOP/s of {peak / 1e12:.2f} in a matrix product of the same type: "
        f"{rate / peak:.0%} utilisation"
    )


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", help="folder of a copy of openai/improved-diffusion")
    parser.add_argument(
        "--diffusers", type=str2bool, default=False, help="compare with diffusers, if installed"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="images per step")
    parser.add_argument("--microbatch", type=int, default=0, help="images at once; 0: all")
    parser.add_argument("--precision", default="auto", help="ours, and that of diffusers")
    parser.add_argument("--compile", default="auto", help="ours: auto, on or off")
    parser.add_argument("--tf32", type=str2bool, default=True, help="ours: allow TF32")
    parser.add_argument(
        "--reference_tf32", type=str2bool, default=True, help="leave the reference torch's TF32"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=2, help="steps in a turn")
    parser.add_argument(
        "--threads", type=int, default=0, help="threads on a CPU; 0: torch's choice"
    )
    add_dict_to_argparser(parser.add_argument_group("network and process"), NETWORK)
    return parser


if __name__ == "__main__":
    cli.run(main)
