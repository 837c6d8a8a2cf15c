"""Draw with several samplers and step counts from one model, and measure how good each set is.

Every set starts from the same noise. Measures, see :mod:`improved_diffusion.evaluation`: the kernel
distance of file-free features to one half of the real slices, which are split by patient; agreement
of the channels' brain outlines; share of samples with a black background; mask pixels off the label
codes and outside the brain. The floor is the other half of the real slices. A set is worse than the
base, ancestral sampling in the most steps, where a measure differs by more than 1.96 standard
errors of the difference; of sets that are as good, chance makes every fortieth worse in a measure.
Writes quality.json and quality.png and prints a table. Sets that are there already are not drawn
again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import brats_dataset
from improved_diffusion import cli, dist_util, execution, sampling, solvers
from improved_diffusion.encodings import GREY
from improved_diffusion.evaluation import distribution, validity
from improved_diffusion.fp16_util import choose_precision
from improved_diffusion.plots import new_figure
from improved_diffusion.script_util import load_model_and_diffusion

SETS = (
    "ancestral:1000 ancestral:250 ancestral:100 ancestral:50 ancestral:20 "
    "ancestral:30:logsnr ancestral:20:logsnr ddim:50 ddim:20 ddim:10 "
    "dpmpp_2m:30 dpmpp_2m:20 dpmpp_2m:15 dpmpp_2m:10 dpmpp_2m:7 dpmpp_2m:5 "
    "dpmpp_2m:20:logsnr dpmpp_2m:15:logsnr dpmpp_2m:10:logsnr dpmpp_2m:7:logsnr dpmpp_2m:5:logsnr "
    "dpmpp_2m:20:karras dpmpp_2m:10:karras dpmpp_2m:20:trailing dpmpp_2m:10:trailing "
    "dpmpp_2m_sde:50 dpmpp_2m_sde:30 dpmpp_2m_sde:20 dpmpp_2m_sde:10 "
    "dpmpp_2m_sde:30:logsnr dpmpp_2m_sde:20:logsnr dpmpp_2m_sde:15:logsnr dpmpp_2m_sde:10:logsnr "
    "dpmpp_2m_sde:20:karras dpmpp_2m_sde:15:karras "
    "unipc:20 unipc:15 unipc:10 unipc:7 unipc:5 unipc:15:logsnr unipc:10:logsnr unipc:7:logsnr "
    "heun:10 heun:8 heun:5 heun:8:karras"
)


def main() -> None:
    args = create_argparser().parse_args()
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    sets = [parse_set(text) for text in args.sets.split()]
    loaded = load_model_and_diffusion(args.model_path)
    draw_missing(loaded, sets, folder, args)
    real = read_real(args.data_dir, loaded.channels, loaded.flags["image_size"])
    rows = measure(sets, folder, real, loaded.channels)
    (folder / "quality.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, str(folder / "quality.png"))
    report(rows)


def parse_set(text: str) -> tuple[str, int, str]:
    """``dpmpp_2m:10`` or ``dpmpp_2m:10:karras`` -> sampler, steps, spacing."""
    sampler, steps, *own = text.split(":")
    sampling.check_sampler(sampler)
    return sampler, int(steps), own[0] if own else "uniform"


def set_name(own: tuple[str, int, str]) -> str:
    return "_".join(map(str, own))


def draw_missing(
    loaded: Any, sets: list[tuple[str, int, str]], folder: Path, args: argparse.Namespace
) -> None:
    """Draw the sets that are not there yet: uint8 [N, H, W, C] each, in a file of its own."""
    device = dist_util.dev()
    dtype, _ = choose_precision(args.precision, device)
    network = execution.for_sampling(loaded.model, dtype, "auto", device, evaluations=10**6)
    size = loaded.flags["image_size"]
    for own in sets:
        path = folder / f"{set_name(own)}.npy"
        if path.exists():
            continue
        sampler, steps, spacing = own
        timesteps = solvers.choose_timesteps(loaded.diffusion, steps, spacing)
        batches = sampling.batches(args.num_samples, args.batch_size)
        levels, off_code = [], []
        for indices in cli.progress(batches, total=len(batches), desc=path.stem, unit="batch"):
            samples = sampling.draw(
                network,
                loaded.diffusion,
                indices,
                (loaded.encoding.width, size, size),
                seed=args.seed,
                device=device,
                sampler=sampler,
                timesteps=timesteps,
            )
            levels.append(sampling.to_levels(loaded.encoding.decode(samples)))
            shares = loaded.encoding.off_code(samples)
            if loaded.encoding.name != GREY and shares is not None:
                off_code += shares.tolist()
        if off_code:
            np.save(off_code_path(path), np.array(off_code))
        np.save(path, np.concatenate(levels))


def off_code_path(path: Path) -> Path:
    """The file of each sample's share of mask pixels off the codes, before decoding."""
    return path.with_name(f"{path.stem}_off_code.npy")


