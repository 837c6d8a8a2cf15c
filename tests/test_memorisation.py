"""Nearest training slices against brute force, and sets in which the copies are known."""

import itertools
import json

import numpy as np
import pytest
from phantom_slices import phantom_slices

from improved_diffusion.brats import CHANNELS
from improved_diffusion.evaluation import distribution, memorisation
from improved_diffusion.evaluation.memorisation import FLIPS, Neighbours, flipped

SEG = CHANNELS.index("Seg")


def neighbours(values, distance=False):
    values = np.asarray(values, dtype=np.float64)
    places = np.where(np.isfinite(values), 0, -1)
    return Neighbours(values, places, np.zeros_like(places), distance)


def random_slices(rng, count, shape, channels):
    """Noise with a mask of codes, some of which are empty."""
    images = rng.integers(0, 256, (count, *shape, len(channels)), dtype=np.uint8)
    if "Seg" in channels:
        mask = images[..., channels.index("Seg")]
        mask[:] = np.array([0, 51, 102, 204])[mask % 4]
        mask[::3] = 0
    return images


def equal_spectra(images, train, channels):
    """What is compared: float32 [N, H, W, C], 0 where a channel is constant."""
    reference = memorisation._mean_spectrum(train)
    return memorisation._comparable(images, channels, reference)[0].permute(1, 2, 3, 0).numpy()


def brute_force(sample, train, channels):
    """Correlation of a sample with every flip of every training slice: [M, 4, C + 1]."""
    found = np.full((len(train), 4, len(channels) + 1), np.nan)
    for i, flip in itertools.product(range(len(train)), range(4)):
        other = flipped(train[i], FLIPS[flip])
        joint = []
        for c in range(len(channels)):
            a, b = sample[..., c].ravel().astype(float), other[..., c].ravel().astype(float)
            if a.std() > 0 and b.std() > 0:
                found[i, flip, c] = np.corrcoef(a, b)[0, 1]
            if channels[c] != "Seg" and (a.std() > 0 or b.std() > 0):
                joint.append(np.nan_to_num(found[i, flip, c]))
        found[i, flip, -1] = np.mean(joint)
    return found


@pytest.mark.parametrize("shape", [(8, 6), (7, 9), (8, 5)])
def test_neighbours_are_those_of_all_pairs(shape, monkeypatch):
    monkeypatch.setattr(memorisation, "SAMPLE_BLOCK", 4)
    monkeypatch.setattr(memorisation, "TRAIN_BLOCK", 5)
    rng = np.random.default_rng(0)
    channels = ["FLAIR", "Seg", "T1"]
    samples = random_slices(rng, 9, shape, channels)
    train = random_slices(rng, 12, shape, channels)
    samples[4, ..., 0] = train[5:8, ..., 0] = 9
    found = memorisation.nearest(samples, train, channels)
    columns = [*(found.channels[name] for name in channels), found.joint]
    images, others = (equal_spectra(own, train, channels) for own in (samples, train))
    for i, sample in enumerate(images):
        pairs = brute_force(sample, others, channels)
        for column, own in enumerate(columns):
            if np.isnan(pairs[..., column]).all():
                assert np.isnan(own.value[i]) and own.index[i] == -1
                continue
            best = np.nanargmax(pairs[..., column])
            assert (own.index[i], own.flip[i]) == np.unravel_index(best, (12, 4))
            expected = pairs[..., column].ravel()[best]
            assert own.value[i] == pytest.approx(expected, abs=1e-5)
    assert np.isnan(found.channels["Seg"].value).sum() == 3


def test_images_get_the_mean_spectrum():
    """Whatever filter they went through that treats all directions alike."""
    rng = np.random.default_rng(0)
    noise = rng.normal(128, 20, (1, 32, 32, 2)).round().astype(np.uint8)
    wave = 127.5 + 100 * np.cos(2 * np.pi * np.arange(32) * 4 / 32)  # 3 / 24 in 1 / pixel
    train = noise.copy()
    train[..., 1] = np.round(wave)
    reference = memorisation._mean_spectrum(train)
    np.testing.assert_allclose(reference.sum(dim=1), 1, rtol=1e-5)
    assert reference.shape[1] == 18 and reference[:, 0].abs().max() < 1e-6
    assert reference[1, 3] > 0.999
    found = equal_spectra(noise, train, ["T1", "T2"])
    power = np.abs(np.fft.fft2(found, axes=(1, 2))) ** 2
    radius = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.fftfreq(32))
    for channel in range(2):
        share = power[0, ..., channel] / power[0, ..., channel].sum()
        for ring in range(1, 18):
            inside = (radius > (ring - 1) / 24 + 1e-9) & (radius <= ring / 24 + 1e-9)
            assert share[inside].sum() == pytest.approx(float(reference[channel, ring]), abs=1e-4)
    mask = equal_spectra(train, noise, ["Seg", "T1"])[0, ..., 0]
    plain = train[0, ..., 0] - train[0, ..., 0].mean()
    np.testing.assert_allclose(mask, plain / np.linalg.norm(plain), atol=1e-5)


