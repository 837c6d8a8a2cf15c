"""Whether samples help a segmenter: scores, statistics, training, and the script as a whole."""

import csv
import importlib.util
import json
import os
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion import brats, cli, segmentation_report, segmentation_script
from improved_diffusion.evaluation import segmentation
from improved_diffusion.evaluation.segmentation import REGIONS, Slices

pytest.importorskip("monai", reason="the segmenter is MONAI's")
wilcoxon = pytest.importorskip("scipy.stats", reason="the test is scipy's").wilcoxon

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------ scores


def test_dice_by_hand():
    """Of all slices of a patient together: not the mean over slices, nor over patients."""
    truth = np.zeros((3, 4, 4), np.uint8)
    predicted = truth.copy()
    truth[0, 0] = [1, 1, 2, 3]  # patient A, first slice
    predicted[0, 0] = [1, 2, 2, 0]
    truth[1, 0] = [2, 2, 2, 2]  # patient A, second slice
    predicted[1, 0] = [2, 2, 2, 0]
    truth[2, 0] = [3, 3, 0, 0]  # patient B
    predicted[2, 0] = [3, 3, 3, 1]
    found = segmentation.dice_per_patient(predicted, truth, ["A", "A", "B"])
    assert list(found) == ["A", "B"]
    expected_a = {
        "whole tumour": 2 * 6 / (8 + 6),
        "tumour core": 2 * 1 / (3 + 1),
        "enhancing tumour": 0,
        "oedema": 2 * 4 / (5 + 5),
        "necrotic core": 2 * 1 / (2 + 1),
    }
    expected_b = {
        "whole tumour": 2 * 2 / (2 + 4),
        "tumour core": 2 * 2 / (2 + 4),
        "enhancing tumour": 2 * 2 / (2 + 3),
        "oedema": 1,  # neither shown nor predicted
        "necrotic core": 0,  # not shown, but predicted
    }
    assert found["A"] == pytest.approx(expected_a, abs=1e-6)
    assert found["B"] == pytest.approx(expected_b, abs=1e-6)
    without = segmentation.patients_without(truth, ["A", "A", "B"])
    assert without == {**dict.fromkeys(REGIONS, 0), "oedema": 1, "necrotic core": 1}


def test_a_region_that_is_missed_altogether_scores_0():
    truth, nothing = np.ones((1, 4, 4), np.uint8), np.zeros((1, 4, 4), np.uint8)
    found = segmentation.dice_per_patient(nothing, truth, ["A"])["A"]
    assert (found["whole tumour"], found["necrotic core"], found["oedema"]) == (0, 0, 1)


def test_regions_are_those_of_the_challenge():
    whole, core, enhancing, oedema, necrosis = segmentation.regions_of(np.arange(4))
    assert list(REGIONS)[:3] == ["whole tumour", "tumour core", "enhancing tumour"]
    np.testing.assert_array_equal(np.flatnonzero(whole), [1, 2, 3])
    np.testing.assert_array_equal(np.flatnonzero(core), [1, 3])
    np.testing.assert_array_equal(np.flatnonzero(enhancing), [3])
    np.testing.assert_array_equal(np.flatnonzero(oedema), [2])
    np.testing.assert_array_equal(np.flatnonzero(necrosis), [1])
    assert segmentation.CLASS_NAMES[1:] == ["necrotic core", "oedema", "enhancing tumour"]


# -------------------------------------------------------------------------------------- statistics


def test_wilcoxon_by_hand():
    """Ranks 1 to 5, of which 5 is negative: 10 of the 32 signs give a sum of 5 or less."""
    found = segmentation.compare(np.array([0.1, 0.2, 0.3, 0.4, -0.5]), np.zeros(5))
    assert found["p"] == pytest.approx(2 * 10 / 32)
    assert (found["patients"], found["median_difference"]) == (5, 0.2)
    assert found["least_p"] == 2 / 32
    assert -0.5 <= found["low"] < 0.2 < found["high"] <= 0.4


