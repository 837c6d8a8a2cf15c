"""Moving averages of the weights whose length is chosen after training.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3
and appendix C. After t updates the average with exponent gamma weights what the weights were
after update tau by the profile::

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),    0 <= tau <= t

so that its length grows with the run. It is named by its relative width ``sigma_rel``: the
profile's standard deviation as a share of t. Because a sum of profiles is the profile of the same
sum of averages, averages of a few exponents, stored now and then, give those of other exponents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Wider ones have an exponent below 0: they would weight the first weights most.
SIGMA_REL_RANGE = (0.001, 0.288)


def parse_sigma_rels(flag: str, text: str) -> list[float]:
    """``"0.05,0.10"`` -> [0.05, 0.1]; empty text: none.

    :param flag: whose text it is, for the message.
    :raises ValueError: anything but different numbers in :data:`SIGMA_REL_RANGE`.
    """
    if not text:
        return []
    least, most = SIGMA_REL_RANGE
    try:
        lengths = [float(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if (
        not lengths
        or not all(least <= length <= most for length in lengths)
        or len(set(lengths)) < len(lengths)
    ):
        raise ValueError(
            f"{flag} {text}: expected different numbers from {least} to {most}, separated by "
            "commas, such as 0.05,0.10"
        )
    return lengths


def sigma_rel_of(gamma: float) -> float:
    """The standard deviation of tau / t under the profile, a beta distribution's."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of(sigma_rel: float) -> float:
    """The inverse of :func:`sigma_rel_of` for exponents of 0 and above.

    With s = 1 / sigma_rel^2 it is the largest root of
    gamma^3 + 7 gamma^2 + (16 - s) gamma + 12 - s, which without its square term, in
    x = gamma + 7 / 3, is x^3 - (s + 1 / 3) x + 4 s / 3 + 2 / 27. Viete's formula gives it.
    """
    s = sigma_rel**-2
    p, q = s + 1 / 3, 4 * s / 3 + 2 / 27
    angle = math.acos(-1.5 * q / p * math.sqrt(3 / p))
    return 2 * math.sqrt(p / 3) * math.cos(angle / 3) - 7 / 3


def rate(update: int, gamma: float) -> float:
    """How much of the average stays at an update, counted from 1; the first copies the weights.

    The weights after update k then count by the profile's integral from k - 1 to k.
    """
    return (1 - 1 / update) ** (gamma + 1)


def inner_products(
    times: Sequence[float] | np.ndarray,
    gammas: Sequence[float] | np.ndarray,
    other_times: Sequence[float] | np.ndarray,
    other_gammas: Sequence[float] | np.ndarray,
) -> np.ndarray:
    """Integrals over tau of the products of each two profiles.

    :param times: [N] times t, above 0, and ``gammas`` [N] the exponents.
    :param other_times: [M], and ``other_gammas`` [M].
    :return: [N, M] float64.
    """
    t, gamma = np.asarray(times, np.float64)[:, None], np.asarray(gammas, np.float64)[:, None]
    u, other = np.asarray(other_times, np.float64), np.asarray(other_gammas, np.float64)
    # Both reach to the earlier time; the later one's power is left of that limit.
    later = np.maximum(t, u)
    power = np.where(t > u, gamma, other)
    share = (np.minimum(t, u) / later) ** power
    return (gamma + 1) * (other + 1) / (gamma + other + 1) * share / later


def posthoc_weights(
    times: Sequence[float] | np.ndarray,
    gammas: Sequence[float] | np.ndarray,
    time: float,
    gamma: float,
) -> tuple[np.ndarray, float]:
    """Weights with which stored averages add up to another, by least squares of the profiles.

    Unlike the paper's, the weights are held to a sum of 1, so that what did not change in training
    comes out as it was.

    :param times: [N] times of the stored averages, and ``gammas`` [N] their exponents; no two of
        them alike.
    :param time: the wanted average's, and ``gamma`` its exponent.
    :return: [N] float64 weights, and the norm of the profiles' difference over that of the wanted
        profile.
    """
    products = inner_products(times, gammas, times, gammas)
    wanted = inner_products(times, gammas, [time], [gamma])[:, 0]
    square = inner_products([time], [gamma], [time], [gamma])[0, 0]
    # In units of each profile's norm, which makes the system well conditioned.
    norms = np.sqrt(np.diag(products))
    n = len(norms)
    system = np.zeros((n + 1, n + 1))  # the last row and column: the sum's Lagrange multiplier
    system[:n, :n] = products / np.outer(norms, norms)
    system[:n, n] = system[n, :n] = norms.min() / norms
    right = np.append(wanted / norms, norms.min())
    weights = np.linalg.solve(system, right)[:n] / norms
    residual = square - 2 * weights @ wanted + weights @ products @ weights
    return weights, math.sqrt(max(residual, 0) / square)
