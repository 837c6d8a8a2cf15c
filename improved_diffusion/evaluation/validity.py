"""Whether a sample can be a slice at all: measures that need no other set to compare with.

Samples are uint8 [N, H, W, C], as the network made them, with the names of their channels. The
mask (channel Seg) holds grey label codes. Real slices are exactly 0 outside of the head.

:func:`measure` takes the values of every sample, for real slices as for samples. From those of the
real slices :func:`calibrate` sets limits, beyond which :func:`check` flags a sample, and
:func:`report` gives the shares and means of one set with their intervals.

Legend: N samples, H, W height and width, C channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from improved_diffusion.brats import CHANNELS, MASK_CHANNEL, MASK_CODES, snap_mask
from improved_diffusion.evaluation.intervals import mean_interval, share_interval
from improved_diffusion.parallel import Progress, no_progress

# How many levels of 255 above its background a pixel shows tissue. Higher than what a network
# leaves in a background; lower than the surface of the brain, which partial volume darkens.
TISSUE_LEVEL = 20
# Levels up to which a pixel of a mask counts as its nearest label code.
CODE_TOLERANCE = 12
# The eye takes a background above this level for grey.
BACKGROUND_LEVEL = 1
# The width of the border frame, in which a slice shows no head, as a share of the shorter side.
FRAME = 1 / 16


def brain_outline(images: np.ndarray, threshold: int = TISSUE_LEVEL) -> np.ndarray:
    """Where images show the brain: pixels clearly above the background, and the holes in them.

    The background is the median of the image's own border frame (0 in real slices). A sample whose
    whole channel is too bright keeps its outline so, and fails :func:`background_level` alone;
    with a fixed level two grey channels would be all brain, and agree.

    :param images: uint8 [N, H, W], one channel.
    :param threshold: a pixel belongs to the brain if it is more than so many levels above the
        background. Dark regions that the brain encloses (ventricles) belong to it too.
    :returns: bool [N, H, W].
    :raises ValueError: another shape or data type.
    """
    if images.dtype != np.uint8 or images.ndim != 3 or 0 in images.shape:
        raise ValueError(
            "images are a uint8 array of shape [N, H, W], none of them 0, found "
            f"{images.dtype} {list(images.shape)}"
        )
    background = _frame_median(images)[:, None, None]  # [N, 1, 1]
    # Images last: what the sweeps below handle at once lies together in memory.
    dark = np.ascontiguousarray(np.moveaxis(images <= background + threshold, 0, -1))  # [H, W, N]
    # The outside is what is dark and reaches the border through dark pixels.
    outside = dark.copy()
    outside[1:-1, 1:-1] = False
    before = -1
    while (count := np.count_nonzero(outside)) != before:
        before = count
        for axis, backward in itertools.product((0, 1), (False, True)):
            _sweep(outside, dark, axis, backward)
    return np.ascontiguousarray(np.moveaxis(~outside, -1, 0))


def _sweep(outside: np.ndarray, dark: np.ndarray, axis: int, backward: bool) -> None:
    """Carry ``outside`` on, in place, in one direction along an axis as far as it is dark."""
    lines, allowed = np.moveaxis(outside, axis, 0), np.moveaxis(dark, axis, 0)
    if backward:
        lines, allowed = lines[::-1], allowed[::-1]
    for i in range(1, len(lines)):
        lines[i] |= lines[i - 1] & allowed[i]


def channel_agreement(samples: np.ndarray, channels: Sequence[str]) -> np.ndarray:
    """Mean pairwise intersection over union of the image channels' brain outlines.

    Channels of one real slice show one brain: 0.98 on real FLAIR and T1CE slices of 64 x 64
    pixels. Channels that come from different slices reach 0.7 to 0.8.

    :param samples: uint8 [N, H, W, C].
    :param channels: names of the C channels; the mask does not count.
    :returns: float64 [N] in [0, 1]. Two empty outlines agree (1). NaN with fewer than two image
        channels.
    :raises ValueError: another shape or data type, or names that do not fit.
    """
    check_samples(samples, channels)
    return _agreement(_outlines(samples, channels))


def _outlines(samples: np.ndarray, channels: Sequence[str]) -> np.ndarray:
    """Brain outlines of the image channels: bool [images, N, H, W]."""
    images = _image_indices(channels)
    return np.array([brain_outline(samples[..., i]) for i in images]).reshape(
        len(images), *samples.shape[:3]
    )


def _agreement(outlines: np.ndarray) -> np.ndarray:
    pairs = list(itertools.combinations(outlines, 2))
    if not pairs:
        return np.full(outlines.shape[1], np.nan)
    return np.mean([_intersection_over_union(a, b) for a, b in pairs], axis=0)


def _intersection_over_union(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    union = (a | b).sum(axis=(1, 2))
    return np.where(union > 0, (a & b).sum(axis=(1, 2)) / np.maximum(union, 1), 1.0)


def background_level(samples: np.ndarray, channels: Sequence[str]) -> np.ndarray:
    """Median grey level of the border frame of every channel; 0 in real slices.

    The frame is a sixteenth of the shorter side wide, at least one pixel.

    :param samples: uint8 [N, H, W, C].
    :param channels: names of the C channels.
    :returns: float64 [N, C] in [0, 255].
    :raises ValueError: another shape or data type, or names that do not fit.
    """
    check_samples(samples, channels)
    return np.stack([_frame_median(samples[..., i]) for i in range(len(channels))], axis=1)


def _frame_median(images: np.ndarray) -> np.ndarray:
    """Median of the border frame, [N], of images [N, H, W]."""
    return np.median(_frame(images), axis=1)


def _frame(images: np.ndarray) -> np.ndarray:
    """The pixels of the border frame, [N, pixels], of images [N, H, W]."""
    width = max(1, round(min(images.shape[1:]) * FRAME))
    frame = np.ones(images.shape[1:], dtype=bool)
    frame[width:-width, width:-width] = False
    return images[:, frame]


def off_code_share(
    samples: np.ndarray, channels: Sequence[str], tolerance: int = CODE_TOLERANCE
) -> np.ndarray:
    """Share of a mask's pixels that are no label: far from every code; 0 in real slices.

    :param samples: uint8 [N, H, W, C], raw levels, not snapped to codes.
    :param channels: names of the C channels, Seg among them.
    :param tolerance: a level more than so many levels away from every code is off.
    :returns: float64 [N] in [0, 1].
    :raises ValueError: another shape or data type, names that do not fit, or no mask.
    """
    mask = _mask(samples, channels)
    return _off_code_levels(tolerance)[mask].mean(axis=(1, 2))


def _off_code_levels(tolerance: int) -> np.ndarray:
    """Which of the 256 levels are far from every code: bool [256]."""
    distance = np.abs(np.arange(256)[:, None] - np.array(MASK_CODES)).min(axis=1)
    return distance > tolerance


def mask_outside_brain(samples: np.ndarray, channels: Sequence[str]) -> np.ndarray:
    """Share of the tumour's pixels that no image channel shows as brain.

    The brain is the union of the channels' outlines, so that one channel that misses a dark edge
    does not count against the mask; whether the channels agree is :func:`channel_agreement`'s.

    :param samples: uint8 [N, H, W, C]; the mask is snapped to the nearest label codes.
    :param channels: names of the C channels, Seg and an image among them.
    :returns: float64 [N] in [0, 1]; 0 where the mask is empty.
    :raises ValueError: another shape or data type, names that do not fit, no mask or no image.
    """
    tumour = snap_mask(_mask(samples, channels)) > 0
    if not _image_indices(channels):
        raise ValueError(f"the channels {', '.join(channels)} hold no image beside the mask")
    return _share_outside(tumour, _outlines(samples, channels))


def _share_outside(tumour: np.ndarray, outlines: np.ndarray) -> np.ndarray:
    outside = tumour & ~outlines.any(axis=0)
    return outside.sum(axis=(1, 2)) / np.maximum(tumour.sum(axis=(1, 2)), 1)


def tumour_area(samples: np.ndarray, channels: Sequence[str]) -> np.ndarray:
    """Share of a slice's pixels whose nearest label code is a tumour's.

    :param samples: uint8 [N, H, W, C].
    :param channels: names of the C channels, Seg among them.
    :returns: float64 [N] in [0, 1].
    :raises ValueError: another shape or data type, names that do not fit, or no mask.
    """
    return (snap_mask(_mask(samples, channels)) > 0).mean(axis=(1, 2))


def empty_mask(samples: np.ndarray, channels: Sequence[str]) -> np.ndarray:
    """Whether the mask shows no tumour at all: bool [N]; arguments as of :func:`tumour_area`."""
    return tumour_area(samples, channels) == 0


def summary(samples: np.ndarray, channels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Means over the samples, each with its 95 % interval, see :func:`mean_interval`.

    - ``channel_agreement``: with two images or more,
    - ``black_background_share``: of samples whose every channel's :func:`background_level` is at
      most :data:`BACKGROUND_LEVEL`,
    - with a mask ``off_code_share``, ``empty_mask_share`` and ``tumour_area``; beside an image
      also ``mask_outside_brain``, over the samples that have a tumour.

    :param samples: uint8 [N, H, W, C].
    :param channels: names of the C channels.
    :returns: key -> ``{"value", "low", "high"}``. A measure that does not apply is absent.
    :raises ValueError: another shape or data type, or names that do not fit.
    """
    images = _image_indices(channels)
    levels = background_level(samples, channels)
    values = {}
    if len(images) > 1:
        values["channel_agreement"] = channel_agreement(samples, channels)
    values["black_background_share"] = (levels <= BACKGROUND_LEVEL).all(axis=1)
    if MASK_CHANNEL in channels:
        empty = empty_mask(samples, channels)
        values["off_code_share"] = off_code_share(samples, channels)
        if images and not empty.all():
            # An empty mask cannot lie outside; it would make the others look better.
            values["mask_outside_brain"] = mask_outside_brain(samples, channels)[~empty]
        values["empty_mask_share"] = empty
        values["tumour_area"] = tumour_area(samples, channels)
    return {name: mean_interval(own) for name, own in values.items()}


