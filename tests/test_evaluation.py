"""Measures of samples against values counted by hand and known distributions."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from phantom_slices import phantom_slices

from improved_diffusion.brats import CHANNELS as ALL_CHANNELS
from improved_diffusion.evaluation import distribution, validity

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
    return np.concatenate([phantom_slices(index) for index in range(4)])[..., [0, 3]]


def test_shuffled_channels_are_noticed(slices):
    names = ["FLAIR", "T1CE"]
    shuffled = slices.copy()
    shuffled[..., 1] = np.roll(slices[..., 1], 11, axis=0)
    assert validity.channel_agreement(slices, names).mean() > 0.97
    assert validity.channel_agreement(shuffled, names).mean() < 0.9


# --- limits from real slices, and flags -----------------------------------------------------------

FLAIR, SEG = ALL_CHANNELS.index("FLAIR"), ALL_CHANNELS.index("Seg")


@pytest.fixture(scope="module")
def real():
    """Two halves of phantom slices with all channels, by patient: uint8 [32, 60, 60, 5] each."""
    return tuple(np.concatenate([phantom_slices(i), phantom_slices(i + 1)]) for i in (0, 2))


@pytest.fixture(scope="module")
def thresholds(real):
    return validity.calibrate(validity.measure(real[0], ALL_CHANNELS))


def checked(samples, thresholds, channels=ALL_CHANNELS):
    """Flags of a set and its report."""
    measured = validity.measure(samples, channels)
    flags = validity.check(measured, thresholds)
    return flags, validity.report(measured, flags)


def flagged_shares(report):
    """(flag, channel) -> share, where it is above 0."""
    return {
        (flag, channel): found["value"]
        for flag, of_channels in report["flagged"].items()
        for channel, found in of_channels.items()
        if found["value"] > 0
    }


def numbers(found, path=()):
    """Every interval in a report: path -> {"value", "low", "high"}."""
    if "low" in found:
        return {path: found}
    return {
        key: own
        for name, part in found.items()
        if isinstance(part, dict)
        for key, own in numbers(part, (*path, name)).items()
    }


def test_measures_of_every_sample_by_hand():
    checkers = np.indices((32, 32)).sum(axis=0) % 2 * 100
    half = square(32, 0, 0, 32, 255)
    half[16:] = 100
    mask = square(32, 8, 8, 8, 51)
    mask[8:12, 8:16] = 103
    mask[0] = 2  # residue, in the border frame
    samples = np.stack([checkers.astype(np.uint8), mask, half], axis=-1)[None]
    found = validity.measure(samples, CHANNELS)
    assert (found.count, found.size, found.channels) == (1, (32, 32), tuple(CHANNELS))
    values = {
        (name, channel): own.item()
        for name, of_channels in found.values.items()
        for channel, own in of_channels.items()
    }
    # Every neighbour differs by twice the deviation: 1 - 100^2 / (2 50^2).
    assert values["neighbour_likeness", "FLAIR"] == pytest.approx(-1)
    deviation = 155 / 2
    changes = 32 / (2 * 31 * 32)  # between the two halves
    likeness = 1 - changes * 155**2 / (2 * deviation**2)
    assert values["neighbour_likeness", "T1CE"] == pytest.approx(likeness)
    assert values["contrast", "FLAIR"] == 100 and values["contrast", "T1CE"] == 155
    # 8 x 8 in two halves: its outline has 32 pairs, its middle 8.
    assert values["label_changes", "Seg"] == pytest.approx(40 / (2 * 31 * 32))
    assert values["label_51", "Seg"] == values["label_102", "Seg"] == 32 / 1024
    assert values["label_204", "Seg"] == 0
    assert values["largest_label", "Seg"] == 32 / 1024
    assert values["off_code", "Seg"] == 0
    # The background is the median of both halves; all that is well above it is white.
    frame = np.concatenate(
        [half[:2].ravel(), half[-2:].ravel(), half[2:-2, [0, 1, -2, -1]].ravel()]
    )
    assert values["background_level", "T1CE"] == np.median(frame)
    assert values["background_spread", "T1CE"] == 155
    assert values["white", "T1CE"] == 1 and values["white", "FLAIR"] == 0
    assert values["channel_agreement", "images"] == validity.channel_agreement(samples, CHANNELS)


def test_measures_do_not_depend_on_the_blocks(real, monkeypatch):
    whole = validity.measure(real[0], ALL_CHANNELS)
    monkeypatch.setattr(validity, "BLOCK_PIXELS", 5 * 60 * 60)
    blocks = validity.measure(real[0], ALL_CHANNELS)
    for name, of_channels in whole.values.items():
        for channel, values in of_channels.items():
            np.testing.assert_allclose(values, blocks.values[name][channel], rtol=1e-12)
    assert (
        whole.values["mask_outside_brain"]["Seg"].tolist()
        == validity.mask_outside_brain(real[0], ALL_CHANNELS).tolist()
    )


def test_real_slices_pass(real, thresholds):
    """The half that calibrated, and the other patients."""
    for half in real:
        flags, report = checked(half, thresholds)
        assert not flags.any().any() and flags.reasons == []
        assert report["valid_share"]["value"] == 1
        assert report["valid_share"]["low"] == pytest.approx(32 / (32 + 1.96**2), rel=1e-4)
        assert report["background_level"]["T2"]["value"] == 0
        assert report["off_code_share"]["value"] == 0


@pytest.mark.parametrize("count", [1, 2, 10])
def test_few_real_slices_calibrate_sensibly(real, count):
    """Margins let other patients' slices pass, and still find noise and a black channel."""
    for start in (0, 20):
        few = real[0][start : start + count]
        thresholds = validity.calibrate(validity.measure(few, ALL_CHANNELS))
        assert not checked(real[1], thresholds)[0].any().any()
        broken = real[1].copy()
        broken[0, ..., SEG] = np.random.default_rng(0).integers(0, 256, (60, 60))
        broken[1, ..., FLAIR] = 0
        assert np.flatnonzero(checked(broken, thresholds)[0].any()).tolist() == [0, 1]


