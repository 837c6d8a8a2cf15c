"""Draw figures from the files that training and sampling write."""

import argparse

import numpy as np

from improved_diffusion import brats, cli, figures


def main() -> None:
    args = create_argparser().parse_args()
    args.draw(args)
    print(f"wrote {args.out}")


def loss(args: argparse.Namespace) -> None:
    figures.loss_plot(args.progress, args.out, smooth=args.smooth, x=args.x)


def grid(args: argparse.Namespace) -> None:
    samples, channels = figures.read_samples(args.samples)
    if not 0 <= args.num <= len(samples):
        raise ValueError(f"--num {args.num} of {len(samples)} samples: choose up to {len(samples)}")
    figures.save_grid(figures.sample_grid(samples[: args.num or None], channels), args.out)


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
    names = brats.parse_channels(",".join(channels))
    samples = samples[..., [channels.index(name) for name in names]]
    slices = brats_dataset.load_channels_from_dir(
        paths, image_size=samples.shape[1], channels=names
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
    figures.compare_grid(real, samples[: args.num], names, args.out)


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{loss,grid,compare}")

    def command(draw, what, out):  # noqa: ANN001
        sub = commands.add_parser(draw.__name__, help=what, description=what)
        sub.set_defaults(draw=draw)
        sub.add_argument("--out", required=True, metavar=out, help="the picture to write")
        return sub

    sub = command(loss, "loss of a run and of its four timestep quartiles", "PNG|PDF")
    sub.add_argument(
        "--progress", required=True, nargs="+", metavar="CSV", help="progress.csv, or its parts"
    )
    sub.add_argument("--x", choices=sorted(figures.X_LABELS), default="step", help="the x axis")
    sub.add_argument("--smooth", type=float, help="weight of the past in the strong curve, 0 to <1")

    sub = command(grid, "samples with a column per channel", "PNG")
    sub.add_argument("--samples", required=True, help="samples_*.npz, or the folder it is in")
    sub.add_argument("--num", type=int, default=0, help="only the first NUM samples (0: all)")

    sub = command(compare, "real slices beside synthetic ones", "PNG")
    sub.add_argument("--real", required=True, metavar="SLICES", help="slice folder")
    sub.add_argument("--samples", required=True, help="folder that image_sample.py wrote")
    sub.add_argument("--num", type=int, default=8, help="how many of each")
    sub.add_argument("--seed", type=int, default=0, help="chooses the real slices")
    return parser


if __name__ == "__main__":
    cli.run(main)
