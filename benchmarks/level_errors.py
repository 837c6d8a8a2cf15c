"""How far off the level of a whole channel is in what models predict, at each amount of noise.

Test slices get noise at some timesteps, and every model predicts them. Of each slice and channel
the error is averaged over the pixels first, which leaves its level, and then its root mean square
over the slices is taken. Prints a table in grey levels of 255 and draws it over the signal-to-noise
ratio, which is what timesteps of different schedules have in common.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from improved_diffusion import cli
from improved_diffusion.plots import new_figure
from improved_diffusion.script_util import load_model_and_diffusion
from improved_diffusion.training_data import find_training_data

BATCH = 16


def main() -> None:
    args = create_argparser().parse_args()
    figure = new_figure()
    axes = figure.subplots()
    for path in args.models:
        name, _, file = path.rpartition("=")
        found = level_errors(file, args.data_dir, args.timesteps, args.num_slices)
        print(f"{name or file}\n  t      log10(SNR)   error in grey levels")
        for t, snr, error in found:
            print(f"  {t:<6d} {np.log10(snr):8.2f} {error:14.2f}")
        axes.plot([snr for _, snr, _ in found], [error for *_, error in found], "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="signal-to-noise ratio (noisiest on the right)")
    axes.invert_xaxis()
    axes.set_ylabel("error of a channel's level, in 255")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(args.out, dpi=100)
    print(f"wrote {args.out}")


@torch.no_grad()
def level_errors(
    model_path: str, data_dir: str, timesteps: int, num_slices: int
) -> list[tuple[int, float, float]]:
    """Timestep, signal-to-noise ratio and error of the level in grey levels, least noise first.

    The error is that of the unclipped prediction of x_0, because clipping hides how far off it is.
    """
    loaded = load_model_and_diffusion(model_path)
    model, diffusion = loaded.model.eval(), loaded.diffusion
    data = find_training_data(data_dir, channels=loaded.channels, in_channels=None, split="test")
    dataset = data.dataset(loaded.flags["image_size"])
    chosen = np.linspace(0, len(dataset) - 1, min(num_slices, len(dataset))).astype(int)
    images = loaded.encoding.encode(torch.stack([dataset[int(i)][0] for i in chosen]))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for step in np.linspace(0, diffusion.num_timesteps - 1, timesteps).round().astype(int):
        errors = []
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            t = torch.full((len(images[part]),), int(step))
            x_t = diffusion.q_sample(images[part], t, noise[part])
            predicted = diffusion.predict_xstart(model, x_t, t, clip_denoised=False)
            errors.append((predicted - images[part]).mean(dim=(2, 3)))
        bar = diffusion.alphas_cumprod[step]
        error = torch.cat(errors).square().mean().sqrt().item() * 127.5
        found.append((int(step), float(bar / (1 - bar)), error))
    return found


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--data_dir", required=True, help="slice folder with dataset.json")
    parser.add_argument("--out", default="level_errors.png", help="picture to write")
    parser.add_argument("--timesteps", type=int, default=12, help="how many, evenly spread")
    parser.add_argument("--num_slices", type=int, default=48, help="test slices")
    return parser


if __name__ == "__main__":
    cli.run(main)