def test_of_real_slices_99_percent_pass(monkeypatch):
    """The limits share the 1 %, so it holds together; without their margins something is left."""
    bare = tuple(dataclasses.replace(rule, factor=1, margin=0) for rule in validity.RULES)
    monkeypatch.setattr(validity, "RULES", bare)
    rng = np.random.default_rng(0)
    values = {rule.measure: {"T1": rng.standard_cauchy(20_000)} for rule in bare}
    measured = validity.Measured(("T1",), (8, 8), values, 20_000)
    flagged = validity.check(measured, validity.calibrate(measured)).any().mean()
    assert 0.004 < flagged <= 0.01


def test_limits_never_exclude_what_they_are_calibrated_on():
    """Not even checkers, whose neighbours are less alike than noise."""
    checkers = np.broadcast_to(np.indices((16, 16)).sum(axis=0)[..., None] % 2 * 200, (16, 16, 3))
    measured = validity.measure(checkers[None].astype(np.uint8), CHANNELS)
    assert not validity.check(measured, validity.calibrate(measured)).any().any()


def test_limits_are_plain_numbers_of_one_kind(real, thresholds):
    stored = json.loads(json.dumps(dataclasses.asdict(thresholds)))
    flags, _ = checked(real[1], validity.Thresholds(**stored))
    assert not flags.any().any()
    with pytest.raises(ValueError, match="60 x 60 pixels, channels FLAIR, Seg, T1, T1CE, T2"):
        checked(real[1][:, :32, :32], thresholds)
    with pytest.raises(ValueError, match="but the samples are of 60 x 60 pixels, channels T1"):
        checked(real[1][..., [2]], thresholds, ["T1"])


