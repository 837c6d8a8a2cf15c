"""Line plots from progress.csv: the loss terms of one run, and one term of several runs.

Every curve is drawn faintly as logged and strongly when smoothed. Colours are those of Okabe and
Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from improved_diffusion.figures import check_extension, short_number
from improved_diffusion.files import atomic_write
from improved_diffusion.logger import read_progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUARTERS = {
    "q0": "t in the first quarter (least noise)",
    "q1": "t in the second quarter",
    "q2": "t in the third quarter",
    "q3": "t in the last quarter (most noise)",
}
LOSS_CURVES = {"loss": "all t", **{f"loss_{q}": f"{q}: {text}" for q, text in QUARTERS.items()}}
X_LABELS = {"step": "optimizer steps", "samples": "images seen"}

# In an order that keeps neighbours apart; the palette's yellow is too faint on white.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
LINE_STYLES = ("-", "--", ":")  # for the curves after the last colour

MAX_COLUMN = 45  # letters of a label that leave room for a second column of labels

XAxis = Literal["step", "samples"]


@dataclass(frozen=True)
class Curve:
    """What is drawn for one curve: arrays [rows] of its points."""

    label: str
    x: np.ndarray
    logged: np.ndarray
    smoothed: np.ndarray


def join_progress(paths: Sequence[str]) -> list[dict[str, float]]:
    """Join the parts of one run's progress.csv, in whatever order they are given.

    A resumed run repeats the steps since its checkpoint. The repeated steps are taken from the
    later part, the one that starts at the larger step, because that is the work that counted.

    :returns: rows as of :func:`improved_diffusion.logger.read_progress`, of increasing ``step``.
    :raises ValueError: a file that is missing or has no ``step``.
    """
    parts = []
    for path in paths:
        rows = read_progress(path)
        if not rows or any("step" not in row for row in rows):
            raise ValueError(
                f"{path} is not a training log: expected rows that each have a number under step"
            )
        parts.append(rows)
    joined: list[dict[str, float]] = []
    for rows in sorted(parts, key=lambda rows: rows[0]["step"]):
        for row in rows:
            while joined and joined[-1]["step"] >= row["step"]:
                joined.pop()
            joined.append(row)
    return joined


def smoothed(values: np.ndarray, smooth: float) -> np.ndarray:
    """Exponential moving average of a curve [rows] of any length.

    The weight of the past starts small and grows to ``smooth`` ((1 + n) / (10 + n) after n rows),
    so that the steep start of a loss curve is followed instead of being dragged along.

    :param smooth: weight of the past, 0 (no smoothing) to below 1.
    """
    out = np.empty(len(values))
    average = 0.0
    for n, value in enumerate(values):
        past = min(smooth, (1 + n) / (10 + n)) if n else 0.0
        average = past * average + (1 - past) * value
        out[n] = average
    return out


def smoothed_over(x: np.ndarray, values: np.ndarray, width: float) -> np.ndarray:
    """Exponential moving average of a curve over a width in units of ``x``, not in rows.

    So curves whose rows stand for different amounts of training become comparable: a log with a
    row every 70 images is averaged over as many images as one with a row every 1,280. A value's
    weight falls by a factor of e for every ``width`` that x goes on. As in :func:`smoothed` the
    width grows with the run, here as a tenth of the way from its first point, up to ``width``.

    :param x: increasing [rows].
    :param values: [rows].
    :param width: 0 is no smoothing.
    :returns: [rows].
    """
    out = np.empty(len(values))
    average = 0.0
    for n, value in enumerate(values):
        reach = min(width, (x[n] - x[0]) / 10)
        past = np.exp(-(x[n] - x[n - 1]) / reach) if reach else 0.0
        average = past * average + (1 - past) * value
        out[n] = average
    return out


def loss_curves(
    progress_csv: Sequence[str],
    *,
    smooth: float | None = None,
    x: XAxis = "step",
    log_x: bool = False,
    terms: Sequence[str] | None = None,
) -> list[Curve]:
    """The curves of :func:`loss_plot`, whose parameters these are.

    :returns: a curve per term that the log has, without values that are not finite and, with
        ``log_x``, without the rows at x = 0.
    """
    if smooth is not None and not 0 <= smooth < 1:
        raise ValueError(f"smooth is {smooth}: give a weight from 0 (none) to below 1")
    rows = join_progress(progress_csv)
    what = ", ".join(progress_csv)
    if terms is None:
        labels = {term: label for term, label in LOSS_CURVES.items() if _has(rows, x, term)}
        if not labels:
            raise ValueError(
                f"{what}: no row has {x} and one of {', '.join(LOSS_CURVES)}, so there is nothing "
                "to plot"
            )
    else:
        labels = {term: _term_label(term) for term in terms}
    curves = []
    for term, label in labels.items():
        at, values = _points(rows, x, term, what, log_x=log_x)
        past = 1 - 1 / max(1, len(values) / 100) if smooth is None else smooth
        curves.append(Curve(label, at, values, smoothed(values, past)))
    return curves


def loss_plot(
    progress_csv: Sequence[str],
    out_path: str,
    *,
    smooth: float | None = None,
    x: XAxis = "step",
    log_x: bool = False,
    log_y: bool = True,
    terms: Sequence[str] | None = None,
) -> None:
    """Plot the loss and its four timestep quartiles over a run, as the report's figure 8 does.

    :param progress_csv: the run's progress.csv, or its parts; see :func:`join_progress`.
    :param out_path: ends in ``.png`` or ``.pdf``; written atomically.
    :param smooth: see :func:`smoothed`; not given: an average over about a hundredth of the run.
    :param x: the horizontal axis, optimizer steps or images seen.
    :param log_x: logarithmic horizontal axis, without the rows at x = 0.
    :param log_y: logarithmic vertical axis.
    :param terms: the log's columns to draw; not given: the loss and its quartiles.
    :raises ValueError: matplotlib is not installed, the files have no such columns, or another
        extension.
    """
    check_extension(out_path, ("png", "pdf"))
    curves = loss_curves(progress_csv, smooth=smooth, x=x, log_x=log_x, terms=terms)
    what = "training loss" if terms is None else "value"
    save_figure(_draw(curves, X_LABELS[x], what, log_x=log_x, log_y=log_y), out_path)


def run_curves(
    runs: Mapping[str, Sequence[str]],
    *,
    term: str = "loss_q1",
    x: XAxis = "samples",
    smooth: float | None = None,
    log_x: bool = False,
    x_max: float | None = None,
) -> list[Curve]:
    """The curves of :func:`curve_plot`, whose parameters these are, one per run."""
    if smooth is not None and smooth < 0:
        raise ValueError(
            f"smooth is {smooth}: give a width of 0 (none) or more in units of the x axis"
        )
    points = {}
    for label, paths in runs.items():
        what = f"run {label} ({', '.join(paths)})"
        points[label] = _points(join_progress(paths), x, term, what, log_x=log_x, x_max=x_max)
        if (np.diff(points[label][0]) <= 0).any():
            raise ValueError(
                f"{what}: {x} does not increase from row to row, as after a change of the batch "
                "size; choose --x step"
            )
    if smooth is None:
        smooth = max(at[-1] for at, _ in points.values()) / 100
    return [
        Curve(label, at, values, smoothed_over(at, values, smooth))
        for label, (at, values) in points.items()
    ]


def curve_plot(
    runs: Mapping[str, Sequence[str]],
    out_path: str,
    *,
    term: str = "loss_q1",
    x: XAxis = "samples",
    smooth: float | None = None,
    log_x: bool = False,
    log_y: bool = True,
    x_max: float | None = None,
) -> None:
    """Plot one column of several runs' logs, as the report's figures 7 and 11 do.

    :param runs: label -> the run's progress.csv, or its parts; see :func:`join_progress`.
    :param out_path: ends in ``.png`` or ``.pdf``; written atomically.
    :param term: the column.
    :param x: the horizontal axis, optimizer steps or images seen.
    :param smooth: width of the average in units of x, the same for every run, because rows of
        runs with different batch sizes stand for different numbers of images; see
        :func:`smoothed_over`. Not given: a hundredth of the longest run that is shown.
    :param log_x: logarithmic horizontal axis, without the rows at x = 0.
    :param log_y: logarithmic vertical axis.
    :param x_max: rows beyond it are left out.
    :raises ValueError: matplotlib is not installed, a run's log has no such column or no row to
        show, or another extension.
    """
    check_extension(out_path, ("png", "pdf"))
    curves = run_curves(runs, term=term, x=x, smooth=smooth, log_x=log_x, x_max=x_max)
    save_figure(_draw(curves, X_LABELS[x], _term_label(term), log_x=log_x, log_y=log_y), out_path)


def _term_label(term: str) -> str:
    """``"vb_q1"`` -> ``"vb_q1: t in the second quarter"``; other names as they are."""
    quarter = QUARTERS.get(term.rpartition("_")[2])
    return f"{term}: {quarter}" if quarter else term


def _has(rows: Sequence[Mapping[str, float]], x: str, term: str) -> bool:
    return any(x in row and term in row for row in rows)


def _points(
    rows: Sequence[Mapping[str, float]],
    x: str,
    term: str,
    what: str,
    *,
    log_x: bool,
    x_max: float | None = None,
) -> np.ndarray:
    """x and the term's values where both are finite: [2, points]. ``what`` names the log."""
    if not _has(rows, x, term):
        known = sorted({key for row in rows for key in row})
        raise ValueError(
            f"{what}: no row has {x} and {term}, so it cannot be plotted; the log has "
            f"{', '.join(known)}"
        )
    points = np.array([(row[x], row[term]) for row in rows if x in row and term in row]).T
    shown = np.isfinite(points).all(axis=0)
    if log_x:
        shown &= points[0] > 0
    if x_max is not None:
        shown &= points[0] <= x_max
    if not shown.any():
        end = "" if x_max is None else f" up to {x_max:g}"
        raise ValueError(
            f"{what}: no row has a number under {term} at {x}{end} that can be drawn; choose other "
            "columns or limits"
        )
    return points[:, shown]