# --- every measure at once, limits from real slices, flags ---------------------------------------


@dataclass(frozen=True)
class Rule:
    """Beyond which value a measure flags a sample.

    The limit is ``factor * worst + margin``, where ``worst`` is about the worst of the real slices'
    values, see :func:`calibrate`. The margins leave room for real slices that calibration has not
    seen, of which a set of one or two slices has seen hardly any.
    """

    flag: str
    measure: str
    high_is_bad: bool
    factor: float
    margin: float
    words: str  # what the measure is


RULES = (
    Rule("noise_only", "neighbour_likeness", False, 0.5, 0, "likeness of neighbouring pixels"),
    Rule("noise_only", "label_changes", True, 1, 0.1, "share of neighbours of different labels"),
    Rule("constant", "contrast", False, 0.25, 0, "levels between the 1st and 99th percentile"),
    Rule("constant", "largest_label", True, 0.5, 0.5, "share of the slice that one label covers"),
    Rule("saturated", "white", True, 1, 0.25, "share of the tissue that is white"),
    Rule("drifted_background", "background_level", True, 1, 8, "median level of the background"),
    Rule("drifted_background", "background_spread", True, 1, 8, "spread of the background"),
    Rule("off_code", "off_code", True, 1, 0.05, "share of pixels far from every label code"),
    Rule("mask_outside", "mask_outside_brain", True, 1, 0.25, "share of the tumour outside"),
    Rule("channels_disagree", "channel_agreement", False, 1, -0.1, "agreement of the outlines"),
)
# A channel with one of these shows no slice, whose background or outline could be judged.
BROKEN = ("noise_only", "constant")
# The key, in place of a channel's name, of what the image channels show together.
ALL_IMAGES = "images"

