"""Train one network in several ways from one seed, and compare the losses.

The ways: float32; bfloat16; torch.compile; activation checkpointing; and, for the noise, float32
with another seed. Runs from one seed see the same images, timesteps and noise, so that their
losses differ by rounding alone. Draws loss_curves.png and prints the mean loss of the last third.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from improved_diffusion import cli
from improved_diffusion.logger import read_progress
from improved_diffusion.plots import curve_plot

ROOT = Path(__file__).resolve().parent.parent
NETWORK = (
    "--image_size 64 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1,2,4 "
    "--attention_resolutions 8 --num_heads 1 --noise_schedule cosine --learn_sigma True "
    "--channels T1CE,Seg --batch_size 8 --lr 1e-3 --ema_rate 0.99 --dropout 0.1 "
    "--log_interval 1 --save_interval 0 --sample_interval 0"
).split()
WAYS = {
    "fp32": "--precision fp32 --compile off",
    "bf16": "--precision bf16 --compile off",
    "fp32, compiled": "--precision fp32 --compile on",
    "fp32, checkpointed": "--precision fp32 --compile off --use_checkpoint True",
    "fp32, another seed": "--precision fp32 --compile off --seed 1",
}


def main() -> None:
    args = create_argparser().parse_args()
    folder = Path(args.out_dir)
    logs = {}
    for name, flags in WAYS.items():
        run = folder / name.replace(", ", "_").replace(" ", "_")
        logs[name] = [str(run / "progress.csv")]
        if (run / f"model{args.steps:06d}.pt").exists():
            continue
        command = [sys.executable, str(ROOT / "scripts/image_train.py"), *NETWORK, *flags.split()]
        command += ["--data_dir", args.data_dir, "--max_steps", str(args.steps)]
        command += ["--out_dir", str(run), "--resume_checkpoint", "latest"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    losses = {
        name: np.array([row["loss"] for row in read_progress(paths[0])])
        for name, paths in logs.items()
    }
    last = args.steps - args.steps // 3
    base = losses["fp32"]
    print(f"{'':20} {'loss':>9} {'to fp32':>9} {'in a step':>10}")
    for name, own in losses.items():
        ratio = own[last:].mean() / base[last:].mean() - 1
        each = np.median(np.abs(own[last:] / base[last:] - 1))
        print(f"{name:20} {own[last:].mean():9.5f} {ratio:+9.2%} {each:10.2%}")
    curve_plot(logs, str(folder / "loss_curves.png"), term="loss", x="step")
    print(f"wrote {folder / 'loss_curves.png'}")


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", required=True, help="slice folder with T1CE and Seg")
    parser.add_argument("--out_dir", required=True, help="receives a run for each way")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    return parser


if __name__ == "__main__":
    cli.run(main)
