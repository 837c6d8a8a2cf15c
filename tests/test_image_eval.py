"""The evaluation of samples as a whole: sets with a known answer move the right numbers."""

import base64
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from phantom_slices import phantom_slices
from PIL import Image

from improved_diffusion import brats
from improved_diffusion.evaluation import report
from improved_diffusion.figures import read_sample_set

ROOT = Path(__file__).resolve().parents[1]
CHANNELS = ["FLAIR", "Seg", "T1CE"]
PLACES = [brats.CHANNELS.index(name) for name in CHANNELS]
TRAIN, TEST = (0, 1, 2, 3), (4, 5)


def slices_of(patients):
    return np.concatenate([phantom_slices(patient)[..., PLACES] for patient in patients])


def write_slices(folder, splits):
    """``splits``: split -> patients."""
    cases = []
    for split, patients in splits.items():
        for patient in patients:
            images = phantom_slices(patient)[..., PLACES]
            subject = f"Subject_{patient:03d}"
            numbers = list(range(1, len(images) + 1))
            cases.append({"subject": subject, "case": subject, "split": split, "slices": numbers})
            for number, image in zip(numbers, images):
                for channel, plane in zip(CHANNELS, image.transpose(2, 0, 1)):
                    (folder / channel).mkdir(parents=True, exist_ok=True)
                    name = brats.slice_name(f"{subject}_slice_{number}", channel)
                    Image.fromarray(plane).save(folder / channel / name)
    content = {"format": "brats-slices", "version": 1, "cases": cases}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def write_samples(folder, samples, channels=CHANNELS):
    folder.mkdir()
    shape = "x".join(map(str, samples.shape))
    np.savez(folder / f"samples_{shape}.npz", arr_0=samples)
    (folder / "samples.json").write_text(json.dumps({"channels": channels, "step": 7}))
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return write_slices(tmp_path_factory.mktemp("real") / "slices", {"train": TRAIN, "test": TEST})