def _draw(
    curves: Sequence[Curve], x_label: str, y_label: str, *, log_x: bool, log_y: bool
) -> Figure:
    figure = new_figure()
    axes = figure.add_subplot()
    for index, curve in enumerate(curves):
        style = LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
        colour = COLOURS[index % len(COLOURS)]
        # Pixels for the many thousand faint points keep a PDF small; text and curves stay lines.
        axes.plot(curve.x, curve.logged, color=colour, alpha=0.25, linewidth=0.5, rasterized=True)
        axes.plot(curve.x, curve.smoothed, style, color=colour, linewidth=1.6, label=curve.label)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(f"{y_label} (faint: as logged)")
    axes.xaxis.set_major_formatter(lambda value, position: short_number(value))
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    columns = 2 if max(len(curve.label) for curve in curves) <= MAX_COLUMN else 1
    figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize="small")
    return figure


def new_figure() -> Figure:
    """An empty figure.

    :raises ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "plots need matplotlib, which is not installed: pip install 'improved-diffusion[plots]'"
        ) from error
    # A Figure of its own, not pyplot: no window system, no global state.
    return Figure(figsize=(7, 4.6), layout="constrained")


def save_figure(figure: Figure, path: str) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=check_extension(path, ("png", "pdf")), dpi=200)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
