"""Turn BraTS cases (NIfTI) into a folder of 2-D slices for training."""

from __future__ import annotations

import argparse

from improved_diffusion import brats, cli
from improved_diffusion.brats_prepare import prepare


def main() -> None:
    args = create_parser().parse_args()
    prepare(
        args.brats_dir,
        args.out_dir,
        channels=brats.parse_channels(args.channels),
        recipe=args.recipe,
        test_patients=args.test_patients,
        seed=args.seed,
        workers=args.workers,
        progress=cli.progress,
    )


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--brats_dir", required=True, help="folder of the cases, one folder per case at any depth"
    )
    parser.add_argument(
        "--out_dir", required=True, help="slice folder to write; grows as OUT_DIR.partial"
    )
    parser.add_argument(
        "--channels",
        default=",".join(brats.CHANNELS),
        help="modalities to write; only these must exist",
    )
    parser.add_argument(
        "--recipe",
        default="report",
        choices=list(brats.RECIPES),
        help="intensity scaling: by the volume's maximum, or by its 0.5 and 99.5 percentiles",
    )
    parser.add_argument(
        "--test_patients",
        type=int,
        help="patients to hold out for testing (not given: 56 of 369 in proportion)",
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the test patients")
    parser.add_argument("--workers", type=int, help="processes to use (not given: one per core)")
    return parser


if __name__ == "__main__":
    cli.run(main)
