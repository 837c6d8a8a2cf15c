"""Intervals over patients: sums by hand, known quantiles, and how often they hold the truth."""

import itertools

import numpy as np
import pytest

from improved_diffusion.evaluation import distribution, intervals, memorisation
from improved_diffusion.evaluation.intervals import mean_interval, share_interval

FIVE = np.array(list("aaabbcccdeee"))  # five patients of 3, 2, 3, 1 and 3 slices
VALUES = np.array([1, 2, 3, 0, 4, 7, 7, 1, 9, 2, 2, 5.0])


def test_without_patients_nothing_changes():
    """Numbers of the version before patients."""
    assert mean_interval(VALUES) == {"value": 43 / 12, "low": 2.0, "high": 5.25}
    found = share_interval(VALUES > 4)
    assert found == {"value": 1 / 3, "low": 0.13812009012485982, "high": 0.6093779130595061}


def test_sums_over_patients_by_hand():
    """Each drawing as the slices that it holds, a patient's as often as it was drawn."""
    drawn = np.random.default_rng(0).multinomial(5, [0.2] * 5, 1000)
    slices = [VALUES[own == FIVE] for own in "abcde"]
    means = [
        np.concatenate([own for own, times in zip(slices, row) for _ in range(times)]).mean()
        for row in drawn
    ]
    # Student's 2.7764 of 4 degrees of freedom, times sqrt(5 / 4): a normal tail of 0.0954 %.
    expected = np.percentile(means, [0.0954, 100 - 0.0954])
    found = mean_interval(VALUES, FIVE)
    assert found["value"] == 43 / 12
    assert [found["low"], found["high"]] == pytest.approx(expected, rel=1e-3)
    assert found["low"] <= 2.0 and found["high"] > 5.25
    assert mean_interval(VALUES, FIVE, largest=5.5)["high"] == 5.5


def test_student():
    """The published table, two-sided 95 %."""
    table = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 11: 2.228, 61: 2.000, 1001: 1.962}
    assert {n: intervals.student(n) for n in table} == pytest.approx(table, abs=0.002)


