"""Write synthetic brain-tumour patients in the layout of BraTS 2020."""

from __future__ import annotations

import argparse

from improved_diffusion import cli
from improved_diffusion.phantom import write_phantoms


def main() -> None:
    args = create_parser().parse_args()
    write_phantoms(
        args.out_dir, args.patients, args.seed, workers=args.workers, progress=cli.progress
    )


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--out_dir", required=True, help="folder to write, with one folder per patient"
    )
    parser.add_argument("--patients", type=int, default=8, help="how many patients to write")
    parser.add_argument(
        "--seed", type=int, default=0, help="patient i depends on the seed and i alone"
    )
    parser.add_argument("--workers", type=int, help="processes to use (not given: one per core)")
    return parser


if __name__ == "__main__":
    cli.run(main)
