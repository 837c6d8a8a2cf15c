"""Measures of samples against values counted by hand and known distributions."""

import numpy as np
import pytest
import torch

from improved_diffusion.evaluation import distribution, validity
from improved_diffusion.phantom import phantom_patient

CHANNELS = ["FLAIR", "Seg", "T1CE"]


def square(size, top, left, side, level=100):
    image = np.zeros((size, size), np.uint8)
    image[top : top + side, left : left + side] = level
    return image


def test_outlines_have_no_holes():
    ring = square(16, 2, 2, 10)
    ring[4:10, 4:10] = 0  # a ventricle
    ring[6, 6] = 5
    bay = square(16, 2, 2, 10)
    bay[5:8, 0:6] = 3  # open to the border, around a corner
    bay[8:9, 4:6] = 0
    faint = square(16, 2, 2, 10, level=validity.TISSUE_LEVEL)
    found = validity.brain_outline(np.stack([ring, bay, faint]))
    np.testing.assert_array_equal(found[0], square(16, 2, 2, 10) > 0)
    np.testing.assert_array_equal(found[1], bay > 50)
    assert not found[2].any()


def test_a_spiral_of_background_is_outside():
    """A way that turns often must be followed to its end."""
    image = square(17, 3, 3, 11, level=200)
    way = [(r, 1) for r in range(10)] + [(9, c) for c in range(1, 10)]
    way += [(r, 9) for r in range(9, 2, -1)] + [(3, c) for c in range(9, 3, -1)]
    way += [(r, 4) for r in range(3, 8)] + [(7, c) for c in range(4, 8)]
    for r, c in way:
        image[3 + r, 3 + c] = 0
    assert validity.brain_outline(image[None])[0].sum() == 121 - len(set(way))


def test_outlines_stand_out_from_the_background():
    """A sample whose whole channel is too bright keeps its outline."""
    image = square(16, 2, 2, 10)
    np.testing.assert_array_equal(validity.brain_outline(image[None] + 60)[0], image > 0)


def test_agreement_by_hand():
    """Squares of 8, shifted by 4 pixels: 32 pixels in both, 96 in one of them."""
    one, shifted = square(32, 8, 8, 8), square(32, 8, 12, 8)
    mask = square(32, 8, 8, 4, 102)
    samples = np.stack(
        [
            np.stack([one, mask, one], axis=-1),
            np.stack([one, mask, shifted], axis=-1),
            np.zeros((32, 32, 3), np.uint8),
        ]
    )
    np.testing.assert_allclose(validity.channel_agreement(samples, CHANNELS), [1, 32 / 96, 1])
    five = np.stack([one, mask, one, shifted, one], axis=-1)[None]
    names = ["FLAIR", "Seg", "T1", "T1CE", "T2"]
    # Of the six pairs of images three are equal.
    np.testing.assert_allclose(validity.channel_agreement(five, names), [(3 + 3 / 3) / 6])
    assert np.isnan(validity.channel_agreement(samples[..., :2], CHANNELS[:2])).all()


def test_mask_measures_by_hand():
    brain = square(32, 8, 8, 16)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:12, 8:12] = [51, 102, 204, 70]  # 70 is 19 off
    mask[0, 0] = 200  # 4 off a code, outside
    mask[20, 20] = 13  # 13 off, background when snapped
    samples = np.stack([np.stack([brain, mask, brain], axis=-1)] * 2)
    samples[1, ..., 1] = 0
    assert validity.off_code_share(samples, CHANNELS).tolist() == [5 / 1024, 0]
    assert validity.tumour_area(samples, CHANNELS).tolist() == [17 / 1024, 0]
    assert validity.mask_outside_brain(samples, CHANNELS).tolist() == [1 / 17, 0]
    samples[0, :, :, 2] += 7
    assert validity.background_level(samples, CHANNELS).tolist() == [[0, 0, 7], [0, 0, 0]]
    found = validity.summary(samples, CHANNELS)
    assert found["black_background_share"]["value"] == found["empty_mask_share"]["value"] == 0.5
    assert found["mask_outside_brain"] == {"value": 1 / 17, "low": 1 / 17, "high": 1 / 17}
    assert set(found) == {
        "black_background_share",
        "channel_agreement",
        "off_code_share",
        "empty_mask_share",
        "tumour_area",
        "mask_outside_brain",
    }
    assert set(validity.summary(samples[..., :1], ["T1"])) == {"black_background_share"}


def test_the_interval_covers_the_mean():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        interval = validity.mean_interval(rng.exponential(2.0, 80))
        covered += interval["low"] <= 2.0 <= interval["high"]
    assert 180 <= covered <= 198  # of 95 %


@pytest.mark.parametrize(
    ("samples", "channels", "message"),
    [
        (np.zeros((1, 8, 8, 2), np.float32), ["T1", "T2"], "found float32"),
        (np.zeros((1, 8, 8, 2), np.uint8), ["T1"], "2 channels, but 1 are named"),
        (np.zeros((1, 8, 8, 1), np.uint8), ["CT"], "there is no channel 'CT'"),
    ],
)
def test_other_arrays_are_refused(samples, channels, message):
    with pytest.raises(ValueError, match=message):
        validity.summary(samples, channels)
    with pytest.raises(ValueError, match="16 pixels"):
        distribution.features(np.zeros((1, 8, 8, 2), np.uint8))


