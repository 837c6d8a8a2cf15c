"""Time drawing a batch, also beside openai/improved-diffusion and diffusers' UNet2DModel.

This package and the reference draw with the same weights. They take turns: each draws a batch
while the others wait. The reference takes ancestral steps, diffusers DPM-Solver++(2M).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time

import torch

from benchmarks.train_step import NETWORK, PAUSE, Side
from improved_diffusion import cli
from improved_diffusion.sampling import SAMPLERS
from improved_diffusion.script_util import add_dict_to_argparser, str2bool


def main() -> None:
    args = create_argparser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            **vars(args),
            "model": {name: vars(args)[name] for name in NETWORK},
            "reference_steps": args.reference_steps or args.sampling_steps,
            "reference": os.path.abspath(args.reference) if args.reference else "",
            "weights": os.path.join(folder, "weights.pt"),
        }
        sides = [Side("ours_sampling", settings)]
        try:
            if args.reference:
                sides.append(Side("reference_sampling", settings))
            if args.diffusers:
                sides.append(Side("diffusers_sampling", settings))
            for _ in range(args.rounds):
                for side in sides:
                    time.sleep(PAUSE)
                    side.run(1)
        finally:
            for side in sides:
                side.close()
    report(sides, args)


def report(sides: list[Side], args: argparse.Namespace) -> None:
    """Print what was measured; ratios are medians over the rounds of the paired ratios."""
    own = sides[0]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, {platform.processor() or platform.machine()}, torch {torch.__version__}")
    print(
        f"{args.image_size}x{args.image_size}, {args.in_channels} channels, batch "
        f"{args.batch_size}, {own.about['precision']}, {own.about['parameters']:,} parameters"
    )
    header = f"{'':10} {'steps':>6} {'s/sample':>9} {'peak GiB':>9} {'first s':>8}"
    print(f"{header} {'ratio':>7} {'per step':>9}")
    for side in sides:
        seconds = statistics.median(side.seconds) / args.batch_size
        ratio = statistics.median(b / a for a, b in zip(own.seconds, side.seconds))
        steps = side.about["evaluations"]
        print(
            f"{side.name:10} {steps:6} {seconds:9.4f} {side.peak_bytes / 2**30:9.2f} "
            f"{side.about['first_step']:8.1f} {ratio:7.2f} "
            f"{ratio * own.about['evaluations'] / steps:9.2f}"
        )


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", help="folder of a copy of openai/improved-diffusion")
    parser.add_argument(
        "--diffusers", type=str2bool, default=False, help="compare with diffusers, if installed"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="samples drawn at once")
    parser.add_argument("--sampler", default="ancestral", choices=SAMPLERS, help="ours")
    parser.add_argument("--sampling_steps", type=int, default=5, help="ours and diffusers'")
    parser.add_argument(
        "--reference_steps", type=int, default=0, help="the reference's; 0: as many as ours"
    )
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


if __name__ == "__main__":
    cli.run(main)