RNG = np.random.default_rng(0)
UNIFORM = RNG.integers(0, 256, (60, 60))
FAINT = RNG.normal(0, 25, (60, 60)).clip(0, 255)
GREY_NOISE = RNG.normal(110, 30, (60, 60)).clip(0, 255)
CODES = RNG.choice([0, 51, 102, 204], (60, 60))


@pytest.mark.parametrize(
    ("channel", "change", "expected"),
    [
        ("Seg", lambda own: UNIFORM, {("noise_only", "Seg"), ("off_code", "Seg")}),
        ("Seg", lambda own: FAINT, {("noise_only", "Seg"), ("off_code", "Seg")}),
        ("Seg", lambda own: CODES, {("noise_only", "Seg")}),
        ("T1", lambda own: UNIFORM, {("noise_only", "T1")}),
        ("T1", lambda own: GREY_NOISE, {("noise_only", "T1")}),
        ("T1", lambda own: FAINT, {("noise_only", "T1")}),
        ("T1", lambda own: 0 * own, {("constant", "T1")}),
        ("T1", lambda own: 0 * own + 128 + UNIFORM % 3, {("constant", "T1")}),
        ("T1", lambda own: 0 * own + 255, {("constant", "T1"), ("saturated", "T1")}),
        ("T1", lambda own: own * 5, {("saturated", "T1")}),
        ("T2", lambda own: own + 20, {("drifted_background", "T2")}),
        ("T1", lambda own: own + 90, {("drifted_background", "T1"), ("saturated", "T1")}),
        ("T1", lambda own: own + UNIFORM % 15, {("drifted_background", "T1")}),
        ("Seg", lambda own: 0 * own + 102, {("constant", "Seg")}),
        ("Seg", lambda own: own + 9, {("drifted_background", "Seg")}),
        ("Seg", lambda own: own + 15, {("drifted_background", "Seg"), ("off_code", "Seg")}),
        # What is no failure: an empty mask, two levels of residue in it, a dark or noisy channel.
        ("Seg", lambda own: 0 * own, set()),
        ("Seg", lambda own: 0 * own + UNIFORM % 3, set()),
        ("T1", lambda own: own * 0.6, set()),
        ("T1", lambda own: own + (own > 0) * (UNIFORM % 31 - 15), set()),
    ],
)
def test_each_failure_moves_its_number_and_only_that(real, thresholds, channel, change, expected):
    samples = real[1].copy()
    broken = [0, 11, 31]
    index = ALL_CHANNELS.index(channel)
    changed = change(samples[broken, ..., index].astype(float))
    samples[broken, ..., index] = changed.clip(0, 255)
    flags, report = checked(samples, thresholds)
    assert flagged_shares(report) == dict.fromkeys(expected, pytest.approx(3 / 32))
    assert np.flatnonzero(flags.any()).tolist() == (broken if expected else [])
    assert {reason["index"] for reason in flags.reasons} == (set(broken) if expected else set())
    _, before = checked(real[1], thresholds)
    if channel != "Seg":  # what the masks show is as it was
        for name in ("off_code_share", "tumour_area", "empty_mask_share", "label_shares"):
            assert report[name] == before[name]
    agreement = report["channel_agreement"]["value"] - before["channel_agreement"]["value"]
    assert abs(agreement) < 0.01


def test_shuffled_channels_move_the_agreement_only(real, thresholds):
    samples = real[1].copy()
    samples[..., FLAIR] = samples[np.roll(np.arange(32), 21), ..., FLAIR]
    _, report = checked(samples, thresholds)
    assert set(flagged_shares(report)) == {("channels_disagree", "images")}
    _, before = checked(real[1], thresholds)
    assert report["channel_agreement"]["high"] < before["channel_agreement"]["low"]
    same = {"background_level", "off_code_share", "tumour_area", "label_shares"}
    assert {name: report[name] for name in same} == {name: before[name] for name in same}


