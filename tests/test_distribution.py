"""Distances and neighbourhoods of sets whose answer is known: by hand, by formula, by others."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from improved_diffusion.brats import LABEL_CODES
from improved_diffusion.evaluation import distribution, extractors
from improved_diffusion.phantom import phantom_patient

CHANNELS = ["FLAIR", "Seg", "T1CE"]
MEASURES = [
    "frechet_distance",
    "kernel_distance",
    "precision",
    "recall",
    "density",
    "coverage",
    "ms_ssim",
]


def column(*numbers):
    return np.array(numbers, dtype=np.float64)[:, None]


def values(entries):
    return {name: entry["value"] for name, entry in entries.items()}


def gaussian(rng, n, mean, covariance):
    """Samples whose mean and covariance are these, not only in expectation."""
    own = rng.normal(size=(n, len(mean)))
    own -= own.mean(axis=0)
    own = own @ np.linalg.inv(np.linalg.cholesky(np.cov(own, rowvar=False)).T)
    return own @ np.linalg.cholesky(covariance).T + mean


# ---------------------------------------------------------------------------------- distances


def test_frechet_distance_in_closed_form():
    """Covariances that commute: |gap|^2 + sum (sqrt a - sqrt b)^2 over the eigenvalues."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    a = gaussian(rng, 50, [0, 0, 0], turn @ np.diag([1, 4, 9]) @ turn.T)
    b = gaussian(rng, 70, [1, 2, 2], turn @ np.diag([4, 4, 1]) @ turn.T)
    expected = 9 + 1 + 0 + 4
    assert distribution.frechet_distance(a, b) == pytest.approx(expected)
    # In more dimensions than samples, by another route.
    wide = np.linalg.qr(rng.normal(size=(200, 3)))[0].T
    assert distribution.frechet_distance(a @ wide + 5, b @ wide + 5) == pytest.approx(expected)
    assert distribution.frechet_distance(a @ wide, a[::-1] @ wide) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """In two dimensions tr sqrt(A B) = sqrt(tr A B + 2 sqrt(det A B))."""
    rng = np.random.default_rng(1)
    one, two = np.array([[2.0, 0.5], [0.5, 1]]), np.array([[1.0, -0.3], [-0.3, 3]])
    a, b = gaussian(rng, 40, [0, 0], one), gaussian(rng, 40, [0, 1], two)
    cross = np.sqrt(np.trace(one @ two) + 2 * np.sqrt(np.linalg.det(one @ two)))
    expected = 1 + np.trace(one) + np.trace(two) - 2 * cross
    assert distribution.frechet_distance(a, b) == pytest.approx(expected)


def test_frechet_distance_together_is_at_least_the_sum():
    """Equal margins, opposite correlation: nothing apart, 4 - 2 tr sqrt(A B) together."""
    rng = np.random.default_rng(2)
    one, two = (np.array([[1, r], [r, 1]]) for r in (0.8, -0.8))
    a, b = gaussian(rng, 30, [0, 0], one), gaussian(rng, 30, [0, 0], two)
    apart = [distribution.frechet_distance(a[:, i : i + 1], b[:, i : i + 1]) for i in (0, 1)]
    assert apart == pytest.approx([0, 0], abs=1e-9)
    # The eigenvalues 1.8 and 0.2 change places.
    expected = 4 - 4 * np.sqrt(1.8 * 0.2)
    assert distribution.frechet_distance(a, b) == pytest.approx(expected)


