"""Pictures of samples: grids, sets beside each other, checkpoints of a run, mask outlines.

Pictures show the absolute grey range, 0 black to 255 white, never stretched: a stretched panel
turns the one or two grey levels that are left in an empty mask into what looks like noise. Masks
are shown through the label palette. The channels of one sample always stand side by side in one
block, so a picture cannot mix samples. Samples without channel names and with one or three
channels are ordinary pictures, grey or RGB: one panel each, without a header.

Legend: N samples, H, W height and width, C channels.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import blobfile as bf
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from improved_diffusion.brats import (
    LABEL_NAMES,
    MASK_CHANNEL,
    MASK_CODES,
    PALETTE,
    natural_key,
    snap_mask,
)
from improved_diffusion.files import atomic_write

Masks = Literal["labels", "outlines"]

MIN_PANEL = 128  # pixels; smaller images are enlarged to at least this height and width
MIN_PLAIN_PANEL = 64  # the same for ordinary pictures, which stand in a dense grid
MIN_OUTLINED_PANEL = 256  # the same below outlines, which would fill a small tumour otherwise
MAX_PIXELS = 2 * 89_478_485  # Pillow refuses to open larger pictures

PAPER, INK = (255, 255, 255), (0, 0, 0)
PANEL_GAP = 2  # between the channels of one sample, and between ordinary pictures
BLOCK_GAP = 12  # between samples, and around the picture
SETS_GAP = 36  # between sets of samples, with a line in its middle


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


def outlined(panel: np.ndarray, mask: np.ndarray, width: int = 1) -> np.ndarray:
    """Draw the contour of every tumour label over a panel, in the label's colour.

    A contour is the rim of the label's own region, so it hides no pixel of another label, and two
    regions that touch show both their colours. A region no wider than two rims is filled.

    :param panel: uint8 [H, W, 3].
    :param mask: uint8 [H, W], snapped to the nearest label codes.
    :param width: of the rim in pixels.
    :returns: uint8 [H, W, 3], a copy.
    """
    panel = panel.copy()
    codes = snap_mask(mask)  # [H, W]
    for code in MASK_CODES[1:]:
        region = codes == code
        inner = np.pad(region, width)  # what lies beyond the picture is outside of every region
        for _ in range(width):
            up, down = np.roll(inner, 1, axis=0), np.roll(inner, -1, axis=0)
            left, right = np.roll(inner, 1, axis=1), np.roll(inner, -1, axis=1)
            inner = inner & up & down & left & right
        panel[region & ~inner[width:-width, width:-width]] = PALETTE[code]
    return panel


@dataclass(frozen=True)
class GridLayout:
    """Where the panels of a grid of samples lie: ``columns`` blocks across, read row by row.

    A block is one sample, its panels from left to right. All lengths are in pixels of the
    finished picture.
    """

    samples: int
    channels: int
    columns: int
    panel_height: int
    panel_width: int
    header: int
    gap: int = BLOCK_GAP

    @property
    def block_width(self) -> int:
        """Width of one sample's panels together."""
        return self.channels * (self.panel_width + PANEL_GAP) - PANEL_GAP

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the grid with its margin and its column headers."""
        rows = math.ceil(self.samples / self.columns)
        width = self.columns * (self.block_width + self.gap) + self.gap
        height = rows * (self.panel_height + self.gap) + self.gap + self.header
        return width, height

    def corner(self, sample: int, channel: int) -> tuple[int, int]:
        """Left and top pixel of a panel."""
        row, column = divmod(sample, self.columns)
        left = self.gap + column * (self.block_width + self.gap)
        left += channel * (self.panel_width + PANEL_GAP)
        return left, self.gap + self.header + row * (self.panel_height + self.gap)


def grid_layout(
    shape: Sequence[int],
    *,
    columns: int | None = None,
    scale: int | None = None,
    aspect: float = 1.0,
    min_panel: int = MIN_PANEL,
    plain: bool = False,
) -> GridLayout:
    """Lay out samples of ``shape`` [N, H, W, C], where C counts the panels of a sample.

    :param columns: samples across; not given: as many as bring the picture's width / height
        nearest to ``aspect``.
    :param scale: enlargement; not given: the smallest whole number that makes panels at least
        ``min_panel`` pixels high and wide.
    :param plain: ordinary pictures: no header, and little space between them.
    """
    n, height, width, channels = shape
    scale = scale or max(1, math.ceil(min_panel / min(height, width)))
    header = 0 if plain else text_height(font_size_for(height * scale)) + 4
    gap = PANEL_GAP if plain else BLOCK_GAP

    def layout(columns: int) -> GridLayout:
        return GridLayout(n, channels, columns, height * scale, width * scale, header, gap)

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
    masks: Masks = "labels",
) -> Image.Image:
    """Draw samples with a column per channel.

    :param samples: uint8 [N, H, W, C].
    :param channels: C names, written above the columns. Not given: samples of one channel are
        grey pictures and samples of three are RGB pictures, one panel each in a dense grid without
        headers; other numbers of channels are named "0", "1", ...
    :param columns: samples across; not given: a near-square picture.
    :param scale: whole-number enlargement, nearest neighbour; not given: panels of at least
        128 pixels (64 for pictures without names, 256 below outlines).
    :param masks: "labels": the mask is a panel of its own. "outlines": it is drawn as contours,
        see :func:`outlined`, over every other channel's panel and has no panel.
    :returns: an RGB picture, with a legend of the labels where the mask is among the channels.
    :raises ValueError: another shape or data type, no sample, another number of names, columns
        below 1, outlines without a mask or without another channel, or more than 179 million
        pixels.
    """
    panels = _Panels.of(samples, channels, masks)
    if columns is not None and columns < 1:
        raise ValueError(f"{columns} columns of samples cannot be drawn: give 1 or more")
    layout = panels.layout(samples, columns=columns, scale=scale)
    canvas = _canvas(*layout.size, panels, layout)
    _draw_samples(canvas, samples, panels, layout, origin=(0, 0))
    return canvas


def beside_grid(
    sets: Sequence[np.ndarray],
    titles: Sequence[str],
    channels: Sequence[str] | None = None,
    *,
    masks: Masks = "labels",
) -> Image.Image:
    """Draw sets of samples side by side, each as a grid below its title, with lines between.

    :param sets: uint8 [N, H, W, C] each; sample i has the same place in every set.
    :param titles: one for each set.
    :param channels: as for :func:`sample_grid`; so is ``masks``.
    :returns: an RGB picture, near square.
    :raises ValueError: the shapes differ, another number of titles, or as :func:`sample_grid`.
    """
    panels = _panels_of_sets(sets, titles, channels, masks)
    layout = panels.layout(sets[0], aspect=1 / len(sets))
    return _draw_sets(sets, titles, panels, layout, gap=SETS_GAP, lines=True)


def evolution_grid(
    sets: Sequence[np.ndarray],
    titles: Sequence[str],
    channels: Sequence[str] | None = None,
    *,
    masks: Masks = "labels",
) -> Image.Image:
    """Draw a row per sample number and, in it, a block per set: checkpoints of one run.

    :param sets: uint8 [N, H, W, C] each, in the order in which they are shown.
    :param titles: one for each set, such as "10K", written above its block.
    :param channels: as for :func:`sample_grid`; so is ``masks``.
    :returns: an RGB picture.
    :raises ValueError: as :func:`beside_grid`.
    """
    panels = _panels_of_sets(sets, titles, channels, masks)
    layout = panels.layout(sets[0], columns=1)
    # The margins of two neighbours, wide or narrow, and the gap make the same distance.
    gap = 2 * (BLOCK_GAP - layout.gap)
    return _draw_sets(sets, titles, panels, layout, gap=gap, lines=False)


def compare_grid(
    real: np.ndarray,
    synthetic: np.ndarray,
    channels: Sequence[str] | None,
    path: str,
    *,
    masks: Masks = "labels",
) -> None:
    """Write a picture with real slices in its left half and synthetic ones in its right half.

    :param real: uint8 [N, H, W, C].
    :param synthetic: uint8 [N, H, W, C]; the same shape, so that neither half looks richer.
    :param channels: as for :func:`sample_grid`; so is ``masks``.
    :param path: where the PNG goes; see :func:`save_grid`.
    :raises ValueError: the shapes differ, or as :func:`sample_grid`.
    """
    titles = ("real slices", "synthetic slices")
    save_grid(beside_grid((real, synthetic), titles, channels, masks=masks), path)


def save_grid(image: Image.Image, path: str) -> None:
    """Write a picture as PNG, atomically; the folder is made if needed.

    :raises ValueError: the path does not end in ``.png``.
    """
    check_extension(path, ("png",))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def check_extension(path: str, allowed: Sequence[str]) -> str:
    """The extension of a picture's path, without its dot and in lower case.

    :raises ValueError: it is none of ``allowed``.
    """
    extension = os.path.splitext(path)[1].lower().removeprefix(".")
    if extension not in allowed:
        raise ValueError(
            f"the picture's name {path} ends in {extension or 'no extension'}: expected "
            + " or ".join(f".{name}" for name in allowed)
        )
    return extension


def short_number(value: float) -> str:
    """250000 as 250K, as the report counts steps."""
    for unit, name in ((1e6, "M"), (1e3, "K")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


# --- pictures of sample folders -----------------------------------------------------------------


@dataclass(frozen=True)
class SampleSet:
    """What a sample folder holds."""

    path: str  # as it was named: the folder or the .npz file in it
    samples: np.ndarray  # uint8 [N, H, W, C]
    record: dict[str, Any] = field(default_factory=dict)  # samples.json; empty if there is none
    labels: np.ndarray | None = None  # int [N] class numbers, where the model had classes

    @property
    def channels(self) -> list[str] | None:
        """Names of the C channels; None where they have none."""
        return self.record.get("channels") or None

    @property
    def step(self) -> int | None:
        """The checkpoint's step, where it is known."""
        return self.record.get("step")

    @property
    def folder_name(self) -> str:
        """Name of the folder, without those above it."""
        folder = os.path.dirname(self.path) if self.path.endswith(".npz") else self.path
        return os.path.basename(os.path.abspath(folder))

    @property
    def checkpoint_name(self) -> str:
        """Name of the checkpoint's file, such as ema_0.9999_060000; else the folder's."""
        name = os.path.basename(self.record.get("checkpoint") or "").removesuffix(".pt")
        return name or self.folder_name

    def chosen(self, start: int = 0, num: int = 0) -> np.ndarray:
        """Samples ``start`` to ``start + num - 1``, uint8 [num, H, W, C]; num 0: all from start.

        :raises ValueError: there are not as many.
        """
        left = len(self.samples) - start
        if start < 0 or left < 1 or not 0 <= num <= left:
            raise ValueError(
                f"--start {start} --num {num} of {len(self.samples)} samples in {self.path}: their "
                f"numbers are 0 to {len(self.samples) - 1}, choose among them"
            )
        return self.samples[start : start + (num or left)]


