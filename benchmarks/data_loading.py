"""How fast a slice folder is read, and how long training waits for it at a given speed.

Batches are read as training reads them, decoded from PNG files or out of a pack; a step of the
given speed is stood in for by sleeping.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator

from improved_diffusion import cli
from improved_diffusion.training_data import find_training_data


def main() -> None:
    args = create_argparser().parse_args()
    data = find_training_data(args.data_dir, channels=args.channels, in_channels=None, split="all")
    print(f"{os.cpu_count()} cores, {args.num_workers} workers, batches of {args.batch_size}")
    print(f"{'':8} {'images/s':>9}   waiting at {args.rate:g} images/s")
    with tempfile.TemporaryDirectory() as folder:
        for name, pack_dir in (("decoded", ""), ("packed", f"{folder}/pack")):
            batches = data.batches(
                args.batch_size,
                args.image_size,
                seed=0,
                num_workers=args.num_workers,
                pack_dir=pack_dir,
            )
            next(batches)  # the loader has started
            speed, _ = read(batches, args, rate=None)
            _, waiting = read(batches, args, rate=args.rate)
            print(f"{name:8} {speed:9.0f}   {waiting:.1%}")


def read(batches: Iterator, args: argparse.Namespace, rate: float | None) -> tuple[float, float]:
    """Images per second, and the share of the time spent waiting for them.

    :param rate: images per second that a step takes in; None: as fast as they come.
    """
    start, waited, images = time.perf_counter(), 0.0, 0
    while time.perf_counter() - start < args.seconds:
        before = time.perf_counter()
        batch, _ = next(batches)
        waited += time.perf_counter() - before
        images += len(batch)
        if rate:
            time.sleep(len(batch) / rate)
    seconds = time.perf_counter() - start
    return images / seconds, waited / seconds


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data_dir", required=True, help="slice folder")
    parser.add_argument("--channels", default="FLAIR,Seg,T1,T1CE,T2", help="channels to read")
    parser.add_argument("--image_size", type=int, default=256, help="size of the images")
    parser.add_argument("--batch_size", type=int, default=32, help="images in a batch")
    parser.add_argument("--num_workers", type=int, default=1, help="processes that read")
    parser.add_argument("--rate", type=float, default=500, help="images per second of the steps")
    parser.add_argument("--seconds", type=float, default=10, help="for each measurement")
    return parser


if __name__ == "__main__":
    cli.run(main)