# Of the real slices at least this share passes every limit that is calibrated on them.
REAL_PASS = 0.99
WHITE_LEVEL = 250
# Tissue counts as this share of the slice at least, so that a few bright pixels are not all of it.
LEAST_TISSUE = 1 / 16
# Pixels of one channel that are measured at once.
BLOCK_PIXELS = 2**22


@dataclass(frozen=True)
class Measured:
    """What :func:`measure` found.

    ``values`` is measure -> channel -> float64 [N], with the names of :data:`RULES` and
    ``label_51`` and so on, the share of the slice that each label of the tumour covers. The
    channel of ``channel_agreement`` is :data:`ALL_IMAGES`. A measure that does not apply is absent.
    """

    channels: tuple[str, ...]
    size: tuple[int, int]  # height and width
    values: dict[str, dict[str, np.ndarray]]
    count: int


@dataclass(frozen=True)
class Thresholds:
    """Limits of one kind of slices: plain numbers, so that ``asdict`` of it is JSON."""

    channels: tuple[str, ...]
    size: tuple[int, int]  # height and width; the likeness of neighbours depends on it
    limits: dict[str, dict[str, float]]  # measure -> channel -> limit


@dataclass(frozen=True)
class Flags:
    """What :func:`check` found.

    ``flagged`` is flag -> channel -> bool [N]. ``reasons`` lists every flag of every sample:
    ``{"index", "channel", "reason", "measure", "value", "limit"}``, in the order of the samples.
    """

    flagged: dict[str, dict[str, np.ndarray]]
    reasons: list[dict[str, Any]]
    count: int

    def any(self) -> np.ndarray:
        """Which samples have a flag: bool [N]."""
        return self._any(self.flagged)

    def broken(self, channels: Sequence[str]) -> np.ndarray:
        """Which samples have one of :data:`BROKEN` in one of the channels: bool [N]."""
        return self._any(
            {
                flag: {name: own for name, own in self.flagged[flag].items() if name in channels}
                for flag in BROKEN
                if flag in self.flagged
            }
        )

    def _any(self, flagged: Mapping[str, Mapping[str, np.ndarray]]) -> np.ndarray:
        found = np.zeros(self.count, dtype=bool)
        for own in flagged.values():
            for values in own.values():
                found |= values
        return found


