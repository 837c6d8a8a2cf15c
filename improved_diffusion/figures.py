"""Pictures and plots from arrays and from the files that training and sampling write.

Pictures show the absolute grey range, 0 black to 255 white, never stretched: a stretched panel
turns the one or two grey levels that are left in an empty mask into what looks like noise. Masks
are shown through the label palette. The channels of one sample always stand side by side in one
block, so a picture cannot mix samples.

Legend: N samples, H, W height and width, C channels.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import blobfile as bf
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from improved_diffusion.brats import LABEL_NAMES, MASK_CHANNEL, PALETTE, snap_mask
from improved_diffusion.files import atomic_write
from improved_diffusion.logger import read_progress

MIN_PANEL = 128  # pixels; smaller images are enlarged to at least this height and width

PAPER, INK = (255, 255, 255), (0, 0, 0)
PANEL_GAP = 2  # between the channels of one sample
BLOCK_GAP = 12  # between samples, and around the picture
HALVES_GAP = 36  # between the real and the synthetic half

LOSS_CURVES = {
    "loss": ("all t", "black"),
    "loss_q0": ("q0: t in the first quarter (least noise)", "tab:red"),
    "loss_q1": ("q1: t in the second quarter", "tab:orange"),
    "loss_q2": ("q2: t in the third quarter", "tab:green"),
    "loss_q3": ("q3: t in the last quarter (most noise)", "tab:blue"),
}
X_LABELS = {"step": "optimizer steps", "samples": "images seen"}


# --- pictures ---------------------------------------------------------------------------------


def colour_panel(image: np.ndarray, channel: str) -> np.ndarray:
    """Colour one channel of one slice for display.

    :param image: uint8 [H, W].
    :param channel: the channel's name. "Seg" is a mask: each pixel is snapped to the nearest
        label code and gets that label's colour. Any other stays grey, as it is.
    :returns: uint8 [H, W, 3].
    :raises ValueError: another shape or data type.
    """
    if image.dtype != np.uint8 or image.ndim != 2:
        raise ValueError(
            f"a panel is a uint8 array of shape [H, W], found {image.dtype} {list(image.shape)}"
        )
    if channel != MASK_CHANNEL:
        return np.repeat(image[:, :, None], 3, axis=2)  # [H, W, 3]
    colours = np.zeros((256, 3), np.uint8)
    for code, colour in PALETTE.items():
        colours[code] = colour
    return colours[snap_mask(image)]  # [H, W, 3]


@dataclass(frozen=True)
class GridLayout:
    """Where the panels of a grid of samples lie: ``columns`` blocks across, read row by row.

    A block is one sample, its channels from left to right. All lengths are in pixels of the
    finished picture.
    """

    samples: int
    channels: int
    columns: int
    panel_height: int
    panel_width: int
    header: int

    @property
    def block_width(self) -> int:
        """Width of one sample's channels together."""
        return self.channels * (self.panel_width + PANEL_GAP) - PANEL_GAP

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the grid with its margin and its column headers."""
        rows = math.ceil(self.samples / self.columns)
        width = self.columns * (self.block_width + BLOCK_GAP) + BLOCK_GAP
        height = rows * (self.panel_height + BLOCK_GAP) + BLOCK_GAP + self.header
        return width, height

    def corner(self, sample: int, channel: int) -> tuple[int, int]:
        """Left and top pixel of a panel."""
        row, column = divmod(sample, self.columns)
        left = BLOCK_GAP + column * (self.block_width + BLOCK_GAP)
        left += channel * (self.panel_width + PANEL_GAP)
        return left, BLOCK_GAP + self.header + row * (self.panel_height + BLOCK_GAP)


def grid_layout(
    shape: Sequence[int],
    *,
    columns: int | None = None,
    scale: int | None = None,
    aspect: float = 1.0,
) -> GridLayout:
    """Lay out samples of ``shape`` [N, H, W, C].

    :param columns: samples across; not given: as many as bring the picture's width / height
        nearest to ``aspect``.
    :param scale: enlargement; not given: the smallest whole number that makes panels at least
        128 x 128.
    """
    n, height, width, channels = shape
    scale = scale or max(1, math.ceil(MIN_PANEL / min(height, width)))
    header = _text_height(_font_size(height * scale)) + 4

    def layout(columns: int) -> GridLayout:
        return GridLayout(n, channels, columns, height * scale, width * scale, header)

    def distance(columns: int) -> float:
        picture_width, picture_height = layout(columns).size
        return abs(math.log(picture_width / picture_height / aspect))

    return layout(min(columns or min(range(1, n + 1), key=distance), n))


def sample_grid(
    samples: np.ndarray,
    channels: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Draw samples with a column per channel.

    :param samples: uint8 [N, H, W, C].
    :param channels: C names, written above the columns; not given: "0", "1", ...
    :param columns: samples across; not given: a near-square picture.
    :param scale: whole-number enlargement, nearest neighbour; not given: panels of at least
        128 pixels.
    :returns: an RGB picture, with a legend of the labels where the mask is among the channels.
    :raises ValueError: another shape or data type, no sample, or another number of names.
    """
    names = _channel_names(samples, channels)
    layout = grid_layout(samples.shape, columns=columns, scale=scale)
    font_size = _font_size(layout.panel_height)
    width, height = layout.size
    legend = _legend(width, font_size) if MASK_CHANNEL in names else None
    canvas = _canvas(width, height, legend)
    _draw_samples(canvas, samples, names, layout, origin=(0, 0))
    return canvas