def test_slices_of_the_same_patient_are_left_out():
    rng = np.random.default_rng(0)
    train = random_slices(rng, 6, (8, 8), ["T1"])
    patients = np.array(["a", "a", "b", "b", "c", "c"])
    alone = memorisation.nearest(
        train, train, ["T1"], sample_groups=patients, train_groups=patients
    ).joint
    assert (patients[alone.index] != patients).all() and (alone.value < 0.9).all()
    itself = memorisation.nearest(train, train, ["T1"]).joint
    assert itself.index.tolist() == list(range(6)) and (itself.value == 1).all()
    assert (itself.flip == 0).all()
    none = memorisation.nearest(
        train[:2], train[:2], ["T1"], sample_groups=patients[:2], train_groups=patients[:2]
    )
    assert none.joint.index.tolist() == [-1, -1] and np.isnan(none.joint.value).all()
    with pytest.raises(ValueError, match="found 6 and 0"):
        memorisation.nearest(train, train, ["T1"], sample_groups=patients)


def test_slices_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="one size with the same channels"):
        memorisation.nearest(
            np.zeros((1, 8, 8, 1), np.uint8), np.zeros((1, 8, 9, 1), np.uint8), ["T1"]
        )
    with pytest.raises(ValueError, match="found float32"):
        memorisation.shrink(np.zeros((1, 8, 8, 1), np.float32), ["T1"])


def test_slices_shrink_to_means_of_areas(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 128, 256, 2), dtype=np.uint8)
    found = memorisation.shrink(images, ["Seg", "T1"])
    means = images[..., 1].reshape(5, 64, 2, 64, 4).mean(axis=(2, 4))
    np.testing.assert_allclose(found[..., 1], means, atol=0.5)
    assert set(np.unique(found[..., 0])) <= {0, 51, 102, 204}
    np.testing.assert_array_equal(memorisation.shrink(found, ["Seg", "T1"]), found)
    blocks = memorisation.shrink(iter([images[:2], images[2:]]), ["Seg", "T1"])
    np.testing.assert_array_equal(blocks, found)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    np.testing.assert_array_equal(memorisation.shrink(mapped, ["Seg", "T1"]), found)
    out = np.lib.format.open_memmap(tmp_path / "out.npy", "w+", np.uint8, found.shape)
    assert memorisation.shrunk_shape(images.shape) == found.shape
    np.testing.assert_array_equal(memorisation.shrink(mapped, ["Seg", "T1"], out=out), found)
    small = rng.integers(0, 256, (1, 30, 64, 1), dtype=np.uint8)
    np.testing.assert_array_equal(memorisation.shrink(small, ["T1"]), small)


def test_distance_in_feature_space(monkeypatch):
    monkeypatch.setattr(memorisation, "SAMPLE_BLOCK", 4)
    monkeypatch.setattr(memorisation, "TRAIN_BLOCK", 5)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(9, 7)), rng.normal(size=(12, 7))
    a[3] = b[8]
    found = memorisation.nearest_features(a, b)
    distances = np.linalg.norm(a[:, None] - b, axis=2)
    np.testing.assert_array_equal(found.index, distances.argmin(axis=1))
    np.testing.assert_allclose(found.value, distances.min(axis=1), rtol=1e-12)
    assert found.value[3] == 0 and found.nearness[3] == 0 and (found.nearness <= 0).all()
    groups = np.arange(12) % 3
    other = memorisation.nearest_features(b, b, sample_groups=groups, train_groups=groups)
    between = np.linalg.norm(b[:, None] - b, axis=2)
    between[groups[:, None] == groups] = np.inf
    np.testing.assert_array_equal(other.index, between.argmin(axis=1))
    with pytest.raises(ValueError, match="features"):
        memorisation.nearest_features(a, b[:, :3])