def read_sample_set(path: str, *, mapped: bool = False) -> SampleSet:
    """Read the samples that ``image_sample.py`` wrote, and how they were made.

    :param path: the ``.npz`` file, or a sample folder that holds exactly one.
    :param mapped: leave the samples in the file, as a read-only memory map, where it is a local one
        that is not compressed (``image_sample.py``'s are not). They are still read once, block by
        block, to compare their checksum.
    :raises ValueError: no such file, it holds no such array, or samples.json is damaged.
    """
    file_path = path
    if bf.isdir(path):
        found = sorted(name for name in bf.listdir(path) if name.endswith(".npz"))
        if not found:
            raise ValueError(
                f"the sample folder {path} holds no .npz file, the raw levels that are read here: "
                "name another, or draw the samples with --format npz among the formats"
            )
        if len(found) != 1:
            raise ValueError(
                f"the sample folder {path} holds {len(found)} .npz files instead of one: name the "
                ".npz file itself"
            )
        file_path = bf.join(path, found[0])
    if not bf.exists(file_path):
        raise ValueError(f"there is no file {file_path}: give the .npz that image_sample.py wrote")
    try:
        mapped = mapped and os.path.isfile(file_path)
        samples = _mapped(file_path) if mapped else None
        with (
            bf.BlobFile(file_path, "rb") as file,
            np.load(file if mapped else io.BytesIO(file.read())) as arrays,
        ):
            samples = arrays["arr_0"] if samples is None else samples
            labels = arrays.get("arr_1")
    except Exception as error:  # numpy, zipfile and pickle each raise their own
        raise ValueError(
            f"{file_path} is not a sample file (an .npz with the array arr_0): it is damaged or "
            "something else"
        ) from error
    if samples.dtype != np.uint8 or samples.ndim != 4:
        raise ValueError(
            f"arr_0 of {file_path} is {samples.dtype} {list(samples.shape)}, expected uint8 "
            "[N, H, W, C]"
        )
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != samples.shape[:1]):
        raise ValueError(
            f"arr_1 of {file_path} is {labels.dtype} {list(labels.shape)}, expected a whole number "
            f"for each of the {len(samples)} samples"
        )
    description = bf.join(bf.dirname(file_path), "samples.json")
    if not bf.exists(description):
        return SampleSet(path, samples, labels=labels)
    try:
        with bf.BlobFile(description, "rb") as file:
            record = json.loads(file.read())
        sound = isinstance(record, dict) and isinstance(record.get("step"), int | None)
        if not sound:
            raise ValueError("no JSON object, or a step that is no whole number")
    except ValueError as error:
        raise ValueError(
            f"{description} is not the JSON object that image_sample.py writes: repair it or move "
            "it away"
        ) from error
    return SampleSet(path, samples, record, labels)


