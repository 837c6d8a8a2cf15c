"""Draw the report's figures from the files that training and sampling write."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import numpy as np

from improved_diffusion import brats, cli, figures, plots


def main() -> None:
    args = create_argparser().parse_args()
    args.draw(args)
    print(f"wrote {args.out}")


def loss(args: argparse.Namespace) -> None:
    plots.loss_plot(
        args.progress,
        args.out,
        smooth=args.smooth,
        x=args.x,
        log_x=args.log_x,
        log_y=args.log_y,
        terms=args.terms and names(args.terms),
    )


def curve(args: argparse.Namespace) -> None:
    plots.curve_plot(
        named_runs(args.run),
        args.out,
        term=args.term,
        x=args.x,
        smooth=args.smooth,
        log_x=args.log_x,
        log_y=args.log_y,
        x_max=args.x_max,
    )


def grid(args: argparse.Namespace) -> None:
    found = figures.read_sample_set(args.samples)
    picture = figures.sample_grid(
        found.chosen(args.start, args.num), found.channels, columns=args.columns, masks=args.masks
    )
    figures.save_grid(picture, args.out)


def evolution(args: argparse.Namespace) -> None:
    figures.write_evolution(
        args.samples, args.out, num=args.num, start=args.start, masks=args.masks
    )


def beside(args: argparse.Namespace) -> None:
    figures.write_beside(
        args.samples,
        args.out,
        num=args.num,
        start=args.start,
        titles=args.titles and names(args.titles),
        masks=args.masks,
    )


def compare(args: argparse.Namespace) -> None:
    import brats_dataset  # loads torch, which the other figures do without

    samples, channels = figures.read_samples(args.samples)
    if channels is None:
        raise ValueError(
            f"there is no samples.json with the channels' names beside {args.samples}: give the "
            "folder that image_sample.py wrote"
        )
    paths = brats_dataset.get_BRATS_paths(channels, root=args.real, split="all")
    # The slices' channels come in the fixed order, whatever order the samples have.
    ordered = brats.parse_channels(",".join(channels))
    samples = samples[..., [channels.index(name) for name in ordered]]
    slices = brats_dataset.load_channels_from_dir(
        paths, image_size=samples.shape[1], channels=ordered
    )
    available = min(len(samples), len(slices))
    if not 1 <= args.num <= available:
        raise ValueError(
            f"--num {args.num} of {len(slices)} real and {len(samples)} synthetic slices: choose "
            f"from 1 to {available}"
        )
    chosen = np.random.default_rng(args.seed).choice(len(slices), args.num, replace=False)
    real = np.stack([np.asarray(slices[int(index)][0]) for index in chosen])  # [N, C, H, W]
    real = np.round((real + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)  # [N, H, W, C]
    figures.compare_grid(real, samples[: args.num], ordered, args.out, masks=args.masks)


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def named_runs(texts: list[str]) -> dict[str, list[str]]:
    """``LABEL=CSV,CSV`` of every ``--run``; without a label, the name of the first CSV's folder."""
    runs: dict[str, list[str]] = {}
    for text in texts:
        label, equals, parts = text.partition("=")
        paths = names(parts)
        if not equals or os.path.exists(names(text)[0]):  # a path may have "=" in it
            paths = names(text)
            label = os.path.basename(os.path.dirname(os.path.abspath(paths[0])))
        if label in runs:
            raise ValueError(
                f"--run {text}: another run is called {label!r} too; give each its own label, "
                f"--run LABEL={','.join(paths)}"
            )
        runs[label] = paths
    return runs


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return text.lower() == "true"


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    drawn = (loss, curve, grid, evolution, beside, compare)
    metavar = "{" + ",".join(draw.__name__ for draw in drawn) + "}"
    commands = parser.add_subparsers(required=True, metavar=metavar)

    def command(draw: Callable, what: str, out: str, more: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(draw.__name__, help=what, description=f"{what}. {more}")
        sub.set_defaults(draw=draw)
        sub.add_argument("--out", required=True, metavar=out, help="the picture to write")
        return sub

    sub = command(loss, "Loss of a run and of its four timestep quartiles", "PNG|PDF")
    sub.add_argument(
        "--progress",
        required=True,
        nargs="+",
        metavar="CSV",
        help="progress.csv, or its parts in any order; repeated steps are the later part's",
    )
    sub.add_argument("--terms", help="columns to draw, e.g. vb_q0,vb_q1 (not given: the losses)")
    sub.add_argument("--smooth", type=float, help="weight of the past in the strong curve, 0 to <1")
    add_axes(sub, "step")

    sub = command(
        curve,
        "One column of the logs of several runs",
        "PNG|PDF",
        "Runs are averaged over the same width of the x axis, whatever their batch sizes.",
    )
    sub.add_argument(
        "--run",
        required=True,
        action="append",
        metavar="[LABEL=]CSV[,CSV]",
        help="a run's progress.csv, or its parts; again for each run (not given: LABEL is the name "
        "of the CSV's folder)",
    )
    sub.add_argument("--term", default="loss_q1", help="the column (default: %(default)s)")
    sub.add_argument(
        "--smooth",
        type=float,
        metavar="WIDTH",
        help="width of the strong curve's average in units of the x axis, 0: none (not given: a "
        "hundredth of the longest run)",
    )
    sub.add_argument("--x_max", type=float, help="leave out what lies beyond (not given: nothing)")
    add_axes(sub, "samples")

    sub = command(grid, "Samples with a column per channel", "PNG")
    sub.add_argument("--samples", required=True, help="sample folder, or the .npz file in it")
    sub.add_argument("--columns", type=int, help="samples across (not given: a near square)")
    add_choice(sub, 0)

    sub = command(
        evolution,
        "Samples of several checkpoints of one run",
        "PNG",
        "A row is a sample number, a block a checkpoint. Drawn with one seed, samples of the same "
        "number begin with the same noise, so a row shows what each checkpoint makes of it.",
    )
    sub.add_argument(
        "--samples",
        required=True,
        nargs="+",
        metavar="DIR",
        help="a sample folder of each checkpoint; they are shown in the order of their steps",
    )
    add_choice(sub, 4)

    sub = command(beside, "Sets of samples beside each other, such as EMA and raw model", "PNG")
    sub.add_argument(
        "--samples",
        required=True,
        nargs="+",
        metavar="DIR",
        help="two or more sample folders, from left to right",
    )
    sub.add_argument("--titles", help="e.g. EMA,raw (not given: the checkpoints' file names)")
    add_choice(sub, 8)

    sub = command(compare, "Real slices beside synthetic ones", "PNG")
    sub.add_argument("--real", required=True, metavar="SLICES", help="slice folder")
    sub.add_argument("--samples", required=True, help="folder that image_sample.py wrote")
    sub.add_argument("--num", type=int, default=8, help="how many of each (default: %(default)s)")
    sub.add_argument(
        "--seed", type=int, default=0, help="chooses the real slices (default: %(default)s)"
    )
    add_masks(sub)
    return parser


def add_axes(sub: argparse.ArgumentParser, x: str) -> None:
    sub.add_argument(
        "--x",
        choices=sorted(plots.X_LABELS),
        default=x,
        help="the x axis: optimizer steps or images seen (default: %(default)s)",
    )
    for flag, default in (("log_x", False), ("log_y", True)):
        sub.add_argument(
            f"--{flag}",
            type=true_or_false,
            default=default,
            metavar="True|False",
            help=f"logarithmic {flag[-1]} axis (default: %(default)s)",
        )


def add_choice(sub: argparse.ArgumentParser, num: int) -> None:
    sub.add_argument(
        "--num", type=int, default=num, help="how many samples, 0: all (default: %(default)s)"
    )
    sub.add_argument(
        "--start", type=int, default=0, help="number of the first one (default: %(default)s)"
    )
    add_masks(sub)


def add_masks(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--masks",
        choices=("labels", "outlines"),
        default="labels",
        help="the mask as a panel of its own, or as outlines over every other channel (default: "
        "%(default)s)",
    )


if __name__ == "__main__":
    cli.run(main)