def test_wilcoxon_is_scipys():
    rng = np.random.default_rng(0)
    values, reference = rng.random(30), rng.random(30)
    found = segmentation.compare(values, reference)
    assert found["p"] == wilcoxon(values, reference, alternative="two-sided").pvalue
    assert found["median_difference"] == np.median(values - reference)
    assert segmentation.compare(reference, values)["p"] == pytest.approx(found["p"])


def test_few_or_equal_pairs_cannot_be_significant():
    ramp = np.arange(1, 9) / 10
    assert segmentation.compare(ramp[:5], np.zeros(5))["p"] == 2 / 2**5 > 0.05
    assert segmentation.compare(ramp[:6], np.zeros(6))["p"] == 2 / 2**6 < 0.05
    equal = segmentation.compare(ramp, ramp)
    assert (equal["p"], equal["least_p"], equal["median_difference"]) == (1, 1, 0)
    assert (equal["low"], equal["high"]) == (0, 0)
    one = segmentation.compare(ramp, np.append(ramp[:7], 0))
    assert one["p"] == one["least_p"] == 1  # of one sign nothing can be told


def test_holm_by_hand():
    assert segmentation.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert segmentation.holm([0.5, 0.9]) == [1, 1]
    assert segmentation.holm([]) == []


# -------------------------------------------------------------------------------------------- arms


PATIENTS = [f"P{i}" for i in range(10) for _ in range(5 + i % 2)]  # 55 slices


def test_arms_take_whole_sets():
    picks = {
        arm: segmentation.training_slices(arm, PATIENTS, 7, seed=0)
        for arm in ("real", "synthetic", "real+synthetic")
    }
    assert all(replaced == [] for _, replaced in picks.values())
    np.testing.assert_array_equal(picks["real"][0], np.arange(55))
    np.testing.assert_array_equal(picks["synthetic"][0], np.arange(55, 62))
    np.testing.assert_array_equal(picks["real+synthetic"][0], np.arange(62))


def test_whole_patients_are_replaced_and_the_others_keep_their_places():
    picks, replaced = segmentation.training_slices("real-20%replaced", PATIENTS, 20, seed=0)
    gone = picks >= 55
    assert len(picks) == 55 and len(replaced) == 2
    assert {PATIENTS[i] for i in np.flatnonzero(gone)} == set(replaced)
    assert not {PATIENTS[i] for i in np.flatnonzero(~gone)} & set(replaced)
    np.testing.assert_array_equal(picks[~gone], np.flatnonzero(~gone))
    assert len(set(picks[gone])) == gone.sum() and picks.max() < 75  # each synthetic slice once
    again, _ = segmentation.training_slices("real-20%replaced", PATIENTS, 20, seed=0)
    np.testing.assert_array_equal(picks, again)
    others = {
        tuple(segmentation.training_slices("real-20%replaced", PATIENTS, 20, seed)[1])
        for seed in range(5)
    }
    assert len(others) > 1


@pytest.mark.parametrize(("percent", "patients"), [(1, 1), (50, 5), (99, 9)])
def test_the_share_is_met_as_nearly_as_patients_allow(percent, patients):
    arm = f"real-{percent}%replaced"
    picks, replaced = segmentation.training_slices(arm, PATIENTS, 55, seed=0)
    assert len(replaced) == patients
    share = (picks >= 55).mean()
    assert abs(share - percent / 100) <= 6 / 55 / 2 or patients in (1, 9)