def _mapped(path: str) -> np.ndarray | None:
    """``arr_0`` of an .npz as a memory map; None where it is compressed or no plain array.

    A member's bytes follow its local header: 30 bytes, of which the last four are the lengths of
    the name and of the extra field behind them (APPNOTE.TXT of the zip format, 4.3.7).

    :raises Exception: a damaged file, of many kinds.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        entry = archive.getinfo("arr_0.npy")
        with archive.open(entry) as member:
            version = np.lib.format.read_magic(member)
            if entry.compress_type != zipfile.ZIP_STORED or version != (1, 0):
                return None
            shape, fortran_order, kind = np.lib.format.read_array_header_1_0(member)
            header = member.tell()
            while member.read(2**22):  # to its end, where the checksum is compared
                pass
        if fortran_order or kind.hasobject or 0 in shape:
            return None
        if entry.file_size != header + math.prod(shape) * kind.itemsize:
            raise ValueError(f"{entry.file_size} bytes, but an array {list(shape)} of {kind}")
        file.seek(entry.header_offset + 26)
        name, extra = np.frombuffer(file.read(4), dtype="<u2").tolist()
    return np.memmap(path, kind, "r", entry.header_offset + 30 + name + extra + header, shape)


def read_samples(path: str) -> tuple[np.ndarray, list[str] | None]:
    """Samples, uint8 [N, H, W, C], and their channels' names, None where they have none.

    The path and the errors are those of :func:`read_sample_set`.
    """
    found = read_sample_set(path)
    return found.samples, found.channels


def write_beside(
    sample_paths: Sequence[str],
    out_path: str,
    *,
    num: int = 8,
    start: int = 0,
    titles: Sequence[str] | None = None,
    masks: Masks = "labels",
) -> None:
    """Write a picture of two or more sample folders beside each other, such as EMA and raw model.

    :param sample_paths: sample folders, or their .npz files, from left to right.
    :param out_path: ends in ``.png``; see :func:`save_grid`.
    :param num: samples of each folder, from number ``start`` on (0: all from there).
    :param titles: one for each folder; not given: the name of its checkpoint's file, or of the
        folder where two checkpoints have one name or a folder does not tell its checkpoint.
    :param masks: as for :func:`sample_grid`.
    :raises ValueError: fewer than two folders, folders whose sizes or channels differ or that hold
        fewer samples, a wrong number of titles, or as :func:`read_sample_set`.
    """
    if len(sample_paths) < 2:
        raise ValueError(
            f"--samples names {len(sample_paths)} folder: give two or more to be shown beside each "
            "other"
        )
    sets = _read_alike(sample_paths)
    if titles is None:
        titles = [found.checkpoint_name for found in sets]
        if len(set(titles)) < len(titles):
            titles = [found.folder_name for found in sets]
        if len(set(titles)) < len(titles):
            raise ValueError(
                f"--samples {' '.join(sample_paths)}: neither the checkpoints nor the folders have "
                "names that tell them apart; name them with --titles"
            )
    elif len(titles) != len(sets):
        raise ValueError(
            f"--titles names {len(titles)} titles ({', '.join(titles)}) for {len(sets)} sample "
            "folders: give one for each, separated by commas"
        )
    chosen = [found.chosen(start, num) for found in sets]
    save_grid(beside_grid(chosen, titles, sets[0].channels, masks=masks), out_path)


def write_evolution(
    sample_paths: Sequence[str],
    out_path: str,
    *,
    num: int = 4,
    start: int = 0,
    masks: Masks = "labels",
) -> None:
    """Write a picture of the samples of several checkpoints of one run, a row per sample number.

    With one seed, samples of one number begin with the same noise, so that a row shows what each
    checkpoint makes of it. Blocks are in the order of the checkpoints' steps, whatever the order
    of the folders; folders that tell no step follow in the order of their names.

    :param sample_paths: a sample folder, or its .npz file, for each checkpoint.
    :param out_path: ends in ``.png``; see :func:`save_grid`.
    :param num: rows: samples of each folder, from number ``start`` on (0: all from there).
    :param masks: as for :func:`sample_grid`.
    :raises ValueError: two folders of one step, folders whose sizes or channels differ or that
        hold fewer samples, or as :func:`read_sample_set`.
    """
    sets = sorted(
        _read_alike(sample_paths),
        key=lambda found: (found.step is None, found.step or 0, natural_key(found.folder_name)),
    )
    for first, second in itertools.pairwise(sets):
        if first.step is not None and first.step == second.step:
            raise ValueError(
                f"{first.path} and {second.path} both hold samples of step {first.step}: an "
                "evolution shows one folder per step; show these two with figures.py beside"
            )
    titles = [
        found.folder_name if found.step is None else short_number(found.step) for found in sets
    ]
    chosen = [found.chosen(start, num) for found in sets]
    save_grid(evolution_grid(chosen, titles, sets[0].channels, masks=masks), out_path)


def _read_alike(paths: Sequence[str]) -> list[SampleSet]:
    """Read sample folders and check that they have one size and the same channels."""
    sets = [read_sample_set(path) for path in paths]

    def kind(found: SampleSet) -> str:
        _, height, width, count = found.samples.shape
        names = ", ".join(found.channels) if found.channels else f"{count} without names"
        return f"{height} x {width} pixels, channels {names}"

    for other in sets[1:]:
        if kind(other) != kind(sets[0]):
            raise ValueError(
                f"{sets[0].path} holds samples of {kind(sets[0])}, but {other.path} of "
                f"{kind(other)}: one picture shows samples of one size with the same channels"
            )
    return sets


# --- drawing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panels:
    """How the channels of a sample become panels that stand side by side."""

    channels: tuple[str, ...] | None  # names of the C channels; None: an ordinary picture
    masks: Masks

    @classmethod
    def of(cls, samples: np.ndarray, channels: Sequence[str] | None, masks: Masks) -> _Panels:
        """Check samples [N, H, W, C] and their names; see :func:`sample_grid`."""
        if samples.dtype != np.uint8 or samples.ndim != 4 or 0 in samples.shape:
            raise ValueError(
                "samples are a uint8 array of shape [N, H, W, C], none of them 0, found "
                f"{samples.dtype} {list(samples.shape)}"
            )
        count = samples.shape[3]
        if channels is not None and len(channels) != count:
            raise ValueError(
                f"the samples have {count} channels, but {len(channels)} are named "
                f"({', '.join(channels)}): name each once"
            )
        if channels is None and count not in (1, 3):
            channels = [str(index) for index in range(count)]
        panels = cls(None if channels is None else tuple(channels), masks)
        if masks == "outlines" and not (panels.has_mask and panels.titles):
            raise ValueError(
                f"mask outlines need the channel {MASK_CHANNEL} and another one to draw them on, "
                f"but the samples' channels are {', '.join(channels or ['unnamed'])}: use --masks "
                "labels"
            )
        return panels

    @property
    def plain(self) -> bool:
        return self.channels is None

    @property
    def has_mask(self) -> bool:
        return self.channels is not None and MASK_CHANNEL in self.channels

    @property
    def titles(self) -> list[str]:
        """The header of each panel of a sample."""
        if self.channels is None:
            return [""]
        hidden = MASK_CHANNEL if self.masks == "outlines" else None
        return [name for name in self.channels if name != hidden]

    def layout(self, samples: np.ndarray, **options: float | None) -> GridLayout:
        """Where the panels of samples [N, H, W, C] lie; the options are ``grid_layout``'s."""
        n, height, width, _ = samples.shape
        smallest = MIN_OUTLINED_PANEL if self.masks == "outlines" else MIN_PANEL
        if self.plain:
            smallest = MIN_PLAIN_PANEL
        shape = (n, height, width, len(self.titles))
        return grid_layout(shape, min_panel=smallest, plain=self.plain, **options)

    def draw(self, sample: np.ndarray, scale: int) -> list[np.ndarray]:
        """A sample's panels, uint8 [scale * H, scale * W, 3] each, of a sample [H, W, C]."""
        sample = sample.repeat(scale, axis=0).repeat(scale, axis=1)
        if self.channels is None:
            return [np.broadcast_to(sample, (*sample.shape[:2], 3))]  # grey or RGB
        panels = {
            name: colour_panel(sample[:, :, index], name)
            for index, name in enumerate(self.channels)
        }
        if self.masks == "outlines":
            mask = sample[:, :, self.channels.index(MASK_CHANNEL)]
            width = max(1, len(mask) // MIN_OUTLINED_PANEL)
            panels = {name: outlined(panel, mask, width) for name, panel in panels.items()}
        return [panels[title] for title in self.titles]


def _panels_of_sets(
    sets: Sequence[np.ndarray], titles: Sequence[str], channels: Sequence[str] | None, masks: Masks
) -> _Panels:
    """Check sets of samples that are to stand beside each other."""
    shapes = [list(samples.shape) for samples in sets]
    if any(shape != shapes[0] for shape in shapes):
        listed = " and ".join(f"{title} {shape}" for title, shape in zip(titles, shapes))
        raise ValueError(
            f"{listed} are compared in equal numbers, sizes and channels [N, H, W, C]: give the "
            "same of each"
        )
    if len(titles) != len(sets):
        raise ValueError(f"{len(sets)} sets of samples have {len(titles)} titles: give each one")
    panels = _Panels.of(sets[0], channels, masks)
    for samples in sets[1:]:
        _Panels.of(samples, channels, masks)
    return panels


def _draw_sets(
    sets: Sequence[np.ndarray],
    titles: Sequence[str],
    panels: _Panels,
    layout: GridLayout,
    *,
    gap: int,
    lines: bool,
) -> Image.Image:
    """Grids of one layout from left to right, each below its title."""
    font = load_font(font_size_for(layout.panel_height) * 4 // 3)
    heading = text_height(font.size) + BLOCK_GAP
    grid_width, height = layout.size
    # A title that is wider than its grid makes room for itself.
    longest = max(math.ceil(font.getlength(title)) for title in titles)
    width = max(grid_width, longest + 2 * BLOCK_GAP)
    canvas = _canvas(len(sets) * (width + gap) - gap, heading + height, panels, layout)
    draw = ImageDraw.Draw(canvas)
    for index, (title, samples) in enumerate(zip(titles, sets)):
        left = index * (width + gap)
        draw.text((left + width // 2, BLOCK_GAP), title, fill=INK, font=font, anchor="ma")
        origin = (left + (width - grid_width) // 2, heading)
        _draw_samples(canvas, samples, panels, layout, origin)
        if lines and index:
            x = left - gap // 2
            draw.line((x, BLOCK_GAP, x, heading + height - BLOCK_GAP), fill=INK, width=1)
    return canvas


def _draw_samples(
    canvas: Image.Image,
    samples: np.ndarray,
    panels: _Panels,
    layout: GridLayout,
    origin: tuple[int, int],
) -> None:
    left, top = origin
    draw = ImageDraw.Draw(canvas)
    font = load_font(font_size_for(layout.panel_height))
    for column in range(layout.columns):
        for index, title in enumerate(panels.titles):
            x, y = layout.corner(column, index)
            middle = left + x + layout.panel_width // 2
            draw.text((middle, top + y - 4), title, fill=INK, font=font, anchor="md")
    scale = layout.panel_height // samples.shape[1]
    for number, sample in enumerate(samples):
        for index, panel in enumerate(panels.draw(sample, scale)):
            x, y = layout.corner(number, index)
            canvas.paste(Image.fromarray(np.ascontiguousarray(panel)), (left + x, top + y))


def _canvas(width: int, height: int, panels: _Panels, layout: GridLayout) -> Image.Image:
    """White paper of at least this size, with a legend below where the mask is shown."""
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"the picture would have {width} x {height} pixels, more than most programs open: "
            "choose fewer samples with --num"
        )
    if not panels.has_mask:
        return Image.new("RGB", (width, height), PAPER)
    # Outlines leave the background as it is.
    codes = MASK_CODES[1:] if panels.masks == "outlines" else MASK_CODES
    legend = draw_legend(codes, width, font_size_for(layout.panel_height))
    canvas = Image.new("RGB", (max(width, legend.width), height + legend.height), PAPER)
    canvas.paste(legend, (0, height))
    return canvas


def draw_legend(codes: Sequence[int], width: int, font_size: int) -> Image.Image:
    """The labels' colours and names, in as many lines as ``width`` asks for."""
    font = load_font(font_size)
    line = text_height(font_size) + 6
    swatch = line - 6
    places, x, y = [], BLOCK_GAP, 0
    for code in codes:
        name = LABEL_NAMES[code]
        entry = swatch + 6 + math.ceil(font.getlength(name))
        if x > BLOCK_GAP and x + entry + BLOCK_GAP > width:
            x, y = BLOCK_GAP, y + line
        places.append((x, y, PALETTE[code], name))
        width = max(width, x + entry + BLOCK_GAP)
        x += entry + 2 * BLOCK_GAP
    legend = Image.new("RGB", (width, y + line + BLOCK_GAP), PAPER)
    draw = ImageDraw.Draw(legend)
    for x, y, colour, name in places:
        draw.rectangle((x, y, x + swatch, y + swatch), fill=colour, outline=INK)
        draw.text((x + swatch + 6, y + swatch // 2), name, fill=INK, font=font, anchor="lm")
    return legend


def font_size_for(panel_height: int) -> int:
    return max(14, panel_height // 14)


def load_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def text_height(size: int) -> int:
    ascent, descent = load_font(size).getmetrics()
    return ascent + descent
