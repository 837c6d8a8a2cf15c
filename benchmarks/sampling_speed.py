"""Time drawing a batch, also beside openai/improved-diffusion and diffusers' UNet2DModel.

This package and the reference draw with the same weights. They take turns: each draws a batch
while the others wait. The reference takes ancestral steps, diffusers DPM-Solver++(2M).
"""

from __future__ import annotations

import argparse
import statistics

from benchmarks.sides import Side, print_heading, side_parser, take_turns
from improved_diffusion import cli
from improved_diffusion.sampling import SAMPLERS


def main() -> None:
    args = create_argparser().parse_args()
    args.reference_steps = args.reference_steps or args.sampling_steps
    report(take_turns(args, 1, suffix="_sampling"), args)


def report(sides: list[Side], args: argparse.Namespace) -> None:
    """Print what was measured; ratios are medians over the rounds of the paired ratios."""
    own = sides[0]
    print_heading(own, args)
    header = f"{'':10} {'steps':>6} {'s/sample':>9} {'peak GiB':>9} {'first s':>8}"
    print(f"{header} {'ratio':>7} {'per step':>9}")
    for side in sides:
        seconds = statistics.median(side.seconds) / args.batch_size
        ratio = side.ratio_to(own)
        steps = side.about["evaluations"]
        print(
            f"{side.name:10} {steps:6} {seconds:9.4f} {side.peak_bytes / 2**30:9.2f} "
            f"{side.about['first_step']:8.1f} {ratio:7.2f} "
            f"{ratio * own.about['evaluations'] / steps:9.2f}"
        )


def create_argparser() -> argparse.ArgumentParser:
    parser = side_parser(__doc__)
    parser.add_argument("--sampler", default="ancestral", choices=SAMPLERS, help="ours")
    parser.add_argument("--sampling_steps", type=int, default=5, help="ours and diffusers'")
    parser.add_argument(
        "--reference_steps", type=int, default=0, help="the reference's; 0: as many as ours"
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