def test_a_tumour_outside_the_brain_is_flagged(real, thresholds):
    samples = real[1].copy()
    tumour = (samples[..., SEG] > 0).mean(axis=(1, 2)) > 0.01
    samples[..., SEG] = np.roll(samples[..., SEG], 30, axis=1)
    _, report = checked(samples, thresholds)
    assert flagged_shares(report)["mask_outside", "Seg"] > 0.5 * tumour.mean()
    assert report["mask_outside_brain"]["value"] > 0.5
    assert report["tumour_area"] == checked(real[1], thresholds)[1]["tumour_area"]


def test_collapsed_and_blurred_sets_are_valid(real, thresholds):
    """Other measures find them."""
    collapsed = np.repeat(real[1][5:6], 20, axis=0)
    assert not checked(collapsed, thresholds)[0].any().any()
    images = torch.from_numpy(real[1].astype(np.float32)).permute(0, 3, 1, 2)
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, padding=1).permute(0, 2, 3, 1).numpy()
    blurred[..., SEG] = real[1][..., SEG]
    assert not checked(blurred.astype(np.uint8), thresholds)[0].any().any()


def test_the_reasons_name_what_was_found(real, thresholds):
    samples = real[1][:4].copy()
    samples[2, ..., FLAIR] = 7
    samples[1, ..., SEG] = UNIFORM
    flags, _ = checked(samples, thresholds)
    assert [(own["index"], own["channel"], own["reason"]) for own in flags.reasons] == [
        (1, "Seg", "noise only"),
        (1, "Seg", "off code"),
        (2, "FLAIR", "constant"),
    ]
    constant = flags.reasons[-1]
    assert constant["value"] == 0 and constant["limit"] == thresholds.limits["contrast"]["FLAIR"]
    assert constant["measure"] == "levels between the 1st and 99th percentile"
    json.dumps(flags.reasons)


@pytest.mark.parametrize("count", [1, 2, 10])
def test_few_samples_have_wide_intervals(real, thresholds, count):
    samples = real[1][:count].copy()
    samples[0, ..., FLAIR] = 0
    _, report = checked(samples, thresholds)
    json.dumps(report, allow_nan=False)
    for found in numbers(report).values():
        assert 0 <= found["low"] <= found["value"] <= found["high"] <= 255
    shares = [own for path, own in numbers(report).items() if path[0] == "flagged"]
    assert all(own["high"] - own["low"] > 0.25 for own in shares)
    assert report["flagged"]["constant"]["FLAIR"]["value"] == 1 / count
    if count == 1:
        assert report["tumour_area"] | {"value": 0} == {"value": 0, "low": 0, "high": 1}
        assert "channel_agreement" not in report  # its only sample has no FLAIR


def test_masks_or_images_alone(real):
    for channels in (["Seg"], ["T1"], ["Seg", "T1"]):
        samples = real[0][..., [ALL_CHANNELS.index(name) for name in channels]]
        thresholds = validity.calibrate(validity.measure(samples, channels))
        flags, report = checked(samples, thresholds, channels)
        assert not flags.any().any()
        assert ("tumour_area" in report) == ("Seg" in channels)
        assert ("mask_outside_brain" in report) == (len(channels) == 2)
        assert "channel_agreement" not in report


def test_the_interval_of_a_share():
    """Wilson's limits solve (p - share)^2 = 1.96^2 p (1 - p) / n."""
    for found, n in ((0, 1), (0, 40), (3, 40), (40, 40), (500, 1000)):
        share = np.arange(n) < found
        interval = validity.share_interval(share)
        assert interval["value"] == found / n
        assert interval["low"] < interval["high"]
        for name in ("low", "high"):
            p = interval[name]
            assert (p - found / n) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-12)
        assert 0 <= interval["low"] <= found / n <= interval["high"] <= 1
    with pytest.raises(ValueError, match="at least one sample"):
        validity.share_interval(np.zeros(0, bool))


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
