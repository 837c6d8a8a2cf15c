"""Time training steps, also beside openai/improved-diffusion and diffusers' UNet2DModel.

All sides train on the same images in batches of one size, this package and the reference also
from the same weights. They take turns: each runs a few steps while the others wait.
"""

from __future__ import annotations

import argparse
import statistics

from benchmarks.sides import Side, print_heading, side_parser, take_turns
from improved_diffusion import cli


def main() -> None:
    args = create_argparser().parse_args()
    report(take_turns(args, args.steps), args)


def report(sides: list[Side], args: argparse.Namespace) -> None:
    """Print what was measured; a ratio is the median over the rounds of the paired ratios."""
    own = sides[0]
    print_heading(own, args)
    print(f"{'':10} {'s/step':>9} {'images/s':>9} {'peak GiB':>9} {'first s':>8} {'ratio':>6}")
    for side in sides:
        seconds = statistics.median(side.seconds)
        ratio = side.ratio_to(own)
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
    parser = side_parser(__doc__)
    parser.add_argument("--microbatch", type=int, default=0, help="images at once; 0: all")
    parser.add_argument("--steps", type=int, default=2, help="steps in a turn")
    return parser


if __name__ == "__main__":
    cli.run(main)