def test_arms_that_cannot_be_made():
    with pytest.raises(ValueError, match=r"\d+ real slices are to be replaced, but there are 3"):
        segmentation.training_slices("real-20%replaced", PATIENTS, 3, seed=0)
    with pytest.raises(ValueError, match="one training patient only, P0"):
        segmentation.training_slices("real-20%replaced", ["P0"] * 4, 3, seed=0)
    with pytest.raises(ValueError, match="there is no arm 'reel'; choose from real, synthetic"):
        segmentation.parse_arms("real,reel")
    with pytest.raises(ValueError, match="there is no arm 'real-0%replaced'"):
        segmentation.parse_arms("real-0%replaced")
    with pytest.raises(ValueError, match="real is named more than once"):
        segmentation.parse_arms("real, real")
    assert segmentation.parse_arms("real, real-5%replaced") == ["real", "real-5%replaced"]


# ---------------------------------------------------------------------------------------- training


def discs(count, seed, size=32):
    """Slices FLAIR, T1CE and masks, uint8 [count, size, size]: a brain with three nested labels,
    the middle one bright in FLAIR, the inner two telling themselves apart in T1CE."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    flair, t1ce = (rng.integers(50, 70, (count, size, size)) for _ in range(2))
    masks = np.zeros((count, size, size), np.uint8)
    for i in range(count):
        distance = np.hypot(rows - rng.uniform(-5, 5), columns - rng.uniform(-5, 5))
        for radius, code, levels in ((9, 102, (200, 60)), (6, 204, (120, 220)), (3, 51, (90, 10))):
            inside = distance < radius * size / 32
            masks[i][inside] = code
            flair[i][inside], t1ce[i][inside] = levels
        outside = np.hypot(rows, columns) > 0.47 * size
        flair[i][outside] = t1ce[i][outside] = masks[i][outside] = 0
    return flair.astype(np.uint8), t1ce.astype(np.uint8), masks


def disc_slices(count, seed):
    flair, t1ce, masks = discs(count, seed)
    names = [f"{seed}_{i}" for i in range(count)]
    classes = np.searchsorted(brats.MASK_CODES, masks)
    return Slices(np.stack([flair, t1ce], axis=1), classes.astype(np.uint8), names, list(names))


def trained(slices, seed=0, steps=40, **kwargs):
    network = segmentation.build_network(2, seed)
    options = {"steps": steps, "batch_size": 4, "lr": 1e-2, "device": CPU, **kwargs}
    loss = segmentation.train(network, slices, np.arange(len(slices)), seed=seed, **options)
    return network, loss


def test_training_learns_in_exactly_its_steps():
    test = disc_slices(8, 1)

    def mean_dice(network):
        predicted = segmentation.predict(network, test.images, batch_size=3, device=CPU)
        found = segmentation.dice_per_patient(predicted, test.classes, test.patients)
        return {name: np.mean([own[name] for own in found.values()]) for name in REGIONS}

    untrained = mean_dice(segmentation.build_network(2, 0))
    count = []
    network, loss = trained(disc_slices(24, 0), on_step=lambda: count.append(1))
    learned = mean_dice(network)
    assert len(count) == 40
    assert untrained["whole tumour"] < 0.5
    assert min(learned.values()) > 0.9, learned
    assert 0 < loss < 0.5


def test_a_training_follows_its_seed_alone():
    slices = disc_slices(8, 0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, loss = trained(slices, steps=3)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is left alone"
    torch.manual_seed(6)
    second, again = trained(slices, steps=3)
    assert loss == again
    for a, b in zip(first.state_dict().values(), second.state_dict().values()):
        assert torch.equal(a, b)
    assert trained(slices, seed=1, steps=3)[1] != loss


def test_augmentation_moves_image_and_mask_together():
    rng = np.random.default_rng(0)
    levels = torch.from_numpy(rng.random((40, 2, 6, 4), np.float32)) + 0.5  # above black
    images = levels - 1
    images[:, :, 0, 0] = -1
    classes = torch.from_numpy(rng.integers(0, 4, (40, 1, 6, 4)))
    changed, mask = segmentation.augmented(images, classes, torch.Generator().manual_seed(0))
    mirrored = 0
    for before, after, was, now in zip(images, changed, classes, mask):
        flipped = not torch.equal(was, now)
        mirrored += flipped
        assert torch.equal(was.flip(1) if flipped else was, now)  # rows: left and right
        before = before.flip(1) if flipped else before
        for a, b in zip(before, after):
            assert ((a == -1) == (b == -1)).all(), "black stays black"
            factor = ((b + 1) / (a + 1))[a > -1]
            assert 0.75 <= factor[0] <= 1.25
            torch.testing.assert_close(factor, factor[0].expand_as(factor))
    assert 8 < mirrored < 32


# -------------------------------------------------------------------------------------- the script


def write_slices(folder, patients, seed, *, test=(), channels=("FLAIR", "T1CE", "Seg"), size=32):
    """A slice folder with ``dataset.json``: four slices of each patient, two scans of the first."""
    cases = []
    for k, patient in enumerate(patients):
        planes = dict(zip(("FLAIR", "T1CE", "Seg"), discs(4, (seed, k), size)))
        subject = f"Subject_{k + 1:03d}"
        split = "test" if patient in test else "train"
        cases.append(
            {"subject": subject, "patient": patient, "split": split, "slices": [1, 2, 3, 4]}
        )
        for channel in channels:
            (folder / channel).mkdir(parents=True, exist_ok=True)
            for z, plane in enumerate(planes[channel], 1):
                name = brats.slice_name(f"{subject}_slice_{z}", channel)
                Image.fromarray(plane).save(folder / channel / name)
    dataset = {"format": brats.DATASET_FORMAT, "version": brats.DATASET_VERSION, "cases": cases}
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Five training patients, the first with two scans, and two test patients."""
    patients = ["A", "A", "B", "C", "D", "E", "X", "Y"]
    return write_slices(tmp_path_factory.mktemp("real") / "slices", patients, 0, test="XY")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A sample folder has no ``dataset.json``."""
    folder = write_slices(tmp_path_factory.mktemp("samples") / "samples", range(6), 1)
    (folder / "dataset.json").unlink()
    return folder


@pytest.fixture
def script(monkeypatch, capfd):
    """Run the script in this process: exit status, output and error output."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["segmentation_eval.py", *map(str, argv)])
        status = 0
        try:
            cli.run(lambda: segmentation_script.evaluate(""))
        except SystemExit as end:
            status = end.code or 0
        return status, *capfd.readouterr()

    return run