def test_the_threshold_leaves_one_percent_of_the_held_out():
    """Of 1, ..., 199 that of rank 0.99 x 200 = 198; a new value is above with chance 2 / 200."""
    held_out = neighbours(np.arange(1, 200) / 1000)
    samples = neighbours([0.1, 0.198, 0.1981, 0.5, np.nan])
    found = memorisation.compare(samples, held_out)
    assert found["threshold"] == 0.198
    assert found["expected"] == pytest.approx(0.01)
    assert (found["samples"], found["held_out"]) == (4, 199)
    assert found["share"]["value"] == 0.5
    assert 0 < found["share"]["low"] < 0.5 < found["share"]["high"] < 1
    few = memorisation.compare(samples, neighbours([0.3, 0.2, np.nan]))
    assert few["threshold"] == 0.3 and few["expected"] == pytest.approx(1 / 3)
    assert few["share"]["value"] == 0.25
    near = memorisation.compare(neighbours([3, 1, 9], True), neighbours([2, 4], True))
    assert near["threshold"] == 2 and near["share"]["value"] == pytest.approx(1 / 3)
    nothing = memorisation.compare(neighbours([np.nan]), held_out)
    assert nothing == {"samples": 0, "held_out": 199}


@pytest.mark.parametrize("count", [9, 150, 1000])
def test_the_expected_share_is_that_of_equal_sets(count):
    """Held-out slices and samples from one distribution, whatever their number."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(400):
        threshold = memorisation._threshold(rng.normal(size=count))
        shares.append((rng.normal(size=200) > threshold).mean())
    expected = 1 - memorisation._rank(count) / (count + 1)
    assert np.mean(shares) == pytest.approx(expected, abs=4 * np.std(shares) / 20)
    assert expected <= max(0.01, 1 / (count + 1)) + 1e-12


def test_the_interval_covers_the_share(monkeypatch):
    """56 patients whose slices are alike; 5 % of the samples are copies, 1 % of the rest above."""
    monkeypatch.setattr(memorisation, "BOOTSTRAP_DRAWS", 200)
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(56), 40)
    covered = 0
    for copies in [0, 0.05] * 20:
        held_out = 0.5 * rng.normal(size=56)[patients] + 0.75**0.5 * rng.normal(size=56 * 40)
        samples = np.where(rng.random(400) < copies, 9, rng.normal(size=400))
        share = memorisation.compare(neighbours(samples), neighbours(held_out), patients)["share"]
        covered += share["low"] <= copies + (1 - copies) * 0.01 <= share["high"]
    assert 35 <= covered <= 40  # of 95 %


def test_patients_widen_the_interval():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(20), 50)
    held_out = neighbours(rng.normal(size=20)[patients] + 0.1 * rng.normal(size=1000))
    samples = neighbours(rng.normal(size=300))
    width = [
        np.subtract(
            *(memorisation.compare(samples, held_out, own)["share"][k] for k in ("high", "low"))
        )
        for own in (None, patients)
    ]
    assert width[1] > 1.5 * width[0]


# --- sets with a known answer --------------------------------------------------------------------


@pytest.fixture(scope="module")
def train():
    return np.concatenate([phantom_slices(index) for index in range(3)])


@pytest.fixture(scope="module")
def others():
    """Slices of three other patients, and those that lie between them: uint8 [24, 60, 60, 5]."""
    slices = np.concatenate([phantom_slices(index) for index in (3, 4, 5)])
    return slices[::2], slices[1::2]


@pytest.fixture(scope="module")
def held_out(train, others):
    """Neighbours of the first of these."""
    return memorisation.nearest(others[0], train, CHANNELS)


def small_change(copies):
    """Brighter, with another contrast, and with noise; of the mask only noise."""
    noisy = np.round(copies * 0.8 + 12 + np.random.default_rng(0).normal(0, 3, copies.shape))
    noisy[..., SEG] = copies[..., SEG] + (noisy[..., SEG] % 7)
    return noisy.clip(0, 255).astype(np.uint8)


def test_other_real_slices_are_no_copies(train, others, held_out):
    found = memorisation.report(memorisation.nearest(others[1], train, CHANNELS), held_out)
    assert found["channels"]["Seg"]["samples"] < 24  # the others have an empty mask
    for own in (found["joint"], *found["channels"].values()):
        assert own["share"]["low"] < own["expected"] < own["share"]["high"]


@pytest.mark.parametrize("flip", FLIPS)
@pytest.mark.parametrize("change", [lambda own: own, small_change], ids=["equal", "changed"])
def test_every_copy_is_found(train, others, held_out, flip, change):
    """2 of 24 samples: exact copies, turned or not, brighter or not."""
    samples = others[1].copy()
    copied = {7: 30, 21: 12}
    for place, source in copied.items():
        samples[place] = flipped(change(train[source][None])[0], flip)
    before = memorisation.nearest(others[1], train, CHANNELS)
    found = memorisation.nearest(samples, train, CHANNELS)
    for place, source in copied.items():
        assert found.joint.value[place] > 0.98
        for own in (found.joint, *found.channels.values()):
            assert (own.index[place], FLIPS[own.flip[place]]) == (source, flip)
    rest = np.setdiff1d(np.arange(24), list(copied))
    np.testing.assert_array_equal(found.joint.value[rest], before.joint.value[rest])
    report = memorisation.report(found, held_out, worst=5)
    above = np.sum(before.joint.value[rest] > report["joint"]["threshold"])
    assert report["joint"]["share"]["value"] == (above + 2) / 24
    worst = report["worst"][:2]
    assert {(own["index"], own["train_index"]) for own in worst} == set(copied.items())
    assert [own["flip"] for own in worst] == [flip] * 2


def blurred(slices):
    """The images through a window of weights 1, 2, 1 in both directions, the masks as they are."""
    images = slices.astype(float)
    for axis in (1, 2):
        images = (np.roll(images, 1, axis) + 2 * images + np.roll(images, -1, axis)) / 4
    images[..., SEG] = slices[..., SEG]
    return images.round().astype(np.uint8)


def test_blur_is_no_memory(train, others, held_out):
    """And does not hide it."""
    found = memorisation.nearest(blurred(others[0]), train, CHANNELS)
    np.testing.assert_allclose(found.joint.value, held_out.joint.value, atol=0.005)
    report = memorisation.report(found, held_out)
    assert report["joint"]["share"]["value"] <= 1 / 24
    copies = memorisation.nearest(blurred(train), train, CHANNELS)
    assert copies.joint.value.min() > 0.98 > report["joint"]["threshold"]
    np.testing.assert_array_equal(copies.joint.index, np.arange(len(train)))


def test_shuffled_channels_and_noisy_masks_are_no_memory(train, others, held_out):
    changed = others[0].copy()
    changed[..., 0] = others[0][::-1, ..., 0]
    changed[:3, ..., SEG] = np.random.default_rng(0).integers(0, 256, (3, 60, 60))
    found = memorisation.nearest(changed, train, CHANNELS)
    assert memorisation.compare(found.joint, held_out.joint)["share"]["value"] == 0
    assert found.joint.value.mean() < held_out.joint.value.mean()
    assert (found.channels["Seg"].value[:3] < 0.2).all()
    np.testing.assert_array_equal(found.channels["T1"].value, held_out.channels["T1"].value)


def test_sets_of_copies_and_sets_of_none(train, others, held_out):
    def share(samples):
        found = memorisation.nearest(samples, train, CHANNELS).joint
        return memorisation.compare(found, held_out.joint)["share"]

    real = share(train)
    assert real["value"] == real["high"] == 1 and 0.9 < real["low"] < 1
    assert share(np.repeat(train[20:21], 30, axis=0))["value"] == 1  # collapsed onto a copy
    collapsed = share(np.repeat(others[0][8:9], 30, axis=0))
    noise = share(np.random.default_rng(0).integers(0, 256, (30, 60, 60, 5), dtype=np.uint8))
    assert collapsed["value"] == noise["value"] == 0 and collapsed["high"] > 0.01
    black = np.zeros((30, 60, 60, 5), np.uint8)
    found = memorisation.report(memorisation.nearest(black, train, CHANNELS), held_out)
    assert found["joint"] == {"samples": 0, "held_out": 24} and found["worst"] == []


@pytest.mark.parametrize("count", [1, 2, 10])
def test_few_samples(train, others, held_out, count):
    found = memorisation.report(memorisation.nearest(others[0][:count], train, CHANNELS), held_out)
    json.dumps(found, allow_nan=False)
    share = found["joint"]["share"]
    assert share["value"] == 0 and 1.5 / (count + 1) < share["high"] < 1
    assert len(found["worst"]) == count
    few = memorisation.nearest(others[0][:count], train[:count], CHANNELS)
    assert memorisation.report(few, few)["joint"]["share"]["value"] == 0


def test_copies_in_feature_space(train, others, held_out):
    samples = others[1].copy()
    samples[4] = train[9]
    scaled = distribution.standardise(*map(distribution.features, (train, samples, others[0])))
    own, other = (memorisation.nearest_features(part, scaled[0]) for part in scaled[1:])
    assert own.index[4] == 9 and own.value[4] == pytest.approx(0, abs=1e-3)
    found = memorisation.report(
        memorisation.nearest(samples, train, CHANNELS), held_out, features=(own, other)
    )["features"]
    assert found["threshold"] == other.value.min()
    assert found["share"]["value"] == (own.value < other.value.min()).mean() >= 1 / 24
