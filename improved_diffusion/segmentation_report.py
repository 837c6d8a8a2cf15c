"""What the trainings of ``segmentation_eval.py`` show: numbers, tables and pictures.

Legend: P test patients, R regions, H rows, W columns.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import blobfile as bf
import numpy as np

from improved_diffusion import __version__, brats, figures, plots
from improved_diffusion.evaluation import segmentation
from improved_diffusion.evaluation.intervals import mean_interval
from improved_diffusion.evaluation.segmentation import REGIONS, Data, Slices
from improved_diffusion.files import atomic_write

REFERENCE = "real"  # the arm that the others are compared with
EXAMPLES = 6
SIGNIFICANT = 0.05


def write_results(
    out_dir: str, settings: dict[str, Any], data: Data, runs: Sequence[dict[str, Any]]
) -> None:
    """Write and print what all trainings together show.

    :param settings: what determined them, as ``segmentation.json`` tells it.
    :param runs: what each training gave: its arm, seed, slices, loss, Dice and examples.
    """
    results = summarise(settings, data, runs)
    scores = patient_scores(runs)
    _write(bf.join(out_dir, "segmentation.json"), (json.dumps(results, indent=1) + "\n").encode())
    _write(bf.join(out_dir, "segmentation.csv"), long_table(runs).encode())
    _write(bf.join(out_dir, "dice.png"), draw_scores(scores, results["counts"]["seeds"]))
    draw_examples(data, runs, bf.join(out_dir, "examples.png"))
    print(report(results), flush=True)
    print(f"wrote {out_dir}", flush=True)


def summarise(
    settings: dict[str, Any], data: Data, runs: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The content of ``segmentation.json``; arguments as of :func:`write_results`."""
    scores = patient_scores(runs)
    packages = ("torch", "monai", "scipy", "numpy")
    kept = ("arm", "seed", "slices", "replaced_patients", "loss", "dice")
    return {
        "settings": settings,
        "versions": {
            "improved_diffusion": __version__,
            **{name: version(name) for name in packages},
        },
        "empty_regions": segmentation.EMPTY_RULE,
        "counts": {
            "training_patients": len(set(data.real.patients)),
            "training_slices": len(data.real),
            "synthetic_slices": len(data.synthetic),
            "test_patients": len(set(data.test.patients)),
            "test_slices": len(data.test),
            "test_patients_without": segmentation.patients_without(
                data.test.classes, data.test.patients
            ),
            "seeds": len({run["seed"] for run in runs}),
        },
        "mean_dice": {
            arm: {name: mean_interval(own[:, i]) for i, name in enumerate(REGIONS)}
            for arm, own in scores.items()
        },
        "comparisons": comparisons(runs),
        "runs": [{key: run[key] for key in kept} for run in runs],
    }