def compare_grid(
    real: np.ndarray, synthetic: np.ndarray, channels: Sequence[str] | None, path: str
) -> None:
    """Write a picture with real slices in its left half and synthetic ones in its right half.

    :param real: uint8 [N, H, W, C].
    :param synthetic: uint8 [N, H, W, C]; the same shape, so that neither half looks richer.
    :param channels: as for :func:`sample_grid`.
    :param path: where the PNG goes; see :func:`save_grid`.
    :raises ValueError: the shapes differ, or as :func:`sample_grid`.
    """
    if real.shape != synthetic.shape:
        raise ValueError(
            f"real slices {list(real.shape)} and synthetic slices {list(synthetic.shape)} are "
            "compared in equal numbers, sizes and channels [N, H, W, C]: give the same of both"
        )
    names = _channel_names(real, channels)
    _channel_names(synthetic, channels)
    layout = grid_layout(real.shape, aspect=0.5)
    heading_size = _font_size(layout.panel_height) * 4 // 3
    heading = _text_height(heading_size) + BLOCK_GAP
    half, height = layout.size
    width = 2 * half + HALVES_GAP
    font_size = _font_size(layout.panel_height)
    legend = _legend(width, font_size) if MASK_CHANNEL in names else None
    canvas = _canvas(width, heading + height, legend)
    draw = ImageDraw.Draw(canvas)
    for left, title, slices in (
        (0, "real slices", real),
        (half + HALVES_GAP, "synthetic slices", synthetic),
    ):
        draw.text(
            (left + half // 2, BLOCK_GAP), title, fill=INK, font=_font(heading_size), anchor="ma"
        )
        _draw_samples(canvas, slices, names, layout, origin=(left, heading))
    middle = half + HALVES_GAP // 2
    draw.line((middle, BLOCK_GAP, middle, heading + height - BLOCK_GAP), fill=INK, width=1)
    save_grid(canvas, path)


def save_grid(image: Image.Image, path: str) -> None:
    """Write a picture as PNG, atomically; the folder is made if needed.

    :raises ValueError: the path does not end in ``.png``.
    """
    _extension(path, ("png",))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def read_samples(path: str) -> tuple[np.ndarray, list[str] | None]:
    """Read the samples that ``image_sample.py`` wrote.

    :param path: the ``.npz`` file, or a sample folder that holds exactly one.
    :returns: uint8 [N, H, W, C], and the channels' names from the ``samples.json`` beside the
        file, or None if there is none.
    :raises ValueError: no such file, it holds no such array, or samples.json is damaged.
    """
    if bf.isdir(path):
        found = sorted(name for name in bf.listdir(path) if name.endswith(".npz"))
        if len(found) != 1:
            raise ValueError(
                f"the sample folder {path} holds {len(found)} .npz files instead of one: name the "
                ".npz file itself"
            )
        path = bf.join(path, found[0])
    if not bf.exists(path):
        raise ValueError(f"there is no file {path}: give the .npz that image_sample.py wrote")
    try:
        with bf.BlobFile(path, "rb") as file, np.load(io.BytesIO(file.read())) as arrays:
            samples = arrays["arr_0"]
    except Exception as error:  # numpy, zipfile and pickle each raise their own
        raise ValueError(
            f"{path} is not a sample file (an .npz with the array arr_0): it is damaged or "
            "something else"
        ) from error
    if samples.dtype != np.uint8 or samples.ndim != 4:
        raise ValueError(
            f"arr_0 of {path} is {samples.dtype} {list(samples.shape)}, expected uint8 [N, H, W, C]"
        )
    description = bf.join(bf.dirname(path), "samples.json")
    if not bf.exists(description):
        return samples, None
    try:
        with bf.BlobFile(description, "rb") as file:
            return samples, json.loads(file.read()).get("channels")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{description} is not the JSON object that image_sample.py writes: repair it or move "
            "it away"
        ) from error