SHORT = ("--steps", 3, "--batch_size", 4)


def test_the_whole_evaluation(script, real, samples, tmp_path, monkeypatch):
    steps = Counter()

    class Counted(cli.Progress):
        def advance(self):
            steps[self.desc.partition(" (")[0]] += self.unit == "step"
            super().advance()

    monkeypatch.setattr(cli, "Progress", Counted)
    out, raw = tmp_path / "out", tmp_path / "raw"
    argv = ["--real", real, "--samples", samples, *SHORT, "--seeds", 2, "--nnunet_dir", raw]
    status, output, _ = script(*argv, "--out_dir", out)
    assert status == 0
    assert sorted(os.listdir(out)) == [
        *("dice.png", "examples.png", "runs"),
        *("segmentation.csv", "segmentation.json", "settings.json"),
    ]
    arms = ["real", "synthetic", "real+synthetic", "real-20%replaced"]
    trainings = {f"{arm}, seed {seed}" for arm in arms for seed in (0, 1)}
    assert {name: steps[name] for name in trainings} == dict.fromkeys(trainings, 3)

    results = json.loads((out / "segmentation.json").read_text())
    assert results["settings"]["--channels"] == "FLAIR,T1CE"
    assert results["counts"] == {
        "training_patients": 5,
        "training_slices": 24,
        "synthetic_slices": 24,
        "test_patients": 2,
        "test_slices": 8,
        "test_patients_without": dict.fromkeys(REGIONS, 0),
        "seeds": 2,
    }
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == [
        (arm, seed) for seed in (0, 1) for arm in arms
    ]
    assert {run["arm"]: run["slices"] for run in results["runs"]} == {
        "real": 24, "synthetic": 24, "real+synthetic": 48, "real-20%replaced": 24,
    }  # fmt: skip
    assert all(list(run["dice"]) == ["X", "Y"] for run in results["runs"])
    dice = {
        (run["arm"], run["seed"], patient, name): value
        for run in results["runs"]
        for patient, own in run["dice"].items()
        for name, value in own.items()
    }
    for arm in arms:
        for name in REGIONS:
            own = [[dice[arm, seed, patient, name] for seed in (0, 1)] for patient in "XY"]
            assert results["mean_dice"][arm][name]["value"] == pytest.approx(np.mean(own))
    assert [(row["arm"], row["region"]) for row in results["comparisons"]] == [
        (arm, name) for arm in arms[1:] for name in REGIONS
    ]
    row = results["comparisons"][0]
    means = {
        arm: np.mean([[dice[arm, seed, p, "whole tumour"] for p in "XY"] for seed in (0, 1)], 0)
        for arm in ("real", "synthetic")
    }
    difference = means["synthetic"] - means["real"]
    assert row["median_difference"] == pytest.approx(np.median(difference))
    assert row["p"] == pytest.approx(wilcoxon(difference).pvalue)
    assert row["p_holm"] >= row["p"]
    assert row["seed_differences"] == pytest.approx(
        [
            np.mean([dice["synthetic", seed, p, "whole tumour"] for p in "XY"])
            - np.mean([dice["real", seed, p, "whole tumour"] for p in "XY"])
            for seed in (0, 1)
        ]
    )
    assert "With so few test patients (2) p cannot fall below 0.5: no difference can be" in output
    assert f"{segmentation.EMPTY_RULE}\nTest patients who show none: of no region." in output

    with open(out / "segmentation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(dice) == 4 * 2 * 2 * 5
    for row in rows:
        key = (row["arm"], int(row["seed"]), row["patient"], row["region"])
        assert float(row["dice"]) == dice[key]
    with Image.open(out / "examples.png") as picture:
        assert picture.width > 5 * 256 and picture.height > 2 * 256  # truth and 4 arms, 2 patients
    assert sorted(os.listdir(raw)) == [
        "Dataset501_RealSlices",
        "Dataset502_SyntheticSlices",
        "Dataset503_RealAndSyntheticSlices",
    ]


def test_continued_equals_undisturbed(script, real, samples, tmp_path, monkeypatch):
    argv = ["--real", real, "--samples", samples, *SHORT, "--arms", "real,real-20%replaced"]
    argv += ["--seeds", 2, "--channels", "T1CE"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert script(*argv, "--out_dir", whole)[0] == 0

    original, calls = segmentation.train, []

    def stopped(*args, **kwargs):
        calls.append(kwargs["seed"])
        if len(calls) == 3:
            raise cli.Stopped("SIGTERM")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(segmentation, "train", stopped)
        status, output, _ = script(*argv, "--out_dir", out)
    assert status == 0
    assert "SIGTERM: 2 of 4 trainings are kept in" in output and "continue with: python" in output
    assert sorted(os.listdir(out)) == ["runs", "settings.json"]
    before = (out / "runs" / "real_seed0.json").read_bytes()

    status, output, _ = script(*argv, "--out_dir", out)
    assert status == 0 and "continuing: 2 of 4 trainings are there" in output
    assert (out / "runs" / "real_seed0.json").read_bytes() == before
    for name in ("segmentation.json", "segmentation.csv", "dice.png", "examples.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name

    # Seeds can be added; what would change the numbers is refused by name.
    more = [*argv[:-3], 3, *argv[-2:]]
    assert "continuing: 4 of 6" in script(*more, "--out_dir", out)[1]
    others = (("--steps", 4, 3), ("--lr", 0.1, 0.005), ("--channels", "FLAIR", "T1CE"))
    for flag, value, known in others:
        result = script(*argv, flag, value, "--out_dir", out)
        refused(result, f"were begun with {flag} {known}", str(value), "another --out_dir")
    result = script(*argv, "--num_samples", 20, "--out_dir", out)
    refused(result, "were begun with --samples with the SHA-256")


def test_an_export_alone_needs_neither_monai_nor_out_dir(
    script, real, samples, tmp_path, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    argv = ["--real", real, "--samples", samples, "--seeds", 0, "--nnunet_dir", tmp_path / "raw"]
    status, output, _ = script(*argv, "--channels", "T1CE,Seg", "--out_dir", tmp_path / "out")
    assert status == 0 and output.count("nnU-Net data set: ") == 3
    assert os.listdir(tmp_path) == ["raw"]
    about = json.loads((tmp_path / "raw/Dataset501_RealSlices/dataset.json").read_text())
    assert about["channel_names"] == {"0": "T1CE"} and about["numTraining"] == 24


def test_a_damaged_result_is_named(script, real, tmp_path):
    argv = ["--real", real, "--arms", "real", *SHORT, "--seeds", 1, "--out_dir", tmp_path / "out"]
    assert script(*argv)[0] == 0
    path = tmp_path / "out/runs/real_seed0.json"
    path.write_text(path.read_text()[:100])
    refused(script(*argv), path, "is damaged", "delete it")
    path.unlink()
    assert script(*argv)[0] == 0


def refused(result, *parts):
    """One sentence on standard error and exit status 2."""
    status, _, error = result
    last = error.strip().splitlines()[-1]
    assert status == 2 and last.startswith("error: ") and "Traceback" not in error
    for part in parts:
        assert str(part) in last, last


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--real", "nowhere"], ["--real nowhere", "no such folder"]),
        (["--samples", "nowhere"], ["--samples nowhere", "no such folder"]),
        (["--samples", ""], ["--samples is missing", "the arm synthetic", "--arms real"]),
        (["--arms", "fake"], ["--arms fake", "'fake'"]),
        (["--channels", "T2"], ["no folder T2"]),
        (["--channels", "Seg"], ["--channels Seg", "name an image channel"]),
        (["--channels", "T3"], ["T3"]),
        (["--image_size", 16], ["16x16", "32 or more", "--image_size"]),
        (["--image_size", -1], ["--image_size -1"]),
        (["--steps", 0], ["--steps 0"]),
        (["--batch_size", 0], ["--batch_size 0"]),
        (["--lr", 0], ["--lr 0"]),
        (["--lr", "nan"], ["--lr nan"]),
        (["--seed", -1], ["--seed -1"]),
        (["--seeds", 0], ["--seeds 0", "--nnunet_dir"]),
        (["--num_samples", 25], ["--num_samples 25", "24 slices"]),
        (["--num_samples", 2], ["real-20%replaced", "but there are 2 synthetic"]),
        (["--out_dir", __file__], [__file__, "already holds something else"]),
    ],
)
def test_bad_flags(script, real, samples, tmp_path, argv, parts):
    out = tmp_path / "out"
    argv = ["--real", real, "--samples", samples, "--out_dir", out, *SHORT, *argv]
    refused(script(*argv), *parts)
    assert not out.exists()


def test_bad_folders(script, real, samples, tmp_path):
    out = tmp_path / "out"

    def attempt(own_real, own_samples):
        return script("--real", own_real, "--samples", own_samples, "--out_dir", out, *SHORT)

    refused(attempt(samples, samples), samples, "has no dataset.json")
    untested = write_slices(tmp_path / "untested", ["A", "B"], 0)
    refused(attempt(untested, samples), untested, "no slice of the split 'test'")
    unmasked = write_slices(tmp_path / "unmasked", ["A", "B"], 0, channels=["FLAIR", "T1CE"])
    refused(attempt(real, unmasked), unmasked, "no folder Seg")
    mask_only = write_slices(tmp_path / "mask_only", ["A", "B"], 0, channels=["Seg"])
    refused(attempt(real, mask_only), "no image channel in --real", mask_only, "FLAIR, T1")
    large = write_slices(tmp_path / "large", range(3), 0, size=48)
    refused(attempt(real, large), "32x32", "48x48", "--image_size")
    result = script(
        *("--real", real, "--samples", large, "--out_dir", tmp_path / "resized", *SHORT),
        *("--image_size", 40, "--seeds", 1),
    )
    assert result[0] == 0
    healthy = write_slices(tmp_path / "healthy", range(3), 0)
    for path in (healthy / "Seg").iterdir():
        Image.new("L", (32, 32)).save(path)
    refused(attempt(real, healthy), "none of the 12 slices of --samples shows a tumour")
    assert not out.exists()


def test_real_slices_alone_need_no_samples(script, real, tmp_path):
    out = tmp_path / "out"
    status, _, _ = script(
        *("--real", real, "--out_dir", out, *SHORT, "--arms", "real", "--seeds", 1)
    )
    assert status == 0
    results = json.loads((out / "segmentation.json").read_text())
    assert results["comparisons"] == [] and list(results["mean_dice"]) == ["real"]


def test_patients_without_a_region_are_counted(script, tmp_path):
    folder = write_slices(tmp_path / "real", "AXY", 0, test="XY")
    for path in (folder / "Seg").glob("Subject_003_*"):  # Y keeps oedema alone
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask > 0, 102, 0).astype(np.uint8)).save(path)
    out = tmp_path / "out"
    argv = ["--real", folder, "--arms", "real", "--seeds", 1, *SHORT, "--out_dir", out]
    status, output, _ = script(*argv)
    assert status == 0
    assert "none: tumour core 1, enhancing tumour 1, necrotic core 1." in output
    dice = json.loads((out / "segmentation.json").read_text())["runs"][0]["dice"]["Y"]
    assert dice["enhancing tumour"] in (0, 1)