def test_distances_equal_those_of_others():
    """torchmetrics 1.9.0: _compute_fid of the moments, and the KID estimate of one whole subset."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(80, 12)), rng.normal(0.3, 1.2, size=(60, 12))
    assert distribution.frechet_distance(a, b) == pytest.approx(4.240692846383851)
    found = distribution.kernel_distance(a[:60], b)["value"]
    assert found == pytest.approx(0.5926784208808567)


def test_scale_keeps_what_is_constant():
    reference = np.array([[1.0, 5], [3, 5]])
    found, other = distribution.scale(reference, np.array([[4.0, 6]]))
    assert found.tolist() == [[-1, 0], [1, 0]]
    assert other.tolist() == [[2, 1 / distribution.LEAST_SCALE]]


# -------------------------------------------------------------------------------- neighbourhoods


def test_neighbourhoods_by_hand():
    """With one neighbour the real balls are 0 +- 1, 1 +- 1, 3 +- 2, 10 +- 7 and 40 +- 30.

    0.5 lies in the first two, 2.2 in the third, -30 in none. The samples' balls are 0.5 +- 1.7,
    2.2 +- 1.7 and -30 +- 30.5; of the real numbers 10 and 40 lie in none.
    """
    real, samples = column(0, 1, 3, 10, 40), column(0.5, 2.2, -30)
    found = distribution.manifold_measures(real, samples, neighbours=1)
    assert values(found) == pytest.approx(
        {"precision": 2 / 3, "recall": 3 / 5, "density": (2 + 1) / 3, "coverage": 3 / 5}
    )
    assert all(0 <= own["low"] <= own["value"] <= own["high"] for own in found.values())
    shifted = distribution.manifold_measures(real + 1000, samples + 1000, neighbours=1)
    assert values(shifted) == pytest.approx(values(found))


def test_neighbourhoods_equal_those_of_prdc():
    """prdc 0.2, compute_prdc of these numbers with 3 and 5 neighbours."""
    random = np.random.RandomState(0)
    real, samples = random.randn(60, 6), random.randn(40, 6) * 0.9 + 0.8
    for neighbours, expected in {
        3: {"precision": 0.95, "recall": 0.65, "density": 0.9666666667, "coverage": 0.4333333333},
        5: {"precision": 1.0, "recall": 0.9, "density": 0.88, "coverage": 0.65},
    }.items():
        found = distribution.manifold_measures(real, samples, neighbours)
        assert values(found) == pytest.approx(expected)


def test_neighbourhoods_in_blocks(monkeypatch):
    rng = np.random.default_rng(3)
    real, samples = rng.normal(size=(37, 4)), rng.normal(0.3, 1, size=(23, 4))
    whole = distribution.manifold_measures(real, samples)
    monkeypatch.setattr(distribution, "BLOCK", 11)
    assert distribution.manifold_measures(real, samples) == whole


@pytest.mark.parametrize("neighbours", [1, 5])
def test_a_set_is_its_own_neighbourhood(neighbours):
    real = np.random.default_rng(4).normal(size=(50, 3)) + 100
    found = distribution.manifold_measures(real, real.copy(), neighbours)
    expected = {"precision": 1, "recall": 1, "density": 1 + 1 / neighbours, "coverage": 1}
    assert values(found) == pytest.approx(expected)


def test_equal_images_do_not_distort_density():
    """Half of the masks are empty: ten zeros, of which each holds the nine others in its ball."""
    rng = np.random.default_rng(5)
    others = rng.normal(50, 5, size=(10, 7))
    real = np.concatenate([np.zeros((10, 7)), others])
    noise = 1e-7 * rng.normal(size=real.shape)  # float32 features of equal images
    found = distribution.manifold_measures(real, real + noise, neighbours=2)
    assert values(found) == pytest.approx(
        {"precision": 1, "recall": 1, "density": (10 * 10 / 9 + 10 * 3 / 2) / 20, "coverage": 1}
    )


def test_neighbourhoods_of_too_few():
    few, many = np.zeros((5, 2)), np.random.default_rng(0).normal(size=(20, 2))
    found = distribution.manifold_measures(many, few)
    assert found["recall"] == {
        "value": None,
        "reason": "5 samples, but a ball to neighbour 5 needs 6 or more",
    }
    assert found["precision"]["value"] is not None
    found = values(distribution.manifold_measures(few, many))
    assert [name for name, value in found.items() if value is not None] == ["recall"]


# ---------------------------------------------------------------------------- similarity of pairs


def levels(seed, size):
    """Four pairs of images as numpy draws them: squares, and these with noise."""
    random = np.random.RandomState(seed)
    base = random.randint(0, 256, (4, size // 8, size // 8)).astype(np.uint8)
    base = base.repeat(8, axis=1).repeat(8, axis=2)
    noisy = base.astype(int) + random.randint(-40, 41, base.shape)
    return base, noisy.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (256, [0.97866815, 0.97746950, 0.97674066, 0.97701824]),
        (64, [0.95826328, 0.96976525, 0.97240007, 0.96061116]),
    ],
)
def test_similarity_equals_monai(size, expected):
    """MONAI 1.6.1, MultiScaleSSIMMetric in float64: five scales, and the first three."""
    a, b = levels(3, size)
    found = distribution.multi_scale_similarity(a, b)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(distribution.multi_scale_similarity(b, a), found)


def test_similarity_of_one_window_by_hand():
    """Images of the window's size: one position, weighted means and variances."""
    rng = np.random.default_rng(6)
    a, b = rng.integers(0, 256, (2, 1, 11, 11)).astype(np.uint8)
    axis = np.exp(-(np.arange(-5, 6.0) ** 2) / (2 * 1.5**2))
    weights = np.outer(axis, axis) / axis.sum() ** 2
    x, y = a[0].astype(float), b[0].astype(float)
    mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
    covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
    variances = (weights * ((x - mean_x) ** 2 + (y - mean_y) ** 2)).sum()
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    expected *= (2 * covariance + c2) / (variances + c2)
    found = distribution.multi_scale_similarity(a, b)
    assert found == pytest.approx([max(expected, 0)], abs=1e-5)


