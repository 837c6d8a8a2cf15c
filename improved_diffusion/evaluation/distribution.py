"""How far a set of samples is from a set of real slices.

:func:`table` measures all of it: Frechet and kernel distance, precision, recall, density and
coverage on the features of an extractor (:mod:`improved_diffusion.evaluation.extractors`), and the
multi-scale similarity of random pairs on the images themselves. The functions below it take
features or images, and know no extractor.

The features that need no file are those of a fixed random network and radial power spectra. Random
features tell sets apart by texture, contrast, shape and sharpness, but weigh them in no human way:
distances on them are not FID or KID, whose names stand for the Inception network, and compare only
with distances on the same features.

Intervals are of 95 %; :data:`INTERVALS` says what each covers. Where the patients of a set's slices
are given, patients are what was drawn by chance, else each image alone.

Shapes: samples are uint8 [N, H, W, C]; features are float64 [N, D].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from improved_diffusion.brats import MASK_CHANNEL, MASK_CODES
from improved_diffusion.evaluation import intervals, validity

if TYPE_CHECKING:
    from improved_diffusion.evaluation.extractors import Extractor

# Convolutions of the random network, each followed by halving the resolution.
WIDTHS = (16, 32, 32)
SPECTRUM_BINS = 12
# Power below this, of images in [-1, 1], counts as none: about that of rounding to 8 bits.
LEAST_POWER = 1e-5
# Rows and columns of the kernel that are in memory at once.
BLOCK = 2048
# A feature that varies less than this in the reference set tells rounding from nothing.
LEAST_DEVIATION = 1e-6
# Deviations that :func:`scale` divides by are at least this: ten times what one level more or less
# in each pixel does to the random features.
LEAST_SCALE = 1e-3

ALL = "all"  # the key of what is measured on all channels together
NEIGHBOURS = 5
# Squared distances that differ by less than this share of the features' mean square are equal:
# of float32 features of equal images, which rounding moves apart.
TIE = 1e-9

PAIRS = 1000
# Wang et al. 2003: the exponents of the scales, from the finest, and the window.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW, WINDOW_DEVIATION = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

# What the interval of each measure covers. Where a set's patients are known, they are drawn in the
# place of its images.
INTERVALS = {
    "frechet_distance": "no interval: its bias exceeds its chance error, compare with the floor",
    "kernel_distance": "the chance in both sets",
    "precision": "the chance in the samples, with the balls of the real slices as they are",
    "recall": "the chance in the real slices, with the balls of the samples as they are",
    "density": "the chance in both sets, with the balls' radii as they are",
    "coverage": "the chance in the real slices, with their balls and the samples as they are",
    "ms_ssim": "the chance in its one set",
}

Entry = dict[str, Any]


def features(samples: np.ndarray, *, batch_size: int = 256) -> np.ndarray:
    """Random features and power spectra, [N, D]: D is 160 and 12 for each channel.

    :raises ValueError: samples of another type or shape, or smaller than 16 pixels.
    """
    if samples.dtype != np.uint8 or samples.ndim != 4 or min(samples.shape[1:3]) < 16:
        raise ValueError(
            f"expected samples as uint8 [N, H, W, C] of 16 pixels or more, found {samples.dtype} "
            f"{list(samples.shape)}"
        )
    parts = []
    for start in range(0, len(samples), batch_size):
        batch = torch.from_numpy(samples[start : start + batch_size].copy())
        images = batch.permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(np.concatenate([random_features(images), power_spectrum(images)], axis=1))
    return np.concatenate(parts)


@torch.no_grad()
def random_features(images: torch.Tensor) -> np.ndarray:
    """Means and deviations over the positions in every layer of a random network, [N, 160].

    Its weights are normal with variance 1 / inputs from a fixed seed, which keeps the size of the
    activations, and its nonlinearity is the absolute value: cut off at 0 instead, some units would
    be 0 for nearly all slices, and a few slices would decide a distance.

    :param images: float32 [N, C, H, W] in [-1, 1].
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    h = images
    for width in WIDTHS:
        inputs = h.shape[1] * 9
        weight = torch.randn(width, h.shape[1], 3, 3, generator=generator) * math.sqrt(1 / inputs)
        h = functional.conv2d(h, weight, padding=1).abs()
        flat = h.flatten(2)
        found += [flat.mean(dim=2), flat.std(dim=2)]
        h = functional.avg_pool2d(h, 2)
    return torch.cat(found, dim=1).double().numpy()