def read_real(data_dir: str, channels: list[str], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of the real slices, by patient: uint8 [N, H, W, C] each."""
    slices = brats_dataset.open_slices(channels, data_dir, "all", image_size=size)
    patients = [Path(files[0]).name.split("_slice_")[0] for files in slices.channel_paths]
    known = sorted(set(patients))
    halves: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for i, patient in enumerate(patients):
        image, _ = slices[i]
        halves[known.index(patient) % 2].append(sampling.to_levels(torch.as_tensor(image)[None])[0])
    return np.stack(halves[0]), np.stack(halves[1])


def measure(
    sets: list[tuple[str, int, str]],
    folder: Path,
    real: tuple[np.ndarray, np.ndarray],
    channels: list[str],
) -> list[dict[str, Any]]:
    """A row of measures for the floor, then one for each set."""
    drawn = [np.load(folder / f"{set_name(own)}.npy") for own in sets]
    chosen = np.random.default_rng(0).permutation(len(real[1]))[: len(drawn[0])]
    arrays = [real[0], real[1][chosen], *drawn]
    reference, *others = distribution.standardise(*map(distribution.features, arrays))
    rows: list[dict[str, Any]] = []
    names = [("real", 0, ""), *sets]
    for (sampler, steps, spacing), levels, own in zip(names, arrays[1:], others):
        rows.append(
            {
                "sampler": sampler,
                "steps": steps,
                "spacing": spacing,
                "evaluations": sampling.evaluations(sampler, steps) if steps else 0,
                "distance": distribution.kernel_distance(own, reference),
                **validity.summary(levels, channels),
            }
        )
        own_off_code = off_code_path(folder / f"{set_name((sampler, steps, spacing))}.npy")
        if own_off_code.exists():  # of decoded masks the levels tell nothing
            rows[-1]["off_code_share"] = validity.mean_interval(np.load(own_off_code))
    base = max((row for row in rows if row["sampler"] == "ancestral"), key=lambda row: row["steps"])
    for row in rows:
        row["worse"] = [name for name in MEASURES if is_worse(row, base, name)]
    return rows


def is_worse(row: dict[str, Any], base: dict[str, Any], name: str) -> bool:
    """Whether a measure differs from the base's for the worse by more than chance explains."""
    if name not in row or name not in base:
        return False
    gap = row[name]["value"] - base[name]["value"]
    error = np.hypot(*((own[name]["high"] - own[name]["low"]) / 3.92 for own in (row, base)))
    sign = MEASURES[name][1]
    return bool((sign * gap if sign else abs(gap)) > 1.96 * error)


# Name: heading, and what is worse: more (1), less (-1) or either (0).
MEASURES = {
    "distance": ("distance", 1),
    "channel_agreement": ("agreement", -1),
    "black_background_share": ("black", -1),
    "off_code_share": ("off code", 1),
    "mask_outside_brain": ("outside", 1),
    "empty_mask_share": ("empty", 0),
    "tumour_area": ("tumour", 0),
}


def report(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table: values with half the width of their 95 % intervals."""
    head = " | ".join(heading for heading, _ in MEASURES.values())
    print(f"| sampler | steps | timesteps | evaluations | {head} | worse in |")
    print("|" + "---|" * (5 + len(MEASURES)))
    for row in rows:
        cells = []
        for name in MEASURES:
            own = row.get(name)
            half = own and (own["high"] - own["low"]) / 2
            cells.append(f"{own['value']:.4f} ± {half:.4f}" if own else "")
        steps = row["steps"] or ""
        verdict = ", ".join(MEASURES[name][0] for name in row["worse"])
        print(
            f"| {row['sampler']} | {steps} | {row['spacing']} | {row['evaluations'] or ''} | "
            f"{' | '.join(cells)} | {verdict} |"
        )


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """The distance of each sampler over its evaluations, with intervals and the floor."""
    figure = new_figure()
    figure.set_size_inches(8, 4.5)
    axes = figure.subplots()
    floor, *others = rows
    samplers = list(dict.fromkeys(row["sampler"] for row in others))
    styles = {"uniform": "o-", "logsnr": "s--", "karras": "^:", "trailing": "v-."}
    for sampler, spacing in dict.fromkeys((row["sampler"], row["spacing"]) for row in others):
        own = [row for row in others if (row["sampler"], row["spacing"]) == (sampler, spacing)]
        own.sort(key=lambda row: row["evaluations"])
        axes.errorbar(
            [row["evaluations"] for row in own],
            [row["distance"]["value"] for row in own],
            yerr=[1.96 * row["distance"]["error"] for row in own],
            fmt=styles[spacing],
            color=f"C{samplers.index(sampler)}",
            markersize=4,
            linewidth=1,
            capsize=2,
            label=f"{sampler}, {spacing}",
        )
    noise = max(floor["distance"]["high"], 0)
    axes.axhspan(0, noise, color="0.85", label="two halves of the real slices")
    axes.set(xscale="log", xlabel="evaluations of the network", ylim=(0, None))
    axes.set_ylabel("kernel distance to real slices")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=100)


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_path", required=True, help="model or average, of named channels")
    parser.add_argument("--data_dir", required=True, help="slice folder of two patients or more")
    parser.add_argument("--out_dir", required=True, help="receives the sets and the results")
    parser.add_argument("--num_samples", type=int, default=128, help="samples of each set")
    parser.add_argument("--batch_size", type=int, default=16, help="samples drawn at a time")
    parser.add_argument("--precision", default="bf16", help="fp32, bf16 or fp16")
    parser.add_argument("--seed", type=int, default=0, help="of the samples' noise")
    parser.add_argument(
        "--sets", default=SETS, help="sampler:steps or sampler:steps:spacing, separated by blanks"
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