def test_few_patients():
    """Of equal sizes: Student's interval of the patients' means; of one, all that is possible."""
    values = np.array([1, 3, 4, 4, 7, 5.0])  # means 2, 4 and 6, deviation 2
    found = mean_interval(values, np.array([0, 0, 1, 1, 2, 2]))
    off = 4.3027 * 2 / np.sqrt(3)
    assert found == pytest.approx({"value": 4, "low": 0, "high": 4 + off})
    assert mean_interval(values, np.zeros(6), 255) == {"value": 4, "low": 0, "high": 255}
    assert mean_interval(values, np.zeros(6)) == {"value": 4}
    share = np.arange(40) < 10
    of_four = share_interval(share, np.arange(40) // 10)
    assert of_four == share_interval(np.arange(4) < 1)


@pytest.mark.parametrize("none", [True, False])
def test_shares_of_none_or_all(none):
    """As if the slices of each of the 20 patients were one."""
    share = np.full(200, not none)
    assert share_interval(share, np.arange(200) // 10) == share_interval(share[:20])


def test_patients_never_narrow_an_interval():
    rng = np.random.default_rng(0)
    for count in (2, 3, 6, 30):
        patients = np.arange(60) % count  # alike means: the patients tell nothing
        values = rng.random(60)
        for own in (values, values < 0.3):
            alone, found = mean_interval(own), mean_interval(own, patients, 1)
            assert found["low"] <= alone["low"] and found["high"] >= alone["high"]
            assert found["value"] == alone["value"]
        alone, found = share_interval(values < 0.3), share_interval(values < 0.3, patients)
        assert found["low"] <= alone["low"] and found["high"] >= alone["high"]
    constant = mean_interval(np.full(60, 0.7), patients)
    assert [constant["low"], constant["high"]] == pytest.approx([0.7, 0.7])


def test_patients_make_the_interval_cover(monkeypatch):
    """15 patients of 5 to 25 slices, whose means vary as much as the slices of each."""
    monkeypatch.setattr(intervals, "BOOTSTRAP_DRAWS", 200)
    rng = np.random.default_rng(1)
    covered = {"mean": 0, "mean alone": 0, "share": 0, "share alone": 0}
    for _ in range(200):
        patients = np.repeat(np.arange(15), rng.integers(5, 26, 15))
        values = 10 + rng.normal(size=15)[patients] + rng.normal(size=len(patients))
        high = values > 10  # of half of all slices
        for name, found, truth in (
            ("mean", mean_interval(values, patients), 10),
            ("mean alone", mean_interval(values), 10),
            ("share", share_interval(high, patients), 0.5),
            ("share alone", share_interval(high), 0.5),
        ):
            covered[name] += found["low"] <= truth <= found["high"]
    assert covered["mean"] >= 180 and covered["share"] >= 180  # of 95 %
    assert covered["mean alone"] < 100 and covered["share alone"] < 120


# ------------------------------------------------------------------------------ of distances


def test_the_kernel_distance_leaves_out_patients():
    """By leaving out each in turn, and the images of the other set."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(9, 3)), rng.normal(0.4, 1, size=(12, 3))

    def without(held_a, held_b):
        return distribution.kernel_distance(a[held_a], b[held_b])["value"]

    all_a, all_b = np.full(9, True), np.full(12, True)
    of_b = np.array([without(all_a, own != FIVE) for own in "abcde"])
    of_a = np.array([without(np.arange(9) != i, all_b) for i in range(9)])
    error = np.sqrt(of_b.var() * 4 + of_a.var() * 8)
    found = distribution.kernel_distance(a, b, patients_b=FIVE)
    assert found["value"] == distribution.kernel_distance(a, b)["value"]
    assert found["error"] == pytest.approx(error)
    assert found["high"] - found["value"] == pytest.approx(2.776 * error, rel=2e-3)
    swapped = distribution.kernel_distance(b, a, FIVE)
    assert swapped == pytest.approx(found)
    alone = distribution.kernel_distance(a, b, np.arange(9), np.arange(12))
    assert alone["error"] == pytest.approx(distribution.kernel_distance(a, b)["error"])
    assert list(distribution.kernel_distance(a, b, patients_b=np.zeros(12))) == ["value"]


def test_patients_make_the_kernel_distance_cover():
    """Two sets of one distribution, of which one holds 12 patients of 15 slices."""
    rng = np.random.default_rng(0)
    patients = np.arange(180) // 15
    covered = np.zeros(2)
    for _ in range(100):
        a = rng.normal(size=(100, 3))
        b = 0.8 * rng.normal(size=(12, 3))[patients] + 0.6 * rng.normal(size=(180, 3))
        for i, own in enumerate((None, patients)):
            found = distribution.kernel_distance(a, b, patients_b=own)
            covered[i] += found["low"] <= 0 <= found["high"]
    assert covered[0] < 70 and covered[1] >= 88  # of 95 %


def test_neighbourhoods_of_patients():
    """Real 0, 1, 3, 10 and 40 with one neighbour: see test_neighbourhoods_by_hand."""
    real, samples = np.array([[0.0], [1], [3], [10], [40]]), np.array([[0.5], [2.2], [-30]])
    patients = np.array([0, 1, 2, 3, 3])
    plain = distribution.manifold_measures(real, samples, 1)
    found = distribution.manifold_measures(real, samples, 1, patients)
    assert {k: v["value"] for k, v in found.items()} == {k: v["value"] for k, v in plain.items()}
    assert found["precision"] == plain["precision"]  # samples alone
    for name in ("recall", "coverage"):  # 0, 1 and 3 are in a ball, and their balls hold a sample
        assert found[name] == mean_interval([1, 1, 1, 0, 0], patients, 1)
    # The balls hold 1, 1 and 1 of three samples, so that these are 5 / 3 each of the real mean.
    of_real = mean_interval(np.array([1, 1, 1, 0, 0]) * 5 / 3, patients)
    for end, sign in (("low", -1), ("high", 1)):
        off = np.hypot(of_real[end] - 1, plain["density"][end] - 1)
        assert found["density"][end] == pytest.approx(max(0, 1 + sign * off))
    ordinary = distribution.manifold_measures(real, samples, 1, sample_patients=np.array([0, 0, 1]))
    # The samples' balls reach to the other patient's: 0.5 +- 30.5, 2.2 +- 32.2 and -30 +- 30.5.
    assert ordinary["recall"]["value"] == 4 / 5
    assert ordinary["precision"] == mean_interval([1, 1, 0], np.array([0, 0, 1]), 1)
    one = distribution.manifold_measures(real, samples, 1, np.zeros(5))
    assert one["recall"]["low"] == 0 and one["recall"]["high"] == 1
    reason = "5 real images, 5 of one patient, but a ball to neighbour 1 needs 1 or more of other"
    for name in ("precision", "density", "coverage"):
        assert one[name] == {"value": None, "reason": f"{reason} patients"}


def test_balls_reach_to_other_patients():
    """Real 0, 1, 10 and 12 of two patients: balls 0 +- 10, 1 +- 9, 10 +- 9 and 12 +- 11.

    Each holds one slice of the other patient; 5, a slice of a third, is in all of them, but in none
    of the balls of radius 1 and 2 that do without patients.
    """
    real, new = np.array([[0.0], [1], [10], [12]]), np.array([[5.0]])
    patients = np.array(["a", "a", "b", "b"])
    plain = distribution.manifold_measures(real, new, 1)
    assert plain["precision"]["value"] == plain["density"]["value"] == 0
    found = distribution.manifold_measures(real, new, 1, patients)
    assert found["precision"]["value"] == found["coverage"]["value"] == 1
    assert found["density"]["value"] == 4
    swapped = distribution.manifold_measures(new, real, 1, sample_patients=patients)
    assert swapped["recall"]["value"] == 1


def test_new_patients_are_as_precise_as_they_should_be():
    """Both sets are of one distribution: 40 patients of 20 slices each, close to each other."""
    rng = np.random.default_rng(0)
    patients = np.arange(800) // 20
    real, new = (
        rng.normal(size=(40, 3))[patients] + 0.1 * rng.normal(size=(800, 3)) for _ in range(2)
    )
    plain = distribution.manifold_measures(real, new, 5)
    found = distribution.manifold_measures(real, new, 5, patients, patients)
    for name in ("precision", "recall"):
        assert plain[name]["value"] < 0.3 and found[name]["value"] > 0.8


def test_pairs_of_patients():
    """The jackknife by leaving out the pairs that each patient is in."""
    first, second = np.array(list(itertools.combinations(range(12), 2))).T
    values = np.random.default_rng(0).random(len(first))
    found = distribution._pair_mean(values, first, second, 12, FIVE)
    left = [values[(FIVE[first] != own) & (FIVE[second] != own)].mean() for own in "abcde"]
    error = np.sqrt(np.var(left) * 4)
    assert found["value"] == values.mean()
    assert found["high"] - found["value"] == pytest.approx(2.776 * error, rel=2e-3)
    assert "low" not in distribution._pair_mean(values, first, second, 12, np.zeros(12))


def test_copies_among_real_slices():
    """5 of 50 slices of 5 patients are near: an interval as of 5 samples, not of 50."""
    held_out = memorisation.Neighbours(np.arange(99) / 100, np.zeros(99, int), np.zeros(99, int))
    near = np.where(np.arange(50) % 10 == 0, 2.0, 0)
    samples = memorisation.Neighbours(near, np.zeros(50, int), np.zeros(50, int))
    plain = memorisation.compare(samples, held_out)
    found = memorisation.compare(samples, held_out, None, np.arange(50) // 10)
    assert found["share"]["value"] == plain["share"]["value"] == 0.1
    # Beta(1, 5): the threshold lies between 0 and 2 in every drawing.
    quantiles = 1 - 0.975 ** (1 / 5), 1 - 0.025 ** (1 / 5)
    assert [found["share"][end] for end in ("low", "high")] == pytest.approx(quantiles, abs=0.04)
    assert plain["share"]["high"] < 0.22 < 0.45 < found["share"]["high"]