def test_packages_that_are_missing_are_named(monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "monai" else original(name)
    )
    with pytest.raises(ValueError, match=r"monai is not installed: pip install 'improved-diffusio"):
        segmentation.check_installed()


def test_slices_are_read_as_levels_and_classes(real, samples):
    flags = ["--real", str(real), "--samples", str(samples), "--num_samples", "5"]
    args = segmentation_script.create_argparser("").parse_args(flags)
    data = segmentation_script.read_data(args)
    assert data.pool.images.shape == (29, 2, 32, 32)
    flair, t1ce, masks = discs(4, (0, 2))  # of the third subject
    np.testing.assert_array_equal(data.real.images[8:12], np.stack([flair, t1ce], axis=1))
    codes = np.array(brats.MASK_CODES)[data.real.classes[8:12]]
    np.testing.assert_array_equal(codes, masks)
    assert Counter(data.real.patients) == {"A": 8, "B": 4, "C": 4, "D": 4, "E": 4}
    assert set(data.test.patients) == {"X", "Y"}
    np.testing.assert_array_equal(data.synthetic.images[:4, 0], discs(4, (1, 0))[0])
    assert len(set(data.synthetic.patients)) == 5
    assert np.shares_memory(data.pool.images, data.synthetic.images)


def test_examples_are_the_largest_tumours_of_the_first_patients():
    classes = np.zeros((5, 4, 4), np.uint8)
    classes[1, :2] = 2  # 8 pixels of A
    classes[2, :3] = 2  # 12 pixels of A
    classes[4, 0] = 1
    test = Slices(np.zeros((5, 1, 4, 4), np.uint8), classes, list("abcde"), list("AAABC"))
    assert segmentation_report.choose_examples(test) == [2, 4]