@pytest.fixture
def run(monkeypatch, capfd, tmp_path, real):
    """Run the script: its record, or its status and error output."""

    def call(*argv, out="out", real=real):
        words = ["image_eval.py", "--real", str(real), "--out_dir", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", [*words, "--pairs", "50", *map(str, argv)])
        try:
            runpy.run_path(str(ROOT / "scripts/image_eval.py"), run_name="__main__")
        except SystemExit as end:
            return end.code, capfd.readouterr().err
        return json.loads((tmp_path / out / "evaluation.json").read_text())

    return call


def shares(found):
    """Flag -> channel -> share of the samples, where it is not 0."""
    flagged = found["validity"]["samples"]["flagged"]
    return {
        flag: own
        for flag, of_channels in flagged.items()
        if (own := {name: entry["value"] for name, entry in of_channels.items() if entry["value"]})
    }


def distance(found, channel="all", of="samples"):
    return found["distribution"]["channels"][channel][of]["frechet_distance"]["value"]


def copied(found):
    return found["memorisation"]["joint"]["share"]["value"]


def test_real_slices_of_other_patients_pass(run, tmp_path):
    found = run("--samples", write_samples(tmp_path / "samples", slices_of((6, 7))))
    assert shares(found) == {}
    samples = found["validity"]["samples"]
    assert samples["valid_share"]["value"] == 1
    assert 0.8 < samples["valid_share"]["low"] < 1
    assert samples["channel_agreement"]["value"] > 0.95
    assert samples["background_level"] == found["validity"]["real"]["background_level"]
    assert distance(found) < 3 * distance(found, of="floor")
    assert copied(found) < 0.1
    assert (found["real"]["count"], found["real"]["patients"]) == (32, 2)
    assert (found["train"]["count"], found["train"]["patients"]) == (64, 4)
    assert found["distribution"]["counts"] == {"real": 32, "samples": 32, "floor": 32}
    assert found["made"] == {"step": 7}


def test_noise_masks_are_found_and_nothing_else(run, tmp_path):
    samples = slices_of((6, 7))
    rng = np.random.default_rng(0)
    samples[[3, 9, 20], ..., 1] = rng.integers(0, 256, (3, 60, 60))
    found = run("--samples", write_samples(tmp_path / "samples", samples))
    assert shares(found)["noise_only"] == {"Seg": 3 / 32}
    assert set(shares(found)) <= {"noise_only", "off_code"}
    assert {reason["index"] for reason in found["validity"]["flagged"]} == {3, 9, 20}
    assert found["validity"]["samples"]["off_code_share"]["value"] == pytest.approx(0.05, abs=0.02)
    assert distance(found, "Seg") > 5 * distance(found, "Seg", "floor")
    assert distance(found, "FLAIR") < 3 * distance(found, "FLAIR", "floor")
    assert copied(found) < 0.1


def test_shuffled_channels_are_caught_by_their_agreement(run, tmp_path):
    """As in a picture whose columns come from different samples; each channel is fine."""
    samples = slices_of((6, 7))
    samples[..., 2] = samples[::-1, ..., 2]
    found = run("--samples", write_samples(tmp_path / "samples", samples))
    assert found["validity"]["samples"]["channel_agreement"]["high"] < 0.95
    assert set(shares(found)) <= {"channels_disagree", "mask_outside"}
    assert shares(found)["channels_disagree"]["images"] > 0.1
    before = run("--samples", write_samples(tmp_path / "sound", slices_of((6, 7))), out="b")
    for channel in CHANNELS:
        assert distance(found, channel) == pytest.approx(distance(before, channel), rel=1e-6)
    assert copied(found) < 0.1


def test_copies_are_found_flipped_or_brightened(run, tmp_path):
    samples = slices_of((6, 7))
    train = slices_of(TRAIN)
    samples[5] = train[10]
    samples[11] = train[20, :, ::-1]
    samples[17] = (train[30] * [0.9, 1, 0.9]).astype(np.uint8)
    found = run("--samples", write_samples(tmp_path / "samples", samples))
    assert copied(found) == 3 / 32
    worst = found["memorisation"]["worst"][:3]
    pairs = {pair["index"]: (pair["train_slice"], pair["flip"]) for pair in worst}
    assert pairs == {
        5: ("Subject_000_slice_11", "none"),
        11: ("Subject_001_slice_5", "horizontal"),
        17: ("Subject_001_slice_15", "none"),
    }
    assert shares(found) == {}


def test_collapse_and_constant_channels(run, tmp_path):
    samples = slices_of((6, 7))
    one = np.repeat(samples[8:9], 32, axis=0)
    found = run("--samples", write_samples(tmp_path / "collapsed", one), out="a")
    of_all = found["distribution"]["channels"]["all"]
    assert of_all["samples"]["ms_ssim"]["value"] == pytest.approx(1)
    assert of_all["samples"]["coverage"]["value"] < 0.2 < of_all["floor"]["coverage"]["value"]
    assert shares(found) == {}
    samples[:8, ..., 0] = 90
    found = run("--samples", write_samples(tmp_path / "constant", samples), out="b")
    assert shares(found) == {"constant": {"FLAIR": 0.25}}


@pytest.mark.parametrize("count", [1, 2, 10])
def test_few_samples(run, tmp_path, count):
    found = run("--samples", write_samples(tmp_path / "samples", slices_of((6,))[:count]))
    assert found["validity"]["samples"]["samples"] == count
    entry = found["distribution"]["channels"]["all"]["samples"]
    if count == 1:
        assert entry["frechet_distance"] == {
            "value": None,
            "reason": "needs 2 images of each set, found 32 and 1",
        }
    assert (entry["recall"]["value"] is None) == (count <= 5)


def test_the_page_holds_its_pictures(run, tmp_path):
    samples = slices_of((6, 7))
    samples[0, ..., 0] = 0
    run("--samples", write_samples(tmp_path / "samples", samples))
    page = (tmp_path / "out/report.html").read_text()
    found = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">', page)
    names = ("compare", "flagged", "memorisation", "nearest")
    pictures = [(tmp_path / "out" / f"{name}.png").read_bytes() for name in names]
    assert [base64.b64decode(data) for _, data in found] == pictures
    assert "http" not in page.replace("http-equiv", "")
    assert "<td>constant: FLAIR</td><td>3.12 % [0.554 %, 15.7 %]</td>" in page
    assert "<tr><td>0</td><td>FLAIR</td><td>constant</td><td>levels between" in page
    assert not (tmp_path / "out.partial").exists()


def test_the_set_without_the_flagged_samples(run, tmp_path):
    samples = slices_of((6, 7))
    samples[[0, 30], ..., 0] = 0
    argv = ["--samples", write_samples(tmp_path / "samples", samples)]
    found = run(*argv, "--filter_to", tmp_path / "kept")
    assert {reason["index"] for reason in found["validity"]["flagged"]} == {0, 30}
    kept = read_sample_set(str(tmp_path / "kept"))
    np.testing.assert_array_equal(kept.samples, np.delete(samples, [0, 30], axis=0))
    assert kept.record["kept"] == [i for i in range(32) if i not in (0, 30)]
    assert len(list((tmp_path / "kept/T1CE").iterdir())) == 30
    broken = np.zeros_like(samples)
    argv = ["--samples", write_samples(tmp_path / "broken", broken), "--filter_to", tmp_path / "no"]
    status, error = run(*argv, out="b")
    assert status == 2 and "every sample has a flag, none is left" in error
    assert not (tmp_path / "b").exists() and not (tmp_path / "no").exists()


def test_a_slice_folder_as_samples_and_folders_without_a_split(run, tmp_path, real):
    """Then there is no floor, and nothing to have been copied."""
    plain = write_slices(tmp_path / "plain", {"train": (6,)})
    (plain / "dataset.json").unlink()
    found = run("--samples", plain, "--channels", "T1CE,FLAIR", real=plain)
    assert found["channels"] == ["FLAIR", "T1CE"]
    assert distance(found) == pytest.approx(0, abs=1e-6)
    assert found["train"] is None and "memorisation" not in found
    assert "floor" not in found["distribution"]["channels"]["all"]
    assert "name the training slices with --train" in (tmp_path / "out/report.html").read_text()
    found = run("--samples", plain, "--train", real, out="b", real=plain)
    assert found["train"]["count"] == 64
    assert copied(found) < 0.2


def test_intervals_of_patients(run, tmp_path):
    """Of slices of real patients, on either side; the numbers themselves stay."""
    real = write_slices(tmp_path / "real", {"train": (0, 1), "test": (2, 3, 4, 5, 6, 7)})
    some = (0, 2, 4, 6, 7)
    slices = write_slices(tmp_path / "slices", {"train": some})
    samples = write_samples(tmp_path / "samples", slices_of(some))
    named = run("--samples", slices, "--channels", "FLAIR,Seg", out="a", real=real)
    alone = run("--samples", samples, "--channels", "FLAIR,Seg", out="b", real=real)
    assert named["samples"]["patients"] == 5 and "patients" not in alone["samples"]
    assert named["distribution"]["patients"] == {"real": 6, "samples": 5, "floor": 2}
    assert alone["distribution"]["patients"] == {"real": 6, "floor": 2}
    pairs = [
        (own["validity"][of][name], other["validity"][of][name])
        for own, other, of in ((named, alone, "samples"), (alone, alone, "real"))
        for name in ("valid_share", "tumour_area", "empty_mask_share")
    ]
    pairs += [
        (of["distribution"]["channels"]["all"]["samples"][name] for of in (named, alone))
        for name in ("kernel_distance", "precision", "density", "ms_ssim")
    ]
    pairs.append(of["memorisation"]["joint"]["share"] for of in (named, alone))
    for own, other in pairs:
        assert own["value"] == other["value"]
        assert own["low"] <= other["low"] and own["high"] >= other["high"]
    wide, narrow = (of["validity"]["samples"]["tumour_area"] for of in (named, alone))
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"])
    # 96 real slices without a flag, of 6 patients: as 6 of 6.
    assert alone["validity"]["real"]["valid_share"]["low"] == pytest.approx(0.61, abs=0.01)
    page = (tmp_path / "a/report.html").read_text()
    assert "over their 6 patients" in page and "6 in real and 5 in samples and 2 in floor" in page
    assert "fewer than 5" not in page


def test_samples_from_disk_measure_the_same(run, tmp_path):
    """Loaded from a compressed file; and mapped, with the channels in another order."""
    samples = slices_of((6, 7))
    turned = write_samples(tmp_path / "turned", samples[..., [2, 0, 1]], ["T1CE", "FLAIR", "Seg"])
    packed = write_samples(tmp_path / "packed", samples)
    np.savez_compressed(next(packed.glob("*.npz")), arr_0=samples)
    one, other = (
        run("--samples", folder, "--channels", ",".join(CHANNELS), out=folder.name + "_out")
        for folder in (packed, turned)
    )
    for part in ("validity", "distribution", "memorisation"):
        assert one[part] == other[part]


def test_few_patients_are_told(run, tmp_path):
    run("--samples", write_samples(tmp_path / "samples", slices_of((6, 7))))
    assert "The real slices are of 2 patients only: fewer than 5" in (
        (tmp_path / "out/report.html").read_text()
    )


def test_bad_input(run, tmp_path, real):
    samples = slices_of((6,))
    good = write_samples(tmp_path / "good", samples)

    def refused(*argv, out="out"):
        status, error = run(*argv, out=out)
        assert status == 2 and "Traceback" not in error
        assert not (tmp_path / out).exists()
        return error.splitlines()[-1]

    assert "--samples is missing" in refused()
    assert "nowhere" in refused("--samples", "nowhere")
    assert "has no folder T2" in refused(
        "--samples", write_samples(tmp_path / "t2", samples, ["T2", "Seg", "T1CE"])
    )
    assert "has no channel T1: its channels are" in refused("--samples", good, "--channels", "T1")
    error = refused("--samples", write_samples(tmp_path / "t9", samples, ["T9", "Seg", "T1CE"]))
    assert "t9: its samples.json names a channel 'T9'" in error
    large = samples.repeat(2, axis=1).repeat(2, axis=2)
    error = refused("--samples", write_samples(tmp_path / "large", large))
    assert "have 60x60 pixels, the samples 120x120" in error
    codes = samples.copy()
    codes[..., 1] = codes[..., 1] // 51 * 60
    error = refused("--samples", write_samples(tmp_path / "codes", codes))
    assert "label codes are 0, 51, 102, 204" in error
    assert "names no channels" in refused("--samples", write_samples(tmp_path / "rgb", samples, []))
    assert "--num_samples 99" in refused("--samples", good, "--num_samples", 99)
    assert "--extractor" in refused("--samples", good, "--extractor", "vgg")
    error = refused("--samples", good, "--extractor", "inception")
    assert "--extractor_weights" in error
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    status, error = run("--samples", good, out="full")
    assert status == 2 and "already holds something" in error
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_numbers_in_words():
    entry = {"value": 0.12345, "low": 0.1, "high": 0.15}
    assert report.number(entry) == "0.1235 [0.1, 0.15]"
    assert report.number(entry, percent=True) == "12.3 % [10 %, 15 %]"
    assert report.number({"value": None, "reason": "x"}) == report.number(None) == "–"
    assert not report.differs(entry, {"value": 0.2, "low": 0.15, "high": 0.3})
    assert report.differs(entry, {"value": 0.2, "low": 0.151, "high": 0.3})
    assert not report.differs(entry, {"value": 5.0})
