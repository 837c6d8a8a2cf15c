"""What ``ema_posthoc.py`` does: stored power averages to averages of other lengths."""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import blobfile as bf
import numpy as np
import torch

from improved_diffusion import checkpoint, cli
from improved_diffusion.power_ema import gamma_of, parse_sigma_rels, posthoc_weights
from improved_diffusion.script_util import FIXED_BY_TRAINING, add_dict_to_argparser

# Flag: default and explanation.
FLAGS: dict[str, tuple[Any, str]] = {
    "run_dir": ("", "folder of a run that was trained with --ema_sigma_rel"),
    "sigma_rel": (
        "",
        "lengths of the averages to make, as shares of the training, separated by commas, e.g. "
        "0.03,0.08,0.15",
    ),
    "step": (0, "step of the run at which to take them, one with snapshots; 0: the last"),
    "out": (
        "",
        "file to write, for one length (default: ema_posthoc_<sigma_rel>_<step>.pt in --run_dir)",
    ),
}

# Relative errors of the profile: worth a warning, and too large to be called the wanted average.
NOTABLE_ERROR, LARGEST_ERROR = 0.05, 0.5


def reconstruct(description: str) -> None:
    """Read the command line, and write a weight file for each length.

    Everything but the snapshots' contents is checked before they are read, and all of them before
    anything is written.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    defaults = {name: default for name, (default, _) in FLAGS.items()}
    add_dict_to_argparser(parser, defaults, {name: text for name, (_, text) in FLAGS.items()})
    args = parser.parse_args()
    lengths = parse_sigma_rels("--sigma_rel", args.sigma_rel)
    if not args.run_dir or not lengths:
        missing = "--sigma_rel" if args.run_dir else "--run_dir"
        raise ValueError(f"{missing} is missing; give --run_dir run --sigma_rel 0.08, for example")
    step, snapshots = _find_snapshots(args.run_dir, args.step)
    paths = _outputs(args, lengths, step)

    times = [own for own, _ in snapshots]
    gammas = [gamma_of(length) for _, length in snapshots]
    weights = []
    for length in lengths:
        own, error = posthoc_weights(times, gammas, step, gamma_of(length))
        _check_error(args, length, step, len(snapshots), error)
        weights.append(own)
    averages, metadata = combine(args.run_dir, snapshots, np.stack(weights))
    for length, path, average in zip(lengths, paths, averages):
        about = {**metadata, "sigma_rel": length, "posthoc": True}
        checkpoint.save(checkpoint.with_metadata(average, about), path)
        print(f"wrote {path}")


def _find_snapshots(run_dir: str, step: int) -> tuple[int, list[tuple[int, float]]]:
    """The step to take the averages at, and step and length of the snapshots up to there."""
    found = checkpoint.snapshots(run_dir)
    if not found:
        raise ValueError(
            f"--run_dir {run_dir} holds no snapshots of averages (ema_p*.pt); name the folder of a "
            "run that was trained with --ema_sigma_rel 0.05,0.10"
        )
    steps = sorted({own for own, _ in found})
    step = step or steps[-1]
    if step not in steps:
        nearest = sorted(sorted(steps, key=lambda own: abs(own - step))[:2])
        raise ValueError(
            f"--step {step}: {run_dir} has no snapshots of this step; the nearest are of step "
            f"{' and '.join(map(str, nearest))}"
        )
    return step, [(own, length) for own, length in found if own <= step]


def _outputs(args: argparse.Namespace, lengths: Sequence[float], step: int) -> list[str]:
    if args.out and len(lengths) > 1:
        raise ValueError(
            f"--out {args.out} names one file, but --sigma_rel {args.sigma_rel} makes "
            f"{len(lengths)}; leave --out out, or give one length"
        )
    names = [checkpoint.posthoc_name(length, step) for length in lengths]
    paths = [args.out] if args.out else [bf.join(args.run_dir, name) for name in names]
    for path in paths:
        if bf.exists(path):
            raise ValueError(
                f"{path} is there already, and nothing is overwritten; remove it, or choose "
                "another --out"
            )
    return paths


def _check_error(
    args: argparse.Namespace, length: float, step: int, number: int, error: float
) -> None:
    """Tell how close the reconstruction comes.

    :raises ValueError: not close enough to be worth its name.
    """
    text = f"sigma_rel {length} at step {step} from {number} snapshots: {error:.2%} off"
    if error > LARGEST_ERROR or (number == 1 and error > 1e-6):
        raise ValueError(
            f"--sigma_rel {args.sigma_rel}: the snapshots in {args.run_dir} cannot express this "
            f"({text}); choose lengths near those that were stored, a later --step, or train with "
            "more snapshots (--ema_snapshot_interval)"
        )
    print(text)
    if error > NOTABLE_ERROR:
        print(
            f"warning: sigma_rel {length} is only roughly expressed by the snapshots; lengths "
            "near the stored ones, or more snapshots, come closer",
            file=sys.stderr,
        )


def combine(
    run_dir: str, snapshots: Sequence[tuple[int, float]], weights: np.ndarray
) -> tuple[list[OrderedDict[str, torch.Tensor]], dict[str, Any]]:
    """Sums of stored averages, which are read one after the other and added up in float64.

    :param snapshots: N steps and lengths.
    :param weights: [M, N]: a row for each sum.
    :return: M state dicts in the snapshots' types, and the newest snapshot's metadata. What is no
        floating-point number is the newest snapshot's.
    :raises ValueError: a snapshot that is damaged, or of another run.
    """
    order = sorted(range(len(snapshots)), key=lambda i: snapshots[i], reverse=True)
    first, types, metadata = "", {}, {}
    sums: list[OrderedDict[str, torch.Tensor]] = []
    for i in cli.progress(order, total=len(order), desc="reading", unit="snapshot"):
        step, length = snapshots[i]
        path = bf.join(run_dir, checkpoint.snapshot_name(length, step))
        content = checkpoint.load_weights(path)
        about = checkpoint.metadata_of(content)
        if (about.get("step"), about.get("sigma_rel")) != (step, length):
            raise ValueError(
                f"{path} is not what its name says: it holds sigma_rel {about.get('sigma_rel')} "
                f"of step {about.get('step')}; restore it, or move it away"
            )
        if not sums:
            first, metadata = path, about
            types = {name: (value.shape, value.dtype) for name, value in content.items()}
            sums = [_zeros(content) for _ in weights]
        elif _trained_as(about) != _trained_as(metadata) or types != {
            name: (value.shape, value.dtype) for name, value in content.items()
        }:
            raise ValueError(
                f"{path} is of another network or run than {first}; move away what does not "
                "belong to the run"
            )
        for total, weight in zip(sums, weights[:, i]):
            for name, value in content.items():
                if value.is_floating_point():
                    total[name].add_(value, alpha=float(weight))
        del content  # before the next one is read
    for total in sums:
        for name, value in total.items():
            total[name] = value.to(types[name][1])
    return sums, metadata


def _zeros(content: OrderedDict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    zeros = checkpoint.with_metadata(content, {})
    for name, value in content.items():
        if value.is_floating_point():
            zeros[name] = torch.zeros_like(value, dtype=torch.float64)
    return zeros


def _trained_as(metadata: dict[str, Any]) -> list[Any]:
    """What stays the same in a run, however it is continued."""
    flags = metadata.get("flags", {})
    same = [flags.get(name) for name in FIXED_BY_TRAINING]
    return [*same, metadata.get("channels"), metadata.get("classes")]
