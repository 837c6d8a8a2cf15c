"""What the arms of :mod:`benchmarks.recipe` cost: seconds for a training step, side by side.

Each arm is a process that trains the network of the comparison on random images; they take turns,
so that whatever slows the machine slows all. Masks are encoded beforehand: an encoding costs what
its channels and logits add.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import recipe
from benchmarks.sides import Side, print_machine, run_rounds, side_parser
from improved_diffusion import brats, cli
from improved_diffusion.architecture import preset_flags
from improved_diffusion.encodings import GREY, network_channels, network_logits
from improved_diffusion.script_util import add_dict_to_argparser, model_and_diffusion_defaults


def main() -> None:
    args = create_argparser().parse_args()
    names = args.arms.split(";")
    for name in names:
        if name not in recipe.ARMS or recipe.ARMS[name].trained_as:
            known = "; ".join(own for own, arm in recipe.ARMS.items() if not arm.trained_as)
            raise ValueError(f"--arms {name}: choose from {known}")
    count = len(brats.parse_channels(args.channels))
    sides: list[Side] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for i, name in enumerate(names):
                settings = side_parser("").parse_args([])
                settings.batch_size, settings.threads = args.batch_size, args.threads
                weights = str(Path(folder) / f"{i}.pt")
                model = model_flags(name, count)
                more = {"model": model, "weights": weights, "microbatch": 0}
                sides.append(Side("ours", {**vars(settings), **more}))
            run_rounds(sides, args.rounds, args.steps)
        finally:
            for side in sides:
                side.close()
    print_machine()
    print("| arm | s/step | steps/s | ratio |\n|---|---|---|---|")
    for name, side in zip(names, sides):
        seconds = statistics.median(side.seconds)
        ratio = side.ratio_to(sides[0])
        print(f"| {name} | {seconds:.4f} | {1 / seconds:.2f} | {ratio:.3f} |")


def model_flags(name: str, in_channels: int) -> dict[str, Any]:
    """The flags of an arm's network and process, on channels that are encoded already."""
    defaults = model_and_diffusion_defaults()
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, {**defaults, "preset": ""})
    words = f"{recipe.NETWORK} {recipe.ARMS[name].flags}".split()
    if preset := parser.parse_known_args(words)[0].preset:
        parser.set_defaults(**preset_flags(preset, defaults))
    flags = vars(parser.parse_known_args(words)[0])
    del flags["preset"]
    encoding = flags["mask_encoding"]
    flags["in_channels"] = network_channels(encoding, in_channels)
    if not network_logits(encoding):
        flags["mask_encoding"] = GREY
    return flags


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arms",
        default="report;noise;velocity;cosine;brats;cosine, self-conditioned;cosine, one-hot",
        help="names of recipe.ARMS, separated by semicolons; ratios are to the first",
    )
    parser.add_argument("--channels", default="T1CE,Seg", help="channels, Seg among them")
    parser.add_argument("--batch_size", type=int, default=8, help="images in a step")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each arm")
    parser.add_argument("--steps", type=int, default=2, help="steps in a turn")
    parser.add_argument("--threads", type=int, default=0, help="on a CPU; 0: torch's choice")
    return parser


if __name__ == "__main__":
    cli.run(main)