@pytest.fixture(scope="module")
def slices():
    """Slices of phantom patients at 60 x 60: FLAIR, T1CE."""
    found = []
    for index in range(4):
        volumes = phantom_patient(0, index)
        for z in range(50, 98, 3):
            planes = [
                volumes[name][::4, ::4, z] / volumes[name].max() * 255 for name in ("flair", "t1ce")
            ]
            found.append(np.stack(planes, axis=-1))
    return np.stack(found).round().astype(np.uint8)


def test_shuffled_channels_are_noticed(slices):
    names = ["FLAIR", "T1CE"]
    shuffled = slices.copy()
    shuffled[..., 1] = np.roll(slices[..., 1], 11, axis=0)
    assert validity.channel_agreement(slices, names).mean() > 0.97
    assert validity.channel_agreement(shuffled, names).mean() < 0.9


def test_frechet_distance_of_gaussians():
    """Means 3 apart, deviations 2 and 5: 9 + (5 - 2)^2, along one axis; nothing along the other."""
    rng = np.random.default_rng(0)
    a = rng.normal([0, 1], [2, 1], (200_000, 2))
    b = rng.normal([3, 1], [5, 1], (200_000, 2))
    assert distribution.frechet_distance(a, b) == pytest.approx(18, rel=0.01)
    assert distribution.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    turn = np.linalg.qr(rng.normal(size=(2, 2)))[0]
    turned = distribution.frechet_distance(a @ turn, b @ turn)
    assert turned == pytest.approx(distribution.frechet_distance(a, b))


def test_kernel_distance_by_hand():
    """Of numbers 0, 1, 2 and 1, 1, 3 with the kernel (x y + 1)^3, summed pair by pair."""
    a, b = np.array([[0.0], [1], [2]]), np.array([[1.0], [1], [3]])
    kernel = lambda x, y: (x * y + 1) ** 3  # noqa: E731
    within_a = 2 * (kernel(0, 1) + kernel(0, 2) + kernel(1, 2)) / 6
    within_b = 2 * (kernel(1, 1) + 2 * kernel(1, 3)) / 6
    between = sum(kernel(x, y) for x in (0, 1, 2) for y in (1, 1, 3)) / 9
    expected = within_a + within_b - 2 * between
    assert distribution.kernel_distance(a, b)["value"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="3 samples or more"):
        distribution.kernel_distance(a[:2], b)


def test_kernel_distance_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(37, 4)), rng.normal(0.3, 1, size=(23, 4))
    whole = distribution.kernel_distance(a, b)
    monkeypatch.setattr(distribution, "BLOCK", 10)
    assert distribution.kernel_distance(a, b) == pytest.approx(whole)


def test_kernel_distance_is_unbiased_and_its_interval_covers():
    """Normal numbers, shifted by 1: with the kernel's moments the distance is known exactly.

    E k = 1 + 3 E x E y + 3 E x^2 E y^2 + E x^3 E y^3, with E x^2 = 1, 2 and E x^3 = 0, 4: within
    the first set 1 + 3, within the second 1 + 3 + 3 4 + 16, between 1 + 0 + 3 2 + 0.
    """
    expected = 4 + 32 - 2 * 7
    rng = np.random.default_rng(2)
    found = [
        distribution.kernel_distance(rng.normal(0, 1, (150, 1)), rng.normal(1, 1, (100, 1)))
        for _ in range(300)
    ]
    values = np.array([own["value"] for own in found])
    assert values.mean() == pytest.approx(expected, abs=3 * values.std() / np.sqrt(300))
    covered = np.mean([own["low"] <= expected <= own["high"] for own in found])
    assert 0.88 <= covered <= 0.98  # of 95 %, with a skewed statistic
    same = [
        distribution.kernel_distance(rng.normal(0, 1, (60, 1)), rng.normal(0, 1, (60, 1)))["value"]
        for _ in range(300)
    ]
    assert np.mean(same) == pytest.approx(0, abs=3 * np.std(same) / np.sqrt(300))


def test_features_tell_noise_from_slices(slices):
    halves = slices[::2], slices[1::2]
    rng = np.random.default_rng(0)
    noisy = [
        (halves[1] + rng.normal(0, sigma, halves[1].shape)).clip(0, 255).astype(np.uint8)
        for sigma in (4, 16)
    ]
    sets = [distribution.features(own) for own in (*halves, *noisy)]
    assert sets[0].shape == (32, 160 + 2 * 12)
    assert np.array_equal(sets[0], distribution.features(halves[0], batch_size=5))
    reference, same, little, much = distribution.standardise(*sets)
    assert np.allclose(reference.mean(axis=0), 0) and np.allclose(reference.std(axis=0), 1)
    distances = [
        distribution.kernel_distance(reference, own)["value"] for own in (same, little, much)
    ]
    assert distances[0] < 0.2 * distances[1] < 0.2 * distances[2]


def test_power_spectrum_of_a_wave():
    """8 periods in 64 pixels are a frequency of 1/8, where the third ring of width 1/24 ends."""
    x = torch.arange(64) / 64
    wave = torch.cos(2 * torch.pi * 8 * x).expand(1, 1, 64, 64)
    rings = distribution.power_spectrum(wave)[0]
    assert rings.argmax() == 2
    assert np.sort(rings)[-2] < np.log(2 * distribution.LEAST_POWER)
    noise = torch.randn(50, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(distribution.power_spectrum(noise).mean(axis=0), 0, atol=0.15)