def _channel_names(samples: np.ndarray, channels: Sequence[str] | None) -> list[str]:
    """Check samples [N, H, W, C] and their names; the names, numbers where there are none."""
    if samples.dtype != np.uint8 or samples.ndim != 4 or 0 in samples.shape:
        raise ValueError(
            "samples are a uint8 array of shape [N, H, W, C], none of them 0, found "
            f"{samples.dtype} {list(samples.shape)}"
        )
    count = samples.shape[3]
    if channels is None:
        return [str(index) for index in range(count)]
    if len(channels) != count:
        raise ValueError(
            f"the samples have {count} channels, but {len(channels)} are named "
            f"({', '.join(channels)}): name each once"
        )
    return list(channels)


def _draw_samples(
    canvas: Image.Image,
    samples: np.ndarray,
    names: Sequence[str],
    layout: GridLayout,
    origin: tuple[int, int],
) -> None:
    left, top = origin
    draw = ImageDraw.Draw(canvas)
    font = _font(_font_size(layout.panel_height))
    for column in range(layout.columns):
        for channel, name in enumerate(names):
            x, y = layout.corner(column, channel)
            middle = left + x + layout.panel_width // 2
            draw.text((middle, top + y - 4), name, fill=INK, font=font, anchor="md")
    size = (layout.panel_width, layout.panel_height)
    for sample, slices in enumerate(samples):
        for channel, name in enumerate(names):
            panel = Image.fromarray(colour_panel(slices[:, :, channel], name))
            x, y = layout.corner(sample, channel)
            canvas.paste(panel.resize(size, Image.Resampling.NEAREST), (left + x, top + y))


def _canvas(width: int, height: int, legend: Image.Image | None) -> Image.Image:
    if legend is None:
        return Image.new("RGB", (width, height), PAPER)
    canvas = Image.new("RGB", (max(width, legend.width), height + legend.height), PAPER)
    canvas.paste(legend, (0, height))
    return canvas