def power_spectrum(images: torch.Tensor) -> np.ndarray:
    """Logarithm of the mean power in 12 rings of equal width in frequency, [N, 12 C].

    The outermost ring ends at the highest frequency along an axis.

    :param images: float32 [N, C, H, W].
    """
    n, channels, height, width = images.shape
    power = torch.fft.fft2(images.double(), norm="ortho").abs() ** 2
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    ring = np.ceil(radius / 0.5 * SPECTRUM_BINS).astype(int).ravel() - 1  # -1: the mean
    rings = [
        power.reshape(n, channels, -1)[:, :, torch.from_numpy(ring == own)].mean(dim=2)
        for own in range(SPECTRUM_BINS)
    ]
    return (torch.stack(rings, dim=2) + LEAST_POWER).log().reshape(n, -1).numpy()


def standardise(reference: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """All sets of features, scaled so that the first has mean 0 and deviation 1 in each.

    A feature that is constant there is left out.
    """
    mean, deviation = reference.mean(axis=0), reference.std(axis=0)
    kept = deviation > LEAST_DEVIATION
    return [(own[:, kept] - mean[kept]) / deviation[kept] for own in (reference, *others)]


def scale(reference: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """As :func:`standardise`, but a feature that is constant in the reference set stays.

    A set that differs in what never varies there (a channel that is always black) is seen so. The
    least deviation is :data:`LEAST_SCALE`.
    """
    mean, deviation = reference.mean(axis=0), reference.std(axis=0).clip(min=LEAST_SCALE)
    return [(own - mean) / deviation for own in (reference, *others)]


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of the Gaussians that fit two sets, Heusel et al. 2017, Eq. 6.

    With few samples for its dimension it is too large, the more the fewer.

    :param a: features [N, D]; ``b`` [M, D]; 2 samples or more in each.
    """
    gap = a.mean(axis=0) - b.mean(axis=0)
    # The covariances are root_a' root_a and root_b' root_b.
    root_a, root_b = ((own - own.mean(axis=0)) / math.sqrt(len(own) - 1) for own in (a, b))
    traces = (root_a**2).sum() + (root_b**2).sum()
    squared = gap @ gap + traces - 2 * _cross_trace(root_a, root_b)
    return max(0.0, float(squared))  # rounding


def _cross_trace(root_a: np.ndarray, root_b: np.ndarray) -> float:
    """tr sqrt(A B) of A = root_a' root_a and B = root_b' root_b."""
    n, m, d = len(root_a), len(root_b), root_a.shape[1]
    if n * m <= d * d:
        # The eigenvalues of A B that are not 0 are the squared singular values of root_a root_b'.
        return np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    # tr sqrt(A B) = tr sqrt(sqrt(A) B sqrt(A)), whose argument is symmetric.
    values, vectors = np.linalg.eigh(root_a.T @ root_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    inner = root @ (root_b.T @ root_b) @ root
    return np.sqrt(np.linalg.eigvalsh(inner).clip(min=0)).sum()


def kernel_distance(
    a: np.ndarray,
    b: np.ndarray,
    patients_a: np.ndarray | None = None,
    patients_b: np.ndarray | None = None,
) -> dict[str, float]:
    """Unbiased squared maximum mean discrepancy of two sets, with its 95 % interval.

    The kernel is (x y / D + 1) ** 3, Binkowski et al. 2018, section 4. The expected value is 0
    where both sets come from one distribution, so that values below 0 happen. The interval is
    normal with the jackknife's variance, over the samples of both sets; drawing with replacement
    would make pairs of equal samples, which bias the estimate.

    Of a set whose patients are given the jackknife leaves out patients, each with all of its
    slices, and the interval is Student's for the set with fewer. The estimate stays: it takes pairs
    of slices of one patient for pairs like others, so that few patients make it larger.

    :param a: features [N, D], see :func:`standardise`; ``b`` [M, D]; 3 samples or more in each.
    :param patients_a: [N], whose slice each is; ``patients_b`` [M].
    :return: ``value``, ``low``, ``high``, ``error`` (the standard error); only ``value`` where a
        set without one of its patients holds no pair.
    """
    n, m = len(a), len(b)
    if min(n, m) < 3:
        raise ValueError(f"a kernel distance needs 3 samples or more of each set, found {n}, {m}")
    rows_a, rows_b = _sums_to_others(a), _sums_to_others(b)
    cross_a, cross_b = _kernel_sums(a, b)
    within_a, within_b, between = rows_a.sum(), rows_b.sum(), cross_a.sum()

    value = _discrepancy(within_a, n, within_b, m, between)
    own_a, of_a, left_a = _left_out(a, rows_a, cross_a, patients_a)
    own_b, of_b, left_b = _left_out(b, rows_b, cross_b, patients_b)
    if np.min(left_a) < 2 or np.min(left_b) < 2:
        return {"value": float(value)}
    without_a = _discrepancy(within_a - own_a, left_a, within_b, m, between - of_a)
    without_b = _discrepancy(within_a, n, within_b - own_b, left_b, between - of_b)
    draws_a, draws_b = len(without_a), len(without_b)
    variance = without_a.var() * (draws_a - 1) + without_b.var() * (draws_b - 1)
    error = math.sqrt(variance)
    drawn = [len(of) for of, own in ((of_a, patients_a), (of_b, patients_b)) if own is not None]
    off = _errors_off(drawn) * error
    return {
        "value": float(value),
        "low": float(value - off),
        "high": float(value + off),
        "error": error,
    }


def _left_out(
    own: np.ndarray, rows: np.ndarray, cross: np.ndarray, patients: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | int]:
    """What goes with each image, or each patient, of sums of the kernel; how many images stay.

    :param own: features [N, D]; ``rows`` [N] are their sums to the others of their set, ``cross``
        [N] to the other set.
    """
    if patients is None:
        return 2 * rows, cross, len(own) - 1
    numbers, count = intervals.numbered(patients)
    inside = np.array([_sums_to_others(own[numbers == i]).sum() for i in range(count)])
    sizes = np.bincount(numbers)
    # Pairs inside a patient are in the rows of both.
    within = 2 * np.bincount(numbers, rows) - inside
    return within, np.bincount(numbers, cross), len(own) - sizes


def _errors_off(drawn: Sequence[int]) -> float:
    """Standard errors from a value to its interval's ends, with these numbers of patients."""
    return intervals.student(min(drawn)) if drawn else 1.96


def _discrepancy(
    within_a: np.ndarray,
    n: np.ndarray | int,
    within_b: np.ndarray,
    m: np.ndarray | int,
    between: np.ndarray,
) -> np.ndarray:
    """The estimate from sums of the kernel over pairs, of which those within leave out i = j."""
    return within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * between / (n * m)


def _kernel_sums(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the kernel over ``b`` for each of ``a``, and the other way round."""
    of_a, of_b = np.zeros(len(a)), np.zeros(len(b))
    for i in range(0, len(a), BLOCK):
        for j in range(0, len(b), BLOCK):
            block = (a[i : i + BLOCK] @ b[j : j + BLOCK].T / a.shape[1] + 1) ** 3
            of_a[i : i + BLOCK] += block.sum(axis=1)
            of_b[j : j + BLOCK] += block.sum(axis=0)
    return of_a, of_b


def _sums_to_others(a: np.ndarray) -> np.ndarray:
    itself = ((a * a).sum(axis=1) / a.shape[1] + 1) ** 3
    return _kernel_sums(a, a)[0] - itself


# ------------------------------------------------------------------- precision, recall, density ...


def manifold_measures(
    real: np.ndarray,
    samples: np.ndarray,
    neighbours: int = NEIGHBOURS,
    real_patients: np.ndarray | None = None,
    sample_patients: np.ndarray | None = None,
) -> dict[str, Entry]:
    """Precision, recall, density and coverage on balls around the features of each image.

    A ball reaches to its centre's k-th nearest neighbour in its own set; where the set's patients
    are given, to the k-th nearest slice of other patients. (A patient's own slices, which lie close
    to each other, would make the balls so small that few slices of new patients fall into one.)
    Precision is the share of samples in a real image's ball, recall the share of real images in a
    sample's (Kynkaanniemi et al. 2019); density the mean number of real balls that a sample lies
    in, over k, and coverage the share of real balls that hold a sample (Naeem et al. 2020).

    Equal images are common among masks, and their balls, of radius 0, hold each other. Density
    therefore counts each ball over the number of real images in it (of other patients); without
    ties these are k, as published. Of a set with itself, precision, recall and coverage are 1;
    density is 1 + 1 / k, and more with patients. All four depend on both counts. The intervals, see
    :func:`.intervals.mean_interval`, hold the balls fixed. Precision is a mean over the samples,
    recall and coverage are over the real images, and their intervals cover the chance in these.
    Density is both: its interval covers the samples and, where they are given, the real patients,
    with the two distances from the value added as independent errors are (Zou & Donner 2008).

    :param real: features [N, D]; ``samples`` [M, D].
    :param neighbours: k. What needs balls of k images or fewer has no value, but the reason.
    :param real_patients: [N], whose slice each is, where several are of one patient;
        ``sample_patients`` [M].
    :return: ``{"value", "low", "high"}`` for each, or ``{"value": None, "reason"}``.
    """
    n, m = len(real), len(samples)
    measured: dict[str, Entry] = {}
    tie = TIE * (real**2).sum(axis=1).mean()
    centre = real.mean(axis=0)  # distances stay; cancellation becomes less
    real, samples = real - centre, samples - centre
    reason = _too_few(n, "real images", neighbours, real_patients)
    if not reason:
        radii, held = _balls(real, neighbours, tie, real_patients)
        inside = np.zeros(m, dtype=bool)
        density = np.zeros(m)
        reached = np.zeros(n)
        for rows, distances in _squared_distances(samples, real):
            hit = distances <= radii + tie
            inside[rows] = hit.any(axis=1)
            density[rows] = hit @ (1 / held)
            reached += hit.sum(axis=0)
        measured["precision"] = intervals.mean_interval(inside, sample_patients, 1)
        measured["density"] = intervals.mean_interval(density, sample_patients)
        if real_patients is not None:
            of_real = intervals.mean_interval(reached / held * (n / m), real_patients)
            measured["density"] = _both(measured["density"], of_real)
        measured["coverage"] = intervals.mean_interval(reached > 0, real_patients, 1)
    else:
        measured |= {key: without_value(reason) for key in ("precision", "density", "coverage")}
    reason = _too_few(m, "samples", neighbours, sample_patients)
    if not reason:
        radii, _ = _balls(samples, neighbours, tie, sample_patients)
        found = np.zeros(n, dtype=bool)
        for rows, distances in _squared_distances(real, samples):
            found[rows] = (distances <= radii + tie).any(axis=1)
        measured["recall"] = intervals.mean_interval(found, real_patients, 1)
    else:
        measured["recall"] = without_value(reason)
    return {key: measured[key] for key in ("precision", "recall", "density", "coverage")}


def _both(one: Entry, other: Entry) -> Entry:
    """The value of one, with the interval of two independent errors; none if either has none."""
    value = one["value"]
    if "low" not in one or "low" not in other:
        return {"value": value}
    below, above = (
        math.hypot(*(abs(own[end] - own["value"]) for own in (one, other)))
        for end in ("low", "high")
    )
    return {"value": value, "low": max(0.0, value - below), "high": value + above}


def without_value(reason: str) -> Entry:
    """What stands in the place of a number that these sets do not give."""
    return {"value": None, "reason": reason}


def _too_few(count: int, what: str, neighbours: int, patients: np.ndarray | None) -> str:
    """Why some image of a set has no k-th neighbour; empty: all have one."""
    if count <= neighbours:
        least = neighbours + 1
        return f"{count} {what}, but a ball to neighbour {neighbours} needs {least} or more"
    if patients is not None:
        most = np.unique(patients, return_counts=True)[1].max()
        if count - most < neighbours:
            return (
                f"{count} {what}, {most} of one patient, but a ball to neighbour {neighbours} needs"
                f" {neighbours} or more of other patients"
            )
    return ""


def _balls(
    features: np.ndarray, neighbours: int, tie: float, patients: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance to the k-th nearest other, [N], and how many others are as near, [N].

    With ``patients`` [N] others are images of other patients.
    """
    radii, held = np.empty(len(features)), np.empty(len(features))
    own = np.arange(len(features)) if patients is None else intervals.numbered(patients)[0]
    for rows, distances in _squared_distances(features, features):
        distances[own[rows, None] == own] = np.inf
        radii[rows] = np.partition(distances, neighbours - 1, axis=1)[:, neighbours - 1]
        held[rows] = (distances <= radii[rows, None] + tie).sum(axis=1)
    return radii, held


def _squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of ``a`` and their squared distances to all of ``b``, BLOCK x BLOCK numbers at once."""
    squares = (b * b).sum(axis=1)
    step = max(1, BLOCK * BLOCK // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        own = a[rows]
        distances = (own * own).sum(axis=1)[:, None] + squares - 2 * own @ b.T
        yield rows, distances.clip(min=0)


# -------------------------------------------------------------------------- similarity of pairs


def multi_scale_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multi-scale structural similarity of each pair of images, Wang et al. 2003, Eq. 7.

    The window is Gaussian, 11 pixels wide, and never leaves the image; a negative mean of a scale
    counts as 0. The published five scales need 176 pixels. Smaller images have as many scales as
    the window fits, with the first exponents, divided by their sum, so that values compare only
    between images of one size.

    :param a: uint8 [N, H, W] of 11 pixels or more; ``b`` of the same shape.
    :return: float64 [N] in [0, 1]; 1 for equal images.
    """
    scales = sum(min(a.shape[1:]) >> i >= WINDOW for i in range(len(SCALE_WEIGHTS)))
    weights = np.array(SCALE_WEIGHTS[:scales]) / sum(SCALE_WEIGHTS[:scales])
    images = torch.from_numpy(np.stack([a, b])).float()  # [2, N, H, W]
    result = np.ones(len(a))
    for i, weight in enumerate(weights):
        luminance, contrast = _similarity(images)
        own = luminance * contrast if i == scales - 1 else contrast
        result *= own.mean(dim=(1, 2)).double().numpy().clip(min=0) ** weight
        images = functional.avg_pool2d(images, 2)
    return result


def _similarity(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Luminance and contrast-structure terms at each position of the window, [N, h, w].

    :param images: float32 [2, N, H, W], levels from 0 to 255.
    """
    # Rounding would make a variance of what is constant and bright.
    shift = images.mean(dim=(2, 3), keepdim=True)
    down, across = (_window_matrix(size) for size in images.shape[2:])

    def smooth(maps: torch.Tensor) -> torch.Tensor:  # [N, H, W] to [N, h, w]
        return down @ maps @ across.T

    a, b = images - shift
    mean_a, mean_b = smooth(a), smooth(b)
    variances = smooth(a * a + b * b) - mean_a**2 - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + shift[0], mean_b + shift[1]
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return luminance, (2 * covariance + C2) / (variances + C2)


def _window_matrix(size: int) -> torch.Tensor:
    """The Gaussian window at each position along an axis, [size - 10, size]."""
    offsets = torch.arange(WINDOW) - WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * WINDOW_DEVIATION**2))
    matrix = torch.zeros(size - WINDOW + 1, size)
    for i in range(len(matrix)):
        matrix[i, i : i + WINDOW] = window / window.sum()
    return matrix


def diversity(
    images: np.ndarray,
    channels: Sequence[str],
    pairs: int = PAIRS,
    seed: int = 0,
    patients: np.ndarray | None = None,
    chosen: np.ndarray | None = None,
) -> dict[str, Entry]:
    """Mean multi-scale similarity of random pairs of a set: 1 where all images are equal.

    The black background alone makes it high; it compares with that of real images of one size.
    :data:`ALL` is the mean over the channels of a pair. The interval is normal with the
    jackknife's variance over the images; over the patients, and Student's, where these are given.

    :param images: uint8 [N, H, W, C]; a memory map is read pair by pair.
    :param channels: names of the C channels, or none.
    :param pairs: how many distinct pairs are drawn; all of them, where there are no more.
    :param patients: [N], whose slice each is, where several are of one patient.
    :param chosen: numbers of the images that make the set, N of them; None: all.
    :return: ``{"value", "low", "high", "pairs"}``, or ``{"value": None, "reason"}``, for each
        channel and for all.
    """
    chosen = np.arange(len(images)) if chosen is None else chosen
    n, (height, width, count) = len(chosen), images.shape[1:]
    keys = [*channels, ALL]
    if n < 2 or min(height, width) < WINDOW:
        reason = (
            f"a pair needs 2 images, found {n}"
            if n < 2
            else f"the window needs {WINDOW} pixels, found {height} x {width}"
        )
        return {key: without_value(reason) for key in keys}
    first, second = random_pairs(n, pairs, seed)
    step = max(1, 2**20 // (height * width))
    values = np.empty((len(first), count))
    for start in range(0, len(first), step):
        rows = slice(start, start + step)
        a, b = images[chosen[first[rows]]], images[chosen[second[rows]]]
        for i in range(count):
            values[rows, i] = multi_scale_similarity(a[..., i], b[..., i])
    columns = [*(values.T if channels else []), values.mean(axis=1)]
    return {key: _pair_mean(own, first, second, n, patients) for key, own in zip(keys, columns)}


def random_pairs(n: int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of distinct pairs of n things, drawn without replacement: all if ``count`` allows."""
    total = n * (n - 1) // 2
    rng = np.random.default_rng(seed)
    chosen = np.arange(total) if total <= count else rng.choice(total, count, replace=False)
    # Pair number j (j - 1) / 2 + i is that of i < j.
    second = np.floor((1 + np.sqrt(1 + 8 * chosen.astype(np.float64))) / 2).astype(np.int64)
    return chosen - second * (second - 1) // 2, second


def _pair_mean(
    values: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    n: int,
    patients: np.ndarray | None = None,
) -> Entry:
    numbers = np.arange(n)
    if patients is not None:
        numbers, n = intervals.numbered(patients)
    first, second = numbers[first], numbers[second]
    apart = first != second  # a pair of one patient leaves with it once
    sums, counts = np.zeros(n), np.zeros(n)
    for own, held in ((first, slice(None)), (second, apart)):
        np.add.at(sums, own[held], values[held])
        np.add.at(counts, own[held], 1)
    entry: Entry = {"value": float(values.mean()), "pairs": len(values)}
    left = len(values) - counts
    if (left > 0).all():
        without = (values.sum() - sums) / left
        off = _errors_off([] if patients is None else [n]) * math.sqrt(without.var() * (n - 1))
        entry |= {"low": entry["value"] - off, "high": entry["value"] + off}
    return entry


# ------------------------------------------------------------------------------------ all of it


def compare(
    real: np.ndarray,
    samples: np.ndarray,
    neighbours: int = NEIGHBOURS,
    real_patients: np.ndarray | None = None,
    sample_patients: np.ndarray | None = None,
) -> dict[str, Entry]:
    """All measures on features of two sets.

    :param real: features [N, D]; ``samples`` [M, D].
    :param real_patients: [N], whose slice each is, where several are of one patient;
        ``sample_patients`` [M].
    :return: ``frechet_distance``, ``kernel_distance``, ``precision``, ``recall``, ``density`` and
        ``coverage``, each with its ``value``, or None and the ``reason``. The Frechet distance has
        no interval, because its bias is larger than its chance error: its floor tells.
    """
    n, m, dimensions = len(real), len(samples), real.shape[1]
    fewest = min(n, m)
    frechet, kernel = (
        without_value(f"needs {needed} images of each set, found {n} and {m}") for needed in (2, 3)
    )
    if fewest >= 2:
        frechet = {"value": frechet_distance(real, samples)}
        if fewest <= dimensions:
            frechet["note"] = (
                f"{fewest} images for {dimensions} dimensions: too large, compare only with the "
                "floor of as many"
            )
    if fewest >= 3:
        kernel = kernel_distance(samples, real, sample_patients, real_patients)
    return {
        "frechet_distance": frechet,
        "kernel_distance": kernel,
        **manifold_measures(real, samples, neighbours, real_patients, sample_patients),
    }


def table(
    real: np.ndarray,
    samples: np.ndarray,
    channels: Sequence[str],
    extractor: Extractor,
    *,
    train: np.ndarray | None = None,
    patients: dict[str, np.ndarray] | None = None,
    neighbours: int = NEIGHBOURS,
    pairs: int = PAIRS,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Every measure for each channel and for all together, beside the noise floor.

    The floor is real slices that the model was trained on against ``real``: as many as there are
    samples, drawn with a fixed seed, because all measures depend on the counts.

    All channels together are one call of the extractor with all of them, which notices channels
    that do not belong together; a mean over the channels would not. Masks enter as their grey
    levels: nothing is snapped, so that levels off the codes count against the samples.

    :param real: uint8 [N, H, W, C], slices that the model was not trained on; ``samples``
        [M, H, W, C], raw; ``train`` [T, H, W, C]. They may be memory maps.
    :param channels: names of the C channels; none for pictures, which are only measured as a
        whole.
    :param patients: ``real``, ``samples`` or ``train`` -> whose slice each is, [N], [M] or [T], of
        the sets that hold several of one patient; see :data:`INTERVALS`.
    :param neighbours: see :func:`manifold_measures`.
    :param pairs: see :func:`diversity`.
    :param progress: is called with a number of images whose features are there, of
        :func:`passes` in all.
    :return: plain values for JSON: ``extractor``, ``counts`` of images, ``patients`` (of the sets
        where they are given, their number), ``neighbours``, ``intervals`` (:data:`INTERVALS`),
        ``channels``: name or :data:`ALL` -> ``samples`` and ``floor``: measure -> entry, see
        :func:`compare` and :func:`diversity`; and ``real``: only ``ms_ssim``.
    :raises ValueError: sets that cannot be compared, see :func:`check_sets`; no neighbours or
        pairs.
    """
    if min(neighbours, pairs) < 1:
        raise ValueError(f"neighbours and pairs are 1 or more, found {neighbours} and {pairs}")
    sets = {"real": real, "samples": samples}
    if train is not None:
        sets["floor"] = train
    check_sets(sets, channels)
    chosen = {key: np.arange(len(own)) for key, own in sets.items()}
    if train is not None:
        chosen["floor"] = _as_many(len(train), len(samples))
    whose = {
        key: patients[name][chosen[key]]
        for key, name in (("real", "real"), ("samples", "samples"), ("floor", "train"))
        if patients and name in patients and key in sets
    }
    of_each = {
        key: diversity(own, channels, pairs, patients=whose.get(key), chosen=chosen[key])
        for key, own in sets.items()
    }
    rows: dict[str, Any] = {}
    dimensions = {}
    planes: list[tuple[str, Any]] = [(name, i) for i, name in enumerate(channels)]
    for channel, plane in [*planes, (ALL, slice(None))]:
        # Of one channel after the other: features of many images fill the memory.
        if channel != ALL or len(channels) != 1:
            found = [
                extractor(own[..., plane], progress, chosen=chosen[key])
                for key, own in sets.items()
            ]
            if extractor.scaled:
                found = scale(*found)
        dimensions[channel] = found[0].shape[1]
        rows[channel] = {}
        for key, own in zip(sets, found):
            measured = {}
            if key != "real":
                of_both = whose.get("real"), whose.get(key)
                measured = compare(found[0], own, neighbours, *of_both)
            rows[channel][key] = {**measured, "ms_ssim": of_each[key][channel]}
    return {
        "extractor": {
            "name": extractor.name,
            "sha256": extractor.sha256,
            "frechet_distance": extractor.frechet_name,
            "kernel_distance": extractor.kernel_name,
            "dimensions": dimensions,
        },
        "counts": {key: len(own) for key, own in chosen.items()},
        "patients": {key: len(np.unique(own)) for key, own in whose.items()},
        "neighbours": neighbours,
        "intervals": INTERVALS,
        "channels": rows,
    }


def passes(counts: Sequence[int], channels: Sequence[str]) -> int:
    """How many images :func:`table` extracts features of, from the sizes of its sets."""
    return sum(counts) * (len(channels) + (len(channels) != 1))


def _as_many(found: int, count: int) -> np.ndarray:
    """Numbers of ``count`` of so many images, in order; of all, where there are no more."""
    if count >= found:
        return np.arange(found)
    return np.sort(np.random.default_rng(0).permutation(found)[:count])


def check_sets(sets: dict[str, np.ndarray], channels: Sequence[str]) -> None:
    """Refuse sets that measure nothing beside each other.

    Masks of real slices hold label codes only. Those of samples are raw and hold any level; but no
    more levels than there are codes, and others than these, are labels of another coding.

    :param sets: name, as ``samples`` -> uint8 [N, H, W, C].
    :param channels: names of the C channels, or none.
    :raises ValueError: an empty set, other types, sizes or numbers of channels, or other label
        codes.
    """
    shape = next(iter(sets.values())).shape[1:]
    for name, images in sets.items():
        if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
            raise ValueError(
                f"the {name} images are no uint8 array of shape [N, H, W, C], none of them 0: "
                f"found {images.dtype} {list(images.shape)}"
            )
        if images.shape[1:] != shape:
            raise ValueError(
                "sets compare only with equal height, width and channels: the "
                f"{next(iter(sets))} images are {_size(shape)}, the {name} images "
                f"{_size(images.shape[1:])}"
            )
        if channels and images.shape[3] != len(channels):
            raise ValueError(
                f"the {name} images have {images.shape[3]} channels, but {len(channels)} are named "
                f"({', '.join(channels)})"
            )
        if MASK_CHANNEL in channels:
            _check_codes(name, images[..., list(channels).index(MASK_CHANNEL)])


def _size(shape: Sequence[int]) -> str:
    height, width, channels = shape
    return f"{height} x {width} with {channels} channel{'s' if channels > 1 else ''}"


def _check_codes(name: str, masks: np.ndarray) -> None:
    counts = np.zeros(256, dtype=np.int64)
    step = max(1, BLOCK * BLOCK // masks[0].size)
    for start in range(0, len(masks), step):
        counts += np.bincount(masks[start : start + step].ravel(), minlength=256)
    levels = set(np.flatnonzero(counts).tolist())
    foreign = levels - set(MASK_CODES)
    coded = 1 < len(levels) <= len(MASK_CODES) and (
        levels == {0, 1, 2, 4}
        or any(_from_codes(level) > validity.CODE_TOLERANCE for level in levels)
    )
    if foreign and (name != "samples" or coded):
        raise ValueError(
            f"the {name} masks hold the levels {', '.join(map(str, sorted(levels)[:8]))}"
            f"{', ...' if len(levels) > 8 else ''}, but label codes are "
            f"{', '.join(map(str, MASK_CODES))}: use masks of these codes"
        )


def _from_codes(level: int) -> int:
    return min(abs(level - code) for code in MASK_CODES)
