"""Whether a sample can be a slice at all: measures that need no other set to compare with.

Samples are uint8 [N, H, W, C], as the network made them, with the names of their channels. The
mask (channel Seg) holds grey label codes. Real slices are exactly 0 outside of the head.

Legend: N samples, H, W height and width, C channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from improved_diffusion.brats import CHANNELS, MASK_CHANNEL, MASK_CODES, snap_mask

# How many levels of 255 above its background a pixel shows tissue. Higher than what a network
# leaves in a background; lower than the surface of the brain, which partial volume darkens.
TISSUE_LEVEL = 20
# Levels up to which a pixel of a mask counts as its nearest label code.
CODE_TOLERANCE = 12
# The eye takes a background above this level for grey.
BACKGROUND_LEVEL = 1
# The width of the border frame, in which a slice shows no head, as a share of the shorter side.
FRAME = 1 / 16

BOOTSTRAP_DRAWS = 1000


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
    dark = images <= background + threshold
    # The outside is what is dark and reaches the border through dark pixels.
    outside = dark.copy()
    outside[:, 1:-1, 1:-1] = False
    before = -1
    while (count := np.count_nonzero(outside)) != before:
        before = count
        for axis, backward in itertools.product((1, 2), (False, True)):
            _sweep(outside, dark, axis, backward)
    return ~outside


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
    _check(samples, channels)
    outlines = [brain_outline(samples[..., i]) for i in _image_indices(channels)]
    pairs = list(itertools.combinations(outlines, 2))
    if not pairs:
        return np.full(len(samples), np.nan)
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
    _check(samples, channels)
    return np.stack([_frame_median(samples[..., i]) for i in range(len(channels))], axis=1)


def _frame_median(images: np.ndarray) -> np.ndarray:
    """Median of the border frame, [N], of images [N, H, W]."""
    width = max(1, round(min(images.shape[1:]) * FRAME))
    frame = np.ones(images.shape[1:], dtype=bool)
    frame[width:-width, width:-width] = False
    return np.median(images[:, frame], axis=1)


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
    distance = np.abs(np.arange(256)[:, None] - np.array(MASK_CODES)).min(axis=1)
    return (distance > tolerance)[mask].mean(axis=(1, 2))


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
    images = _image_indices(channels)
    if not images:
        raise ValueError(f"the channels {', '.join(channels)} hold no image beside the mask")
    brain = np.any([brain_outline(samples[..., i]) for i in images], axis=0)
    return (tumour & ~brain).sum(axis=(1, 2)) / np.maximum(tumour.sum(axis=(1, 2)), 1)


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


def mean_interval(values: np.ndarray) -> dict[str, float]:
    """The mean and its 95 % interval: percentiles of bootstrap draws of the samples.

    The seed is fixed, so equal values give equal intervals. The interval covers the chance in
    which samples were drawn, not in how the model was trained. Its width is 0 where all values are
    equal; of N samples that all pass, the share in truth may still be as low as 1 - 3 / N.

    :param values: [N], numbers or bool.
    :returns: ``{"value", "low", "high"}``.
    :raises ValueError: no values.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        raise ValueError("there are no values to take the mean of: give at least one sample")
    rng = np.random.default_rng(0)
    means = [values[rng.integers(0, n, n)].mean() for _ in range(BOOTSTRAP_DRAWS)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


def _image_indices(channels: Sequence[str]) -> list[int]:
    return [i for i, name in enumerate(channels) if name != MASK_CHANNEL]


def _check(samples: np.ndarray, channels: Sequence[str]) -> None:
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
    _check(samples, channels)
    if MASK_CHANNEL not in channels:
        raise ValueError(f"the channels {', '.join(channels)} hold no mask ({MASK_CHANNEL})")
    return samples[..., list(channels).index(MASK_CHANNEL)]