def _legend(width: int, font_size: int) -> Image.Image:
    """The labels' colours and names, in as many lines as ``width`` asks for."""
    font = _font(font_size)
    line = _text_height(font_size) + 6
    swatch = line - 6
    places, x, y = [], BLOCK_GAP, 0
    for code, colour in PALETTE.items():
        name = LABEL_NAMES[code]
        entry = swatch + 6 + math.ceil(font.getlength(name))
        if x > BLOCK_GAP and x + entry + BLOCK_GAP > width:
            x, y = BLOCK_GAP, y + line
        places.append((x, y, colour, name))
        width = max(width, x + entry + BLOCK_GAP)
        x += entry + 2 * BLOCK_GAP
    legend = Image.new("RGB", (width, y + line + BLOCK_GAP), PAPER)
    draw = ImageDraw.Draw(legend)
    for x, y, colour, name in places:
        draw.rectangle((x, y, x + swatch, y + swatch), fill=tuple(colour), outline=INK)
        draw.text((x + swatch + 6, y + swatch // 2), name, fill=INK, font=font, anchor="lm")
    return legend


def _font_size(panel_height: int) -> int:
    return max(14, panel_height // 14)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _text_height(size: int) -> int:
    ascent, descent = _font(size).getmetrics()
    return ascent + descent


# --- plots ------------------------------------------------------------------------------------


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


def loss_plot(
    progress_csv: Sequence[str],
    out_path: str,
    *,
    smooth: float | None = None,
    x: Literal["step", "samples"] = "step",
) -> None:
    """Plot the loss and its four timestep quartiles over a run, as the report's figure 8 does.

    Each curve is drawn faintly as logged and strongly when smoothed, on a logarithmic axis.

    :param progress_csv: the run's progress.csv, or its parts; see :func:`join_progress`.
    :param out_path: ends in ``.png`` or ``.pdf``; written atomically.
    :param smooth: see :func:`smoothed`; not given: an average over about a hundredth of the run.
    :param x: the horizontal axis, optimizer steps or images seen.
    :raises ValueError: matplotlib is not installed, the files have no such columns, or another
        extension.
    """
    extension = _extension(out_path, ("png", "pdf"))
    if smooth is not None and not 0 <= smooth < 1:
        raise ValueError(f"smooth is {smooth}: give a weight from 0 (none) to below 1")
    rows = join_progress(progress_csv)
    figure = _figure()
    axes = figure.add_subplot()
    for key, (label, colour) in LOSS_CURVES.items():
        points = np.array([(row[x], row[key]) for row in rows if key in row and x in row])
        if not len(points):
            continue
        at, values = points.T  # each [rows]
        past = 1 - 1 / max(1, len(values) / 100) if smooth is None else smooth
        # Pixels for the many thousand faint points keep a PDF small; text and curves stay lines.
        axes.plot(at, values, color=colour, alpha=0.15, linewidth=0.5, rasterized=True)
        axes.plot(at, smoothed(values, past), color=colour, linewidth=1.6, label=label)
    if not axes.lines:
        raise ValueError(
            f"{', '.join(progress_csv)}: no row has {x} and one of {', '.join(LOSS_CURVES)}, so "
            "there is nothing to plot"
        )
    axes.set_yscale("log")
    axes.set_xlabel(X_LABELS[x])
    axes.set_ylabel("training loss (faint: as logged)")
    axes.xaxis.set_major_formatter(_thousands)
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=extension, dpi=200)
    with atomic_write(out_path) as file:
        file.write(buffer.getvalue())


def _figure():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "plots need matplotlib, which is not installed: pip install 'improved-diffusion[plots]'"
        ) from error
    # A Figure of its own, not pyplot: no window system, no global state.
    return Figure(figsize=(7, 4.6), layout="constrained")


def _thousands(value: float, position: int) -> str:
    """Axis label: 250000 as 250K, as the report counts steps."""
    for unit, name in ((1e6, "M"), (1e3, "K")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _extension(path: str, allowed: Sequence[str]) -> str:
    extension = os.path.splitext(path)[1].lower().removeprefix(".")
    if extension not in allowed:
        raise ValueError(
            f"the picture's name {path} ends in {extension or 'no extension'}: expected "
            + " or ".join(f".{name}" for name in allowed)
        )
    return extension
