"""How far a set of samples is from a set of real slices, by features that need no file.

The features are those of a fixed random network and radial power spectra. Random features tell
sets apart by texture, contrast, shape and sharpness, but weigh them in no human way: distances on
them are not FID or KID, whose names stand for the Inception network, and compare only with
distances on the same features.

Shapes: samples are uint8 [N, H, W, C]; features are float64 [N, D].
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional

# Convolutions of the random network, each followed by halving the resolution.
WIDTHS = (16, 32, 32)
SPECTRUM_BINS = 12
# Power below this, of images in [-1, 1], counts as none: about that of rounding to 8 bits.
LEAST_POWER = 1e-5
# Rows and columns of the kernel that are in memory at once.
BLOCK = 2048
# A feature that varies less than this in the reference set tells rounding from nothing.
LEAST_DEVIATION = 1e-6


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


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of the Gaussians that fit two sets, Heusel et al. 2017, Eq. 6.

    With few samples for its dimension it is too large, the more the fewer.

    :param a: features [N, D]; ``b`` [M, D]; 2 samples or more in each.
    """
    gap = a.mean(axis=0) - b.mean(axis=0)
    cov_a, cov_b = (np.cov(own, rowvar=False).reshape(own.shape[1], -1) for own in (a, b))
    # tr sqrt(A B) = tr sqrt(sqrt(A) B sqrt(A)), whose argument is symmetric.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Unbiased squared maximum mean discrepancy of two sets, with its 95 % interval.

    The kernel is (x y / D + 1) ** 3, Binkowski et al. 2018, section 4. The expected value is 0
    where both sets come from one distribution, so that values below 0 happen. The interval is
    normal with the jackknife's variance, over the samples of both sets; drawing with replacement
    would make pairs of equal samples, which bias the estimate.

    :param a: features [N, D], see :func:`standardise`; ``b`` [M, D]; 3 samples or more in each.
    :return: ``value``, ``low``, ``high``, ``error`` (the standard error).
    """
    n, m = len(a), len(b)
    if min(n, m) < 3:
        raise ValueError(f"a kernel distance needs 3 samples or more of each set, found {n}, {m}")
    rows_a, rows_b = _sums_to_others(a), _sums_to_others(b)
    cross_a, cross_b = _kernel_sums(a, b)
    within_a, within_b, between = rows_a.sum(), rows_b.sum(), cross_a.sum()

    value = _discrepancy(within_a, n, within_b, m, between)
    without_a = _discrepancy(within_a - 2 * rows_a, n - 1, within_b, m, between - cross_a)
    without_b = _discrepancy(within_a, n, within_b - 2 * rows_b, m - 1, between - cross_b)
    variance = without_a.var() * (n - 1) + without_b.var() * (m - 1)
    error = math.sqrt(variance)
    return {
        "value": float(value),
        "low": float(value - 1.96 * error),
        "high": float(value + 1.96 * error),
        "error": error,
    }


def _discrepancy(
    within_a: np.ndarray, n: int, within_b: np.ndarray, m: int, between: np.ndarray
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