def measure(
    samples: np.ndarray, channels: Sequence[str], *, progress: Progress = no_progress
) -> Measured:
    """Every measure of every sample, block by block, so that a memory-mapped set can be large.

    Of every channel: ``background_level`` and ``background_spread``, the median of the border
    frame and the levels between its 5th and 95th percentile; ``white``, the share of the tissue
    (what is :data:`TISSUE_LEVEL` above the background) at :data:`WHITE_LEVEL` or more.

    Of an image: ``contrast``, the levels between its 1st and 99th percentile;
    ``neighbour_likeness``, 1 - mean squared difference of neighbouring pixels / (2 variance): 0
    for white noise whatever its level and spread, about 0.9 for slices of 32 pixels and more for
    larger ones.

    Of the mask, snapped to label codes so that a few levels of residue are none:
    ``label_changes``, the share of neighbouring pixels with different labels (a tumour's outline is
    short, noise has changes everywhere); ``largest_label``, the share of the slice that the most
    frequent label of the tumour covers (an empty mask is no constant channel); ``label_51`` and so
    on. And of the raw mask ``off_code``, see :func:`off_code_share`.

    Of the whole sample: :func:`channel_agreement` and :func:`mask_outside_brain`.

    :param samples: uint8 [N, H, W, C], raw levels.
    :param channels: names of the C channels.
    :raises ValueError: another shape or data type, or names that do not fit.
    """
    check_samples(samples, channels)
    count, height, width, _ = samples.shape
    step = max(1, BLOCK_PIXELS // (height * width))
    starts = range(0, count, step)
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for start in progress(starts, total=len(starts), desc="measuring", unit="block"):
        block = np.asarray(samples[start : start + step])
        for name, of_channels in _measure_block(block, channels).items():
            for channel, values in of_channels.items():
                found.setdefault(name, {}).setdefault(channel, []).append(values)
    values = {
        name: {channel: np.concatenate(parts) for channel, parts in of_channels.items()}
        for name, of_channels in found.items()
    }
    return Measured(tuple(channels), (height, width), values, count)


def _measure_block(
    samples: np.ndarray, channels: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    values: dict[str, dict[str, np.ndarray]] = {}

    def keep(name: str, channel: str, own: np.ndarray) -> None:
        values.setdefault(name, {})[channel] = own

    for index, channel in enumerate(channels):
        levels = np.ascontiguousarray(samples[..., index])
        frame = np.percentile(_frame(levels), [5, 50, 95], axis=1)
        keep("background_level", channel, frame[1])
        keep("background_spread", channel, frame[2] - frame[0])
        shares = _level_shares(levels)
        keep("white", channel, _white_share(shares, frame[1]))
        if channel == MASK_CHANNEL:
            labels = snap_mask(levels)
            keep("label_changes", channel, _mean_of_neighbours(np.not_equal, labels))
            of_labels = {code: (labels == code).mean(axis=(1, 2)) for code in MASK_CODES[1:]}
            keep("largest_label", channel, np.max(list(of_labels.values()), axis=0))
            for code, share in of_labels.items():
                keep(f"label_{code}", channel, share)
            keep("off_code", channel, shares[:, _off_code_levels(CODE_TOLERANCE)].sum(axis=1))
        else:
            keep("contrast", channel, _contrast(shares))
            keep("neighbour_likeness", channel, _neighbour_likeness(levels, shares))

    outlines = _outlines(samples, channels)
    if len(outlines) > 1:
        keep("channel_agreement", ALL_IMAGES, _agreement(outlines))
    if len(outlines) and MASK_CHANNEL in channels:
        tumour = snap_mask(_mask(samples, channels)) > 0
        keep("mask_outside_brain", MASK_CHANNEL, _share_outside(tumour, outlines))
    return values


def _level_shares(images: np.ndarray) -> np.ndarray:
    """Share of the pixels at each level: float64 [N, 256], of images [N, H, W]."""
    count = len(images)
    flat = images.reshape(count, -1) + 256 * np.arange(count)[:, None]
    return np.bincount(flat.ravel(), minlength=256 * count).reshape(count, 256) / flat.shape[1]


def _white_share(shares: np.ndarray, background: np.ndarray) -> np.ndarray:
    tissue = (shares * (np.arange(256) > background[:, None] + TISSUE_LEVEL)).sum(axis=1)
    white = shares[:, WHITE_LEVEL:].sum(axis=1)
    return np.minimum(white / np.maximum(tissue, LEAST_TISSUE), 1)


def _contrast(shares: np.ndarray) -> np.ndarray:
    below = shares.cumsum(axis=1)
    low, high = (np.argmax(below > share, axis=1) for share in (0.01, 0.99))
    return (high - low).astype(np.float64)


def _neighbour_likeness(images: np.ndarray, shares: np.ndarray) -> np.ndarray:
    mean = shares @ np.arange(256)
    variance = shares @ np.arange(256) ** 2 - mean**2
    difference = _mean_of_neighbours(lambda a, b: np.square(a.astype(np.float32) - b), images)
    # A constant channel has no noise; it is flagged for its contrast.
    return np.where(variance > 1e-6, 1 - difference / np.maximum(2 * variance, 1e-6), 1.0)


def _mean_of_neighbours(
    function: Callable[[np.ndarray, np.ndarray], np.ndarray], images: np.ndarray
) -> np.ndarray:
    """Mean of a function of two images over pixels and their lower and right neighbours, [N]."""
    down = function(images[:, 1:], images[:, :-1])
    right = function(images[:, :, 1:], images[:, :, :-1])
    total = down.sum(axis=(1, 2), dtype=np.float64) + right.sum(axis=(1, 2), dtype=np.float64)
    return total / max(1, down[0].size + right[0].size)


def calibrate(real: Measured) -> Thresholds:
    """Set the limits from real slices, so that at least 99 % of them pass every one.

    Each limit lies a margin beyond the worst real value, see :class:`Rule`, where an equal part of
    the 1 % is left out at each limit: a few damaged slices in a large set do not widen the limits.
    In sets of fewer than some thousand slices that is none, and the worst counts.

    The limits belong to one kind of slices: their channels, size and intensity scaling.
    """
    rules = [(rule, channel) for rule in RULES for channel in real.values.get(rule.measure, {})]
    left_out = int((1 - REAL_PASS) / len(rules) * real.count)
    limits: dict[str, dict[str, float]] = {}
    for rule, channel in rules:
        values = np.sort(real.values[rule.measure][channel])
        worst = values[-1 - left_out if rule.high_is_bad else left_out]
        # A margin is in proportion to sound slices; of others it must not be on the wrong side.
        outer = max if rule.high_is_bad else min
        limit = outer(worst, rule.factor * worst + rule.margin)
        limits.setdefault(rule.measure, {})[channel] = float(limit)
    return Thresholds(real.channels, real.size, limits)


def check(samples: Measured, thresholds: Thresholds) -> Flags:
    """Flag the samples that no real slice resembles, with the reasons.

    Flags of a channel: ``noise_only``, ``saturated``, ``constant``, and ``drifted_background``; of
    the mask also ``off_code`` and ``mask_outside``; of the images together ``channels_disagree``.
    The background of a channel that is all noise or constant is not judged, nor is what depends on
    such a channel, so that this failure is not counted again under other names.

    :raises ValueError: the limits belong to other channels or another size.
    """
    if (tuple(thresholds.channels), tuple(thresholds.size)) != (samples.channels, samples.size):
        raise ValueError(
            f"the limits are those of slices of {_kind(thresholds)}, but the samples are of "
            f"{_kind(samples)}: calibrate on real slices of the same channels and size"
        )
    beyond = {
        (rule, channel): (values > limit if rule.high_is_bad else values < limit)
        for rule in RULES
        for channel, values in samples.values.get(rule.measure, {}).items()
        for limit in [thresholds.limits[rule.measure][channel]]
    }
    constant = {channel: own for (rule, channel), own in beyond.items() if rule.flag == "constant"}
    broken = {channel: np.zeros(samples.count, dtype=bool) for channel in samples.channels}
    for (rule, channel), own in beyond.items():
        if rule.measure == "neighbour_likeness":
            own &= ~constant[channel]  # one or two levels of residue around a grey
        if rule.flag in BROKEN:
            broken[channel] |= own
    images = np.any([broken[name] for name in broken if name != MASK_CHANNEL], axis=0)
    for (rule, channel), own in beyond.items():
        if rule.flag == "drifted_background":
            own &= ~broken[channel]
        elif rule.flag == "channels_disagree":
            own &= ~images
        elif rule.flag == "mask_outside":
            own &= ~(images | broken[channel])

    flagged: dict[str, dict[str, np.ndarray]] = {}
    reasons = []
    for (rule, channel), own in beyond.items():
        of_channels = flagged.setdefault(rule.flag, {})
        of_channels[channel] = of_channels.get(channel, False) | own
        for index in np.flatnonzero(own).tolist():
            reasons.append(
                {
                    "index": index,
                    "channel": channel,
                    "reason": rule.flag.replace("_", " "),
                    "measure": rule.words,
                    "value": float(samples.values[rule.measure][channel][index]),
                    "limit": thresholds.limits[rule.measure][channel],
                }
            )
    reasons.sort(key=lambda reason: reason["index"])
    return Flags(flagged, reasons, samples.count)


def _kind(own: Measured | Thresholds) -> str:
    height, width = own.size
    return f"{height} x {width} pixels, channels {', '.join(own.channels)}"


def report(samples: Measured, flags: Flags, patients: np.ndarray | None = None) -> dict[str, Any]:
    """Shares and means of one set; take it of the real slices and of the samples to compare them.

    Every number is ``{"value", "low", "high"}`` with its 95 % interval: :func:`share_interval` of
    a share of the samples, :func:`mean_interval` of a mean. Without ``patients`` the intervals take
    samples for independent.

    - ``valid_share``: of samples without a flag,
    - ``flagged``: flag -> channel -> share of the samples,
    - ``background_level`` and ``background_spread``: channel -> mean,
    - ``channel_agreement``, ``off_code_share``, ``mask_outside_brain``, ``empty_mask_share``,
      ``tumour_area``, and ``label_shares``: label code -> share of the slice.

    ``off_code_share`` is that of all masks. The others leave out the channels that are all noise or
    constant, and samples whose measure depends on one, so that a mask of noise is no large tumour;
    how many these are is in ``flagged``. The mean of none is absent. ``mask_outside_brain`` is the
    mean over the samples with a tumour.

    :param patients: [N], whose slice each is, of a set that holds several of one patient. Then the
        intervals cover the chance in the patients; ``patients`` in the result is their number.
    """
    values = samples.values
    images = [name for name in samples.channels if name != MASK_CHANNEL]
    whole = {name: ~flags.broken([name]) for name in samples.channels}
    whole_images = ~flags.broken(images)
    everyone = np.ones(samples.count, dtype=bool)

    def of(kept: np.ndarray) -> np.ndarray | None:
        return None if patients is None else patients[kept]

    def share(found: np.ndarray, kept: np.ndarray = everyone) -> dict[str, float]:
        return share_interval(found[kept], of(kept))

    def mean(largest: float, own: np.ndarray, kept: np.ndarray) -> dict[str, float]:
        return _mean_up_to(largest, own[kept], of(kept))

    found: dict[str, Any] = {"samples": samples.count}
    if patients is not None:
        found["patients"] = len(np.unique(patients))
    found |= {
        "valid_share": share(~flags.any()),
        "flagged": {
            flag: {channel: share(own) for channel, own in of_channels.items()}
            for flag, of_channels in flags.flagged.items()
        },
    }
    for name in ("background_level", "background_spread"):
        found[name] = {
            channel: mean(255, own, whole[channel])
            for channel, own in values[name].items()
            if whole[channel].any()
        }
    means = {}
    if "channel_agreement" in values:
        means["channel_agreement"] = values["channel_agreement"][ALL_IMAGES], whole_images
    if MASK_CHANNEL in samples.channels:
        means["off_code_share"] = values["off_code"][MASK_CHANNEL], everyone
        labels = {code: values[f"label_{code}"][MASK_CHANNEL] for code in MASK_CODES[1:]}
        area = np.sum(list(labels.values()), axis=0)
        whole_mask = whole[MASK_CHANNEL]
        if images:
            outside = values["mask_outside_brain"][MASK_CHANNEL]
            means["mask_outside_brain"] = outside, whole_mask & whole_images & (area > 0)
        means["tumour_area"] = area, whole_mask
        if whole_mask.any():
            found["empty_mask_share"] = share(area == 0, whole_mask)
            found["label_shares"] = {
                str(code): mean(1, own, whole_mask) for code, own in labels.items()
            }
    found.update({name: mean(1, own, kept) for name, (own, kept) in means.items() if kept.any()})
    return found


def _mean_up_to(
    largest: float, values: np.ndarray, patients: np.ndarray | None
) -> dict[str, float]:
    """The mean of values in [0, largest]; of a single one nothing narrower is known than that."""
    found = mean_interval(values, patients, largest)
    return found if len(values) > 1 else {**found, "low": 0.0, "high": float(largest)}


def _image_indices(channels: Sequence[str]) -> list[int]:
    return [i for i, name in enumerate(channels) if name != MASK_CHANNEL]


def check_samples(samples: np.ndarray, channels: Sequence[str]) -> None:
    for name in channels:
        if name not in CHANNELS:
            raise ValueError(
                f"there is no channel {name!r}; the channels are {', '.join(CHANNELS)}"
            )
    if len(set(channels)) < len(channels):
        raise ValueError(f"the channels {', '.join(channels)} name one more than once")
    if samples.dtype != np.uint8 or samples.ndim != 4 or 0 in samples.shape:
        raise ValueError(
            "samples are a uint8 array of shape [N, H, W, C], none of them 0, found "
            f"{samples.dtype} {list(samples.shape)}"
        )
    if samples.shape[3] != len(channels):
        raise ValueError(
            f"the samples have {samples.shape[3]} channels, but {len(channels)} are named "
            f"({', '.join(channels)}): name each once"
        )


def _mask(samples: np.ndarray, channels: Sequence[str]) -> np.ndarray:
    """The mask [N, H, W] of samples."""
    check_samples(samples, channels)
    if MASK_CHANNEL not in channels:
        raise ValueError(f"the channels {', '.join(channels)} hold no mask ({MASK_CHANNEL})")
    return samples[..., list(channels).index(MASK_CHANNEL)]
