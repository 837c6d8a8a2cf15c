"""Means and shares of a set of slices, with their intervals of 95 %.

Samples are drawn one by one. Real slices come by the patient, and slices of one patient are alike:
what chance has drawn is patients, of which there are far fewer. Where the slices' patients are
given, the intervals cover the chance in these.

Legend: N slices, G patients.
"""

from __future__ import annotations

import math

import numpy as np

BOOTSTRAP_DRAWS = 1000
Z_95 = 1.959964  # of the normal distribution, two-sided
# Fewer patients have too few different drawings for a bootstrap.
FEWEST_PATIENTS = 5
# Student's quantiles, two-sided 95 %, of 1, 2 and 3 degrees of freedom.
STUDENT_95 = (12.7062, 4.3027, 3.1824)


def mean_interval(
    values: np.ndarray, patients: np.ndarray | None = None, largest: float | None = None
) -> dict[str, float]:
    """The mean and its 95 % interval: percentiles of bootstrap draws of the samples.

    The seed is fixed, so equal values give equal intervals. The interval covers the chance in
    which samples were drawn, not in how the model was trained. Its width is 0 where all values are
    equal; of N samples that all pass, the share in truth may still be as low as 1 - 3 / N.

    With ``patients`` these are drawn, each with all of its slices, and the percentiles lie further
    out, the more the fewer patients there are: a normal mean gets about Student's interval so
    (the expanded percentile interval of Hesterberg 2015). Of 2 to 4 patients it is Student's
    interval, whose error is that of a ratio of sums over patients. One patient tells nothing of
    others: from 0 to ``largest``. No interval is narrower than that without ``patients``.

    :param values: [N], numbers or bool; with ``patients`` none below 0.
    :param patients: [N], whose slice each is; None: each is drawn alone.
    :param largest: what values, and so the interval of patients, cannot exceed; None: there is
        no such limit, and one patient gives the value only.
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
    value = float(values.mean())
    alone = {"value": value, "low": float(low), "high": float(high)}
    if patients is None:
        return alone
    numbers, count = numbered(patients)
    if count == 1:
        return {"value": value} if largest is None else alone | {"low": 0.0, "high": float(largest)}
    return _wider(alone, *_of_patients(values, numbers, count), largest)


def share_interval(share: np.ndarray, patients: np.ndarray | None = None) -> dict[str, float]:
    """A share and its 95 % score interval (Wilson 1927).

    Its width is above 0 also where all or none of the samples have the property.

    With ``patients`` it is as :func:`mean_interval`. But where all or none of the slices have the
    property, or there are fewer than 5 patients, nothing tells how alike the slices of a patient
    are. Then it is the score interval of as many slices as there are patients, as if all slices of
    one were equal: no clustering makes a wider one.

    :param share: bool [N].
    :param patients: [N], whose slice each is; None: each is drawn alone.
    :returns: ``{"value", "low", "high"}``.
    :raises ValueError: no values.
    """
    n = len(share)
    if n == 0:
        raise ValueError("there are no values to take the share of: give at least one sample")
    value = int(np.count_nonzero(share)) / n
    alone = {"value": value, **_score_interval(value, n)}
    if patients is None:
        return alone
    numbers, count = numbered(patients)
    if count < FEWEST_PATIENTS or value in (0, 1):
        own = _score_interval(value, count)
        return _wider(alone, own["low"], own["high"], 1)
    return _wider(alone, *_of_patients(np.asarray(share, np.float64), numbers, count), 1)


def numbered(patients: np.ndarray) -> tuple[np.ndarray, int]:
    """The number, from 0 on, of the patient of each slice: int [N]; and how many patients, G."""
    names, numbers = np.unique(patients, return_inverse=True)
    return numbers, len(names)


def student(patients: int) -> float:
    """How many standard errors a normal mean of so many patients' values, 2 or more, may be off.

    Student's quantile for ``patients - 1`` degrees of freedom; from 4 on by its expansion,
    Abramowitz & Stegun 26.7.5.
    """
    freedom = patients - 1
    if freedom <= len(STUDENT_95):
        return STUDENT_95[freedom - 1]
    z = Z_95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def _of_patients(values: np.ndarray, numbers: np.ndarray, count: int) -> tuple[float, float]:
    """The ends of the interval of a mean, from sums over each of 2 patients or more."""
    sums = np.bincount(numbers, values, count)
    sizes = np.bincount(numbers, minlength=count)
    value = sums.sum() / sizes.sum()
    off = student(count) * math.sqrt(count / (count - 1))
    if count < FEWEST_PATIENTS:
        error = math.sqrt(np.square(sums - value * sizes).sum()) / sizes.sum()
        return value - off * error, value + off * error
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), BOOTSTRAP_DRAWS)
    means = (drawn @ sums) / (drawn @ sizes)
    beyond = 50 * math.erfc(off / math.sqrt(2))  # percent of a normal distribution above ``off``
    low, high = np.percentile(means, [beyond, 100 - beyond])
    return low, high


def _wider(
    alone: dict[str, float], low: float, high: float, largest: float | None
) -> dict[str, float]:
    low, high = max(0.0, min(low, alone["low"])), max(high, alone["high"])
    high = high if largest is None else min(high, largest)
    return {**alone, "low": float(low), "high": float(high)}


def _score_interval(value: float, n: int) -> dict[str, float]:
    spread = Z_95**2 / n
    centre = (value + spread / 2) / (1 + spread)
    half = math.sqrt(value * (1 - value) * spread + spread**2 / 4) / (1 + spread)
    # Where none or all have it, the formula's end is exactly 0 or 1, up to rounding.
    return {"low": centre - half if value > 0 else 0.0, "high": centre + half if value < 1 else 1.0}