def test_similarity_in_closed_form():
    """Constant images differ in luminance alone, which only the coarsest scale counts."""
    a, b = np.full((1, 176, 180), 250, np.uint8), np.full((1, 176, 180), 50, np.uint8)
    luminance = (2 * 250 * 50 + 2.55**2) / (250**2 + 50**2 + 2.55**2)
    assert distribution.multi_scale_similarity(a, b) == pytest.approx(luminance**0.1333, rel=2e-5)
    three = distribution.multi_scale_similarity(a[:, :44, :60], b[:, :44, :60])
    assert three == pytest.approx(luminance ** (0.3001 / (0.0448 + 0.2856 + 0.3001)), rel=1e-5)
    assert distribution.multi_scale_similarity(a, a) == pytest.approx([1], abs=1e-6)
    checks = np.indices((64, 64)).sum(axis=0) % 2 * 255
    opposite = distribution.multi_scale_similarity(
        checks[None].astype(np.uint8), 255 - checks[None].astype(np.uint8)
    )
    assert opposite == [0]  # a negative covariance


def test_pairs_are_distinct():
    for n, count in ((6, 15), (6, 99), (400, 500)):
        first, second = distribution.random_pairs(n, count)
        assert len(first) == min(count, n * (n - 1) // 2)
        assert len(set(zip(first, second))) == len(first)
        assert (first >= 0).all() and (first < second).all() and (second < n).all()
    again = distribution.random_pairs(400, 500)
    assert all(np.array_equal(*own) for own in zip((first, second), again))
    assert len(set(first)) > 200 and len(set(second)) > 200


def test_diversity_by_hand():
    """Three constant images make three pairs; the second channel is equal in all."""
    images = np.full((3, 32, 32, 2), 90, np.uint8)
    images[:, :, :, 0] = np.array([20, 60, 200])[:, None, None]
    similarity = {
        (a, b): float(
            distribution.multi_scale_similarity(images[[a]][..., 0], images[[b]][..., 0])[0]
        )
        for a, b in itertools.combinations(range(3), 2)
    }
    found = distribution.diversity(images, ["T1", "T2"])
    mean = np.mean(list(similarity.values()))
    assert values(found) == pytest.approx({"T1": mean, "T2": 1, "all": (mean + 1) / 2})
    # Without one image there is one pair: the jackknife's variance is theirs times (n - 1) / n * n.
    error = np.sqrt(np.var(list(similarity.values())) * 2)
    assert found["T1"]["high"] - mean == pytest.approx(1.96 * error)
    assert found["T1"]["pairs"] == 3
    assert list(distribution.diversity(images, [])) == ["all"]
    two = distribution.diversity(images[:2], [])["all"]
    assert two["pairs"] == 1 and "low" not in two
    assert distribution.diversity(images[:1], [])["all"]["reason"] == (
        "a pair needs 2 images, found 1"
    )
    assert (
        "the window needs 11 pixels" in distribution.diversity(images[:, :8], [])["all"]["reason"]
    )


def test_the_interval_of_pairs_covers_the_mean():
    """Values x_i + x_j of normal numbers with mean 0, in a part of the pairs."""
    rng = np.random.default_rng(7)
    covered = 0
    for seed in range(300):
        x = rng.normal(size=40)
        first, second = distribution.random_pairs(40, 200, seed)
        entry = distribution._pair_mean(x[first] + x[second], first, second, 40)
        covered += entry["low"] <= 0 <= entry["high"]
    assert 0.92 <= covered / 300 <= 0.99  # of 95 %


# ------------------------------------------------------------------------------ sets of slices


@pytest.fixture(scope="module")
def slices():
    """Every other slice of phantom patients, and those between: uint8 [48, 48, 48, 3] each."""
    found = []
    for index in range(4):
        volumes = phantom_patient(0, index)
        for z in range(50, 98, 2):
            planes = []
            for name in ("flair", "seg", "t1ce"):
                plane = volumes[name][::5, ::5, z]
                if name == "seg":
                    plane = np.vectorize(LABEL_CODES.get)(plane.astype(int))
                else:
                    plane = plane / volumes[name].max() * 255
                planes.append(plane)
            found.append(np.stack(planes, axis=-1))
    slices = np.stack(found).round().astype(np.uint8)
    return slices[::2], slices[1::2]


@pytest.fixture(scope="module")
def rows(slices):
    """Table of changed copies of one half beside the other, by how they were changed."""
    real, half = slices
    rng = np.random.default_rng(0)
    n = len(half)
    changed = {name: half.copy() for name in ("shuffled", "noisy", "constant", "blurred")}
    changed["shuffled"] = real.copy()
    changed["shuffled"][..., 2] = real[rng.permutation(n), ..., 2]
    noisy = rng.choice(n, n // 10, replace=False)
    changed["noisy"][noisy, ..., 1] = rng.integers(0, 256, (len(noisy), *half.shape[1:3]))
    changed["constant"][..., 0] = 128
    tensor = torch.from_numpy(half[..., 0]).float()[:, None]
    changed["blurred"][..., 0] = torch.nn.functional.avg_pool2d(tensor, 5, 1, 2)[:, 0].round()
    largest_tumour = (half[..., 1] > 0).sum(axis=(1, 2)).argmax()
    sets = {
        "half": half,
        **changed,
        "collapsed": half[[largest_tumour]].repeat(n, axis=0),
        "itself": real,
    }
    extractor = extractors.random()
    return {
        name: distribution.table(real, own, CHANNELS, extractor, pairs=100)["channels"]
        for name, own in sets.items()
    }


def row(rows, name, channel):
    return values(rows[name][channel]["samples"])


def test_a_set_beside_itself(rows):
    for channel in (*CHANNELS, "all"):
        own = row(rows, "itself", channel)
        assert own["frechet_distance"] == pytest.approx(0, abs=1e-6)
        assert own["kernel_distance"] < 0  # each image beside itself makes the sets too alike
        assert own["precision"] == own["recall"] == own["coverage"] == 1
        assert own["density"] == pytest.approx(1.2, abs=0.15)  # 1 + 1 / 5 without equal masks
        assert own["ms_ssim"] == rows["itself"][channel]["real"]["ms_ssim"]["value"]


@pytest.mark.parametrize(
    ("name", "moved"), [("noisy", "Seg"), ("constant", "FLAIR"), ("blurred", "FLAIR")]
)
def test_only_the_changed_channel_moves(rows, name, moved):
    for channel in CHANNELS:
        if channel != moved:
            assert rows[name][channel] == rows["half"][channel]
    for channel in (moved, "all"):
        own, base = row(rows, name, channel), row(rows, "half", channel)
        assert own["frechet_distance"] > 2 * base["frechet_distance"]
        assert own["precision"] < base["precision"]


def test_shuffled_channels_move_only_all_together(rows):
    for channel in CHANNELS:
        own, base = row(rows, "shuffled", channel), row(rows, "itself", channel)
        own.pop("ms_ssim"), base.pop("ms_ssim")  # of other pairs
        assert own == pytest.approx(base, abs=1e-6)
    own, base = row(rows, "shuffled", "all"), row(rows, "itself", "all")
    assert own["frechet_distance"] > 50 and base["frechet_distance"] < 1e-6
    assert own["kernel_distance"] > base["kernel_distance"] + 0.1
    assert own["precision"] < 0.9


def test_a_constant_channel_has_no_diversity(rows):
    own, base = row(rows, "constant", "FLAIR"), row(rows, "half", "FLAIR")
    assert own["precision"] == own["coverage"] == own["density"] == 0
    assert own["ms_ssim"] == pytest.approx(1, abs=1e-6) and base["ms_ssim"] < 0.9


def test_a_collapsed_set_is_precise_without_recall(rows):
    for channel in (*CHANNELS, "all"):
        own = row(rows, "collapsed", channel)
        assert own["recall"] == 0 and own["coverage"] < 0.2
        assert own["ms_ssim"] == pytest.approx(1, abs=1e-6)
        assert rows["half"][channel]["samples"]["ms_ssim"]["high"] < 0.95


def test_blur_moves_the_highest_frequencies(slices):
    """The mean log power of the outer rings falls, that of the innermost hardly."""
    real = slices[0][..., :1]
    blurred = torch.nn.functional.avg_pool2d(
        torch.from_numpy(real).float().permute(0, 3, 1, 2), 3, 1, 1
    )
    blurred = blurred.permute(0, 2, 3, 1).round().byte().numpy()
    power = [distribution.features(own)[:, 160:].mean(axis=0) for own in (real, blurred)]
    gap = power[0] - power[1]
    assert abs(gap[0]) < 0.1 and (gap[6:] > 1).all()


def test_real_slices_without_a_channel_still_notice_it(slices):
    """A channel that is black in all real slices; the samples show something in it."""
    black, half = slices[0].copy(), slices[1].copy()
    black[..., 0], half[..., 0] = 0, 0
    wrong = half.copy()
    wrong[..., 0] = slices[1][..., 0]
    tables = [
        distribution.table(black, own, CHANNELS, extractors.random(), pairs=10)["channels"]
        for own in (half, wrong)
    ]
    right, wrong = (values(own["FLAIR"]["samples"]) for own in tables)
    assert right["frechet_distance"] == 0 and right["precision"] == right["recall"] == 1
    assert wrong["frechet_distance"] > 1000 and wrong["precision"] == 0


def test_the_floor_has_as_many_images(slices):
    real, train = slices
    done = []
    extractor = extractors.random()
    found = distribution.table(
        real, train[:20], CHANNELS, extractor, train=train, pairs=40, progress=done.append
    )
    assert found["counts"] == {"real": len(real), "samples": 20, "floor": 20}
    assert sum(done) == distribution.passes((len(real), 20, 20), CHANNELS)
    assert list(found["channels"]) == [*CHANNELS, "all"]
    for own in found["channels"].values():
        assert list(own["samples"]) == list(own["floor"]) == MEASURES
        assert list(own["real"]) == ["ms_ssim"]
        assert "20 images for" in own["floor"]["frechet_distance"]["note"]
        for name in ("precision", "kernel_distance", "ms_ssim"):
            assert own["samples"][name]["low"] <= own["samples"][name]["high"]
    assert found["extractor"]["sha256"] == "" and "FID" not in json.dumps(found)
    assert found["extractor"]["dimensions"] == dict.fromkeys(CHANNELS, 172) | {"all": 196}
    few = distribution.table(real, train, CHANNELS, extractor, train=train[:30], pairs=10)
    assert few["counts"] == {"real": len(real), "samples": len(train), "floor": 30}


@pytest.mark.parametrize("count", [1, 2, 10])
def test_small_sets(slices, count):
    real, train = slices
    for sets in ((real, train[:count]), (real[:count], train[:count])):
        found = distribution.table(*sets, CHANNELS, extractors.random(), train=train, pairs=10)
        json.dumps(found, allow_nan=False)
        own = found["channels"]["all"]["samples"]
        missing = {name for name in MEASURES if own[name]["value"] is None}
        assert all("reason" in own[name] for name in missing)
        expected = {
            1: {"frechet_distance", "kernel_distance", "recall", "ms_ssim"},
            2: {"kernel_distance", "recall"},
            10: set(),
        }[count]
        if len(sets[0]) < 6:
            expected |= {"precision", "density", "coverage"}
        assert missing == expected


def test_a_table_compares_what_an_extractor_finds(slices):
    """Here a pixel of each channel; features that are not to be scaled stay as they are."""
    pixel = dataclasses.replace(
        extractors.random(), scaled=False, of_batch=lambda images: images[:, 24, 20].astype(float)
    )
    real, half = (own.astype(np.float64)[:, 24, 20] for own in slices)  # [N, 3]
    found = distribution.table(*slices, CHANNELS, pixel, pairs=10)
    assert found["extractor"]["dimensions"] == dict.fromkeys(CHANNELS, 1) | {"all": 3}
    expected = [distribution.compare(real[:, [i]], half[:, [i]]) for i in range(3)]
    for channel, own in zip([*CHANNELS, "all"], [*expected, distribution.compare(real, half)]):
        row = found["channels"][channel]["samples"]
        assert {name: row[name] for name in own} == own


def test_pictures_are_measured_as_a_whole(slices):
    found = distribution.table(*slices, [], extractors.random(), pairs=10)
    assert list(found["channels"]) == ["all"]
    assert distribution.passes([2, 3], []) == distribution.passes([2, 3], ["T1"]) == 5


def codes(*own):
    """Masks of these levels, beside an image: uint8 [2, 16, 16, 2]."""
    found = np.zeros((2, 16, 16, 2), np.uint8)
    found[0, 0, : len(own), 0] = own
    return found


@pytest.mark.parametrize(
    ("real", "samples", "message"),
    [
        (codes(51), codes(51)[:, :8], "real images are 16 x 16 with 2 channels, the samples"),
        (codes(51), codes(51)[..., :1], "the samples images 16 x 16 with 1 channel$"),
        (codes(51), codes(51)[:0], "the samples images are no uint8 array"),
        (codes(51), codes(51).astype(np.float32), "found float32"),
        (codes(51)[..., [0, 1, 1]], codes(51)[..., [0, 1, 1]], "have 3 channels, but 2 are named"),
        (codes(1, 2, 4), codes(51), "the real masks hold the levels 0, 1, 2, 4, but label codes"),
        (codes(50), codes(51), "the real masks hold the levels 0, 50"),
        (codes(51), codes(1, 2, 4), "the samples masks hold the levels 0, 1, 2, 4"),
        (codes(51), codes(85, 170, 255), "0, 85, 170, 255, but label codes are 0, 51, 102, 204"),
    ],
)
def test_sets_that_do_not_compare_are_refused(real, samples, message):
    with pytest.raises(ValueError, match=message) as caught:
        distribution.table(real, samples, ["Seg", "T1"], extractors.random())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("levels", [(1, 2, 3), (49, 104), (7, 51, 102, 204, 255), range(16), ()])
def test_raw_masks_of_samples_are_taken(levels):
    distribution.check_sets({"real": codes(51, 102, 204), "samples": codes(*levels)}, ["Seg", "T1"])
    constant = np.full((2, 16, 16, 2), 128, np.uint8)
    distribution.check_sets({"real": codes(51), "samples": constant}, ["Seg", "T1"])