def all_scores(runs: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Arm -> Dice [seeds, P, R]."""
    found: dict[str, list[list[list[float]]]] = {}
    for run in runs:
        scores = [[own[name] for name in REGIONS] for own in run["dice"].values()]
        found.setdefault(run["arm"], []).append(scores)
    return {arm: np.array(own) for arm, own in found.items()}


def patient_scores(runs: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Arm -> Dice [P, R] of every test patient, the mean over the arm's seeds."""
    return {arm: own.mean(axis=0) for arm, own in all_scores(runs).items()}


def comparisons(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every arm against the reference, region by region, see :func:`segmentation.compare`.

    ``p_holm`` is corrected for the number of these comparisons. ``seed_differences`` are those of
    the mean over the patients, seed by seed: the test takes the trainings as they are, and one that
    was lucky is better on all patients.
    """
    scores = all_scores(runs)
    others = [arm for arm in scores if arm != REFERENCE and REFERENCE in scores]
    found = []
    for arm, (i, name) in itertools.product(others, enumerate(REGIONS)):
        own, real = scores[arm][..., i], scores[REFERENCE][..., i]  # [seeds, P]
        found.append(
            {
                "arm": arm,
                "against": REFERENCE,
                "region": name,
                **segmentation.compare(own.mean(axis=0), real.mean(axis=0)),
                "seed_differences": (own.mean(axis=1) - real.mean(axis=1)).tolist(),
            }
        )
    for row, p in zip(found, segmentation.holm([row["p"] for row in found])):
        row["p_holm"] = p
    return found


def choose_examples(test: Slices) -> list[int]:
    """Of the first test patients with a tumour, the slice that shows most of it, by number."""
    areas = (test.classes > 0).sum(axis=(1, 2))
    largest: dict[str, int] = {}
    for i in np.flatnonzero(areas).tolist():
        best = largest.setdefault(test.patients[i], i)
        if areas[i] > areas[best]:
            largest[test.patients[i]] = i
    return list(largest.values())[:EXAMPLES]


# ------------------------------------------------------------------------------------------ tables


def long_table(runs: Sequence[dict[str, Any]]) -> str:
    """A CSV with a row for each Dice."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "seed", "patient", "region", "dice"])
    for run in runs:
        for patient, own in run["dice"].items():
            writer.writerows(
                [run["arm"], run["seed"], patient, name, value] for name, value in own.items()
            )
    return text.getvalue()


def report(results: dict[str, Any]) -> str:
    """The means and the comparisons of :func:`summarise` as tables, with their limits in words."""
    counts, compared = results["counts"], results["comparisons"]
    patients = counts["test_patients"]
    lines = [
        f"Dice, mean over the test patients ({patients}), of each the mean over the seeds "
        f"({counts['seeds']}) [95 % interval over the patients]",
        "",
        f"| trained on | {' | '.join(REGIONS)} |",
        f"|{'---|' * (len(REGIONS) + 1)}",
    ]
    for arm, own in results["mean_dice"].items():
        cells = [f"{x['value']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" for x in own.values()]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    if compared:
        lines += [
            "",
            f"| against {REFERENCE} | region | median difference [95 % interval] | p | p (Holm) | "
            "mean difference by seed |",
            "|---|---|---|---|---|---|",
        ]
    for row in compared:
        by_seed = " ".join(f"{difference:+.3f}" for difference in row["seed_differences"])
        lines.append(
            f"| {row['arm']} | {row['region']} | {row['median_difference']:+.3f} "
            f"[{row['low']:+.3f}, {row['high']:+.3f}] | {row['p']:.4f} | {row['p_holm']:.4f} | "
            f"{by_seed} |"
        )
    without = [f"{name} {n}" for name, n in counts["test_patients_without"].items() if n]
    lines += ["", results["empty_regions"]]
    lines.append(f"Test patients who show none: {', '.join(without) or 'of no region'}.")
    if compared:
        lines.append(
            "p: Wilcoxon's signed-rank test of the patients' pairs, two-sided. It takes the "
            "trainings as they are: a difference no larger than those between seeds is chance."
        )
    least = 2 / 2**patients
    if compared and least > SIGNIFICANT:
        lines.append(
            f"With so few test patients ({patients}) p cannot fall below {least:.3g}: no "
            f"difference can be significant at {SIGNIFICANT}."
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- pictures


def draw_scores(scores: dict[str, np.ndarray], seeds: int) -> bytes:
    """For every region a box for each arm, with the patients' scores as points: a PNG.

    A box goes from the lower to the upper quartile, its line is the median.

    :param scores: arm -> Dice [P, R].
    :param seeds: of which a score is the mean.
    """
    figure = plots.new_figure()
    figure.set_size_inches(9, 4.6)
    axes = figure.add_subplot()
    width = 0.8 / len(scores)
    for k, (arm, own) in enumerate(scores.items()):
        colour = plots.COLOURS[k % len(plots.COLOURS)]
        places = np.arange(len(REGIONS)) + (k - (len(scores) - 1) / 2) * width
        lines = {key: {"color": colour} for key in ("boxprops", "whiskerprops", "capprops")}
        axes.boxplot(
            own,
            positions=places,
            widths=0.75 * width,
            manage_ticks=False,
            showfliers=False,
            medianprops={"color": colour, "linewidth": 2},
            **lines,
        )
        aside = np.linspace(-0.25, 0.25, len(own))[:, None] * width  # points beside each other
        axes.plot(places + aside, own, ".", color=colour, alpha=0.5, markersize=4)
        axes.plot([], [], "s", color=colour, label=arm)
    axes.set_xticks(range(len(REGIONS)), REGIONS)
    lowest = min(own.min() for own in scores.values())
    axes.set_ylim(np.floor(10 * lowest) / 10 - 0.01, 1.01)
    axes.set_ylabel(f"Dice of a test patient, mean of {seeds} seed{'s' if seeds > 1 else ''}")
    axes.grid(True, axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def draw_examples(data: Data, runs: Sequence[dict[str, Any]], path: str) -> None:
    """A row for each example: the slice with the true outlines, then with each arm's.

    Of an arm's trainings the first is shown.
    """
    chosen = choose_examples(data.test)
    shown = "T1CE" if "T1CE" in data.channels else data.channels[0]
    images = data.test.images[chosen, data.channels.index(shown)]  # [examples, H, W]
    classes = {"truth": data.test.classes[chosen]}
    for run in runs:
        digits = np.frombuffer("".join(run["examples"]).encode(), np.uint8) - ord("0")
        classes.setdefault(run["arm"], digits.reshape(images.shape))
    codes = np.array(brats.MASK_CODES, np.uint8)
    sets = [np.stack([codes[own], images], axis=-1) for own in classes.values()]
    names = [brats.MASK_CHANNEL, shown]
    picture = figures.evolution_grid(sets, list(classes), names, masks="outlines")
    figures.save_grid(picture, path)


def _write(path: str, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)
