"""Pictures of an evaluation: nearness to training slices, the worst pairs, flagged samples.

As all pictures of samples these show the absolute grey range, and masks through the label palette,
see :mod:`improved_diffusion.figures`.

Legend: N samples, M training slices, H, W height and width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from improved_diffusion import figures, plots
from improved_diffusion.brats import MASK_CHANNEL, MASK_CODES
from improved_diffusion.evaluation.memorisation import Nearest, Neighbours, flipped
from improved_diffusion.evaluation.validity import ALL_IMAGES
from improved_diffusion.figures import BLOCK_GAP, INK, MIN_PANEL, PANEL_GAP, PAPER, colour_panel

BINS = 60
# Rows of a sheet; more are too small to see when a sheet is shown whole.
ROWS = 20


def similarity_figure(
    samples: Nearest,
    held_out: Nearest,
    found: dict[str, Any],
    path: str,
    *,
    features: tuple[Neighbours, Neighbours] | None = None,
) -> None:
    """Plot how near the samples and the held-out slices come to the training slices.

    A panel for the joint correlation, one for each channel's and one for the features' distance:
    both distributions, as shares of each set, and the threshold.

    :param found: what :func:`improved_diffusion.evaluation.memorisation.report` found of them.
    :param features: as given to it.
    :param path: ends in ``.png`` or ``.pdf``; written atomically.
    :raises ValueError: matplotlib is not installed, or another extension.
    """
    panels = [("all images", samples.joint, held_out.joint, found["joint"])]
    for name, own in samples.channels.items():
        panels.append((name, own, held_out.channels[name], found["channels"][name]))
    if features is not None:
        panels.append(("features", *features, found["features"]))
    panels = [panel for panel in panels if "threshold" in panel[-1]]
    columns = min(len(panels), 3)
    rows = max(1, math.ceil(len(panels) / 3))
    figure = plots.new_figure()
    figure.set_size_inches(0.6 + 3.4 * max(2, columns), 0.6 + 2.7 * rows)
    for number, (name, own, others, numbers) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        _similarity_panel(axes, own, others, numbers["threshold"], labelled=number == 0)
        share = numbers["share"]
        beyond = f"{share['value']:.1%} [{share['low']:.1%}, {share['high']:.1%}] nearer"
        axes.set_title(f"{name}: {beyond}", fontsize="small")
        what = "distance to" if own.distance else "correlation with"
        axes.set_xlabel(f"{what} the nearest training slice", fontsize="small")
    if panels:
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    plots.save_figure(figure, path)


def _similarity_panel(
    axes: Any, samples: Neighbours, held_out: Neighbours, threshold: float, *, labelled: bool
) -> None:
    own, others = (values[np.isfinite(values)] for values in (samples.value, held_out.value))
    low, high = min(own.min(), others.min()), max(own.max(), others.max())
    edges = np.linspace(low, high, BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
    for values, options in (
        (others, {"color": "#999999", "histtype": "stepfilled", "label": "held-out slices"}),
        (own, {"color": "#D55E00", "histtype": "step", "linewidth": 1.4, "label": "samples"}),
    ):
        if not labelled:
            options["label"] = None
        axes.hist(values, edges, weights=np.full(len(values), 1 / len(values)), **options)
    label = "99 % of the held-out slices are less near" if labelled else None
    axes.axvline(threshold, color="#0072B2", linestyle="--", linewidth=1.2, label=label)
    axes.set_yticks([])
    axes.tick_params(labelsize="small")
    axes.spines[["top", "right", "left"]].set_visible(False)


def pairs_sheet(
    samples: np.ndarray,
    train: np.ndarray,
    channels: Sequence[str],
    pairs: Sequence[dict[str, Any]],
    *,
    names: Sequence[str] | None = None,
) -> Image.Image:
    """Draw pairs side by side, a row each: the sample, and the training slice as it was turned.

    :param samples: uint8 [N, H, W, C]; ``train``: uint8 [M, H, W, C] of the same size.
    :param channels: names of the C channels.
    :param pairs: ``worst`` of :func:`improved_diffusion.evaluation.memorisation.report`; the first
        20 are drawn.
    :param names: of the M training slices, such as their files'; not given: their numbers.
    :returns: an RGB picture.
    :raises ValueError: no pair.
    """
    rows = []
    for pair in pairs[:ROWS]:
        index, other, flip = pair["index"], pair["train_index"], pair["flip"]
        turned = "" if flip == "none" else f", flipped ({flip})"
        name = f"training slice {other}" if names is None else names[other]
        caption = f"sample {index}: correlation {pair['correlation']:.4f} with {name}{turned}"
        rows.append((caption, [samples[index], flipped(train[other], flip)]))
    return _sheet(rows, ["sample", "training slice"], channels)


def flagged_sheet(
    samples: np.ndarray, channels: Sequence[str], reasons: Sequence[dict[str, Any]]
) -> Image.Image:
    """Draw flagged samples, a row each, with what they are flagged for above.

    :param samples: uint8 [N, H, W, C].
    :param channels: names of the C channels.
    :param reasons: those of :class:`improved_diffusion.evaluation.validity.Flags`; the first 20
        samples are drawn.
    :returns: an RGB picture.
    :raises ValueError: no reason.
    """
    of_samples: dict[int, list[str]] = {}
    for reason in reasons:
        words = reason["reason"]
        if reason["channel"] != ALL_IMAGES:
            words = f"{reason['channel']} {words}"
        known = of_samples.setdefault(reason["index"], [])
        if words not in known:
            known.append(words)
    rows = [
        (f"sample {index}: {', '.join(words)}", [samples[index]])
        for index, words in list(of_samples.items())[:ROWS]
    ]
    return _sheet(rows, [""], channels)


def _sheet(
    rows: Sequence[tuple[str, list[np.ndarray]]], titles: Sequence[str], channels: Sequence[str]
) -> Image.Image:
    """Rows of samples [H, W, C] beside each other, each row below its caption."""
    if not rows:
        raise ValueError("there is nothing to draw: give at least one row")
    height, width, _ = rows[0][1][0].shape
    scale = max(1, math.ceil(MIN_PANEL / min(height, width)))
    panel_height, panel_width = height * scale, width * scale
    font = figures.load_font(figures.font_size_for(panel_height))
    line = figures.text_height(font.size) + 4
    block = len(channels) * (panel_width + PANEL_GAP) - PANEL_GAP
    row_height = line + panel_height + BLOCK_GAP
    header = 2 * line if any(titles) else line
    longest = max(math.ceil(font.getlength(caption)) for caption, _ in rows)
    sheet_width = max(len(titles) * (block + BLOCK_GAP), longest + BLOCK_GAP) + BLOCK_GAP
    sheet_height = BLOCK_GAP + header + len(rows) * row_height
    if MASK_CHANNEL in channels:
        legend = figures.draw_legend(MASK_CODES, sheet_width, font.size)
        size = (max(sheet_width, legend.width), sheet_height + legend.height)
        canvas = Image.new("RGB", size, PAPER)
        canvas.paste(legend, (0, sheet_height))
    else:
        canvas = Image.new("RGB", (sheet_width, sheet_height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, title in enumerate(titles):
        left = BLOCK_GAP + number * (block + BLOCK_GAP)
        draw.text((left + block // 2, BLOCK_GAP), title, fill=INK, font=font, anchor="ma")
        for index, name in enumerate(channels):
            middle = left + index * (panel_width + PANEL_GAP) + panel_width // 2
            draw.text((middle, BLOCK_GAP + header - line), name, fill=INK, font=font, anchor="ma")
    for row, (caption, samples) in enumerate(rows):
        top = BLOCK_GAP + header + row * row_height
        draw.text((BLOCK_GAP, top), caption, fill=INK, font=font)
        for number, sample in enumerate(samples):
            for index, name in enumerate(channels):
                panel = colour_panel(np.ascontiguousarray(sample[..., index]), name)
                panel = panel.repeat(scale, axis=0).repeat(scale, axis=1)
                left = BLOCK_GAP + number * (block + BLOCK_GAP)
                left += index * (panel_width + PANEL_GAP)
                canvas.paste(Image.fromarray(panel), (left, top + line))
    return canvas
