"""Data sets for nnU-Net, held to the rules of its documentation/dataset_format.md."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.evaluation import nnunet
from improved_diffusion.evaluation.segmentation import CLASS_NAMES, Slices

CHANNELS = ["FLAIR", "T1CE"]
NAMES = ["Dataset501_RealSlices", "Dataset502_SyntheticSlices", "Dataset503_RealAndSyntheticSlices"]


def some_slices(prefix, patients, seed=0, size=32):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (len(patients), len(CHANNELS), size, size), np.uint8)
    classes = rng.integers(0, 4, (len(patients), size, size), np.uint8)
    return Slices(images, classes, [f"{prefix}_{i}" for i in range(len(patients))], list(patients))


REAL = some_slices("Subject_001_slice", "AABBBCDDEFGG")
TEST = some_slices("Subject_002_slice", "XXY", seed=1)
# A synthetic slice may have a real one's name.
SYNTHETIC = some_slices("Subject_001_slice", "0123", seed=2)


def export(folder, synthetic=SYNTHETIC, **kwargs):
    return nnunet.export(str(folder), CHANNELS, REAL, TEST, synthetic, **kwargs)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nnunet") / "raw"
    assert export(folder) == [str(folder / name) for name in NAMES]
    return folder


def read(path):
    return json.loads(path.read_text())


def cases_of(dataset):
    """Case -> its image files and its label file, found as nnU-Net finds them."""
    about = read(dataset / "dataset.json")
    if "dataset" in about:
        return {
            case: ([dataset / path for path in own["images"]], dataset / own["label"])
            for case, own in about["dataset"].items()
        }
    found = {}
    for name in sorted(os.listdir(dataset / "imagesTr")):
        match = re.fullmatch(r"(.+)_(\d{4})\.png", name)
        found.setdefault(match[1], []).append(dataset / "imagesTr" / name)
    return {case: (paths, dataset / "labelsTr" / f"{case}.png") for case, paths in found.items()}


@pytest.mark.parametrize(("name", "count"), list(zip(NAMES, (12, 4, 16))))
def test_a_data_set_keeps_the_rules(raw, name, count):
    assert re.fullmatch(r"Dataset\d{3}_\w+", name)
    about = read(raw / name / "dataset.json")
    assert about["channel_names"] == {"0": "FLAIR", "1": "T1CE"}
    assert about["labels"]["background"] == 0
    assert sorted(about["labels"].values()) == [0, 1, 2, 3], "consecutive whole numbers"
    assert about["labels"] == {label: i for i, label in enumerate(CLASS_NAMES)}
    assert about["file_ending"] == ".png"
    cases = cases_of(raw / name)
    assert about["numTraining"] == len(cases) == count
    for images, label in cases.values():
        assert [path.name[-9:] for path in images] == ["_0000.png", "_0001.png"]
        with Image.open(label) as picture:
            assert (picture.mode, picture.size) == ("L", (32, 32))
            assert set(np.unique(picture)) <= set(about["labels"].values())
        for path in images:
            with Image.open(path) as picture:
                assert (picture.mode, picture.size) == ("L", (32, 32))
    if name != NAMES[2]:
        assert {path.name for path in (raw / name / "labelsTr").iterdir()} == {
            label.name for _, label in cases.values()
        }


def test_pixels_are_the_slices(raw):
    for dataset, prefix, ending, slices in (
        (NAMES[0], "", "Tr", REAL),
        (NAMES[0], "", "Ts", TEST),
        (NAMES[1], "synthetic_", "Tr", SYNTHETIC),
    ):
        images, labels = (raw / dataset / f"{kind}{ending}" for kind in ("images", "labels"))
        assert len(os.listdir(images)) == 2 * len(slices)
        for i, name in enumerate(slices.names):
            for channel in (0, 1):
                plane = np.asarray(Image.open(images / f"{prefix}{name}_{channel:04d}.png"))
                np.testing.assert_array_equal(plane, slices.images[i, channel])
            label = np.asarray(Image.open(labels / f"{prefix}{name}.png"))
            np.testing.assert_array_equal(label, slices.classes[i])


def test_no_patient_straddles_folds(raw):
    patient_of = dict(zip(REAL.names, REAL.patients))
    folds = read(raw / NAMES[0] / "splits_final.json")
    assert len(folds) == 5
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == sorted(REAL.names)
        assert fold["train"] and fold["val"]
        train, val = ({patient_of[name] for name in fold[part]} for part in ("train", "val"))
        assert not train & val
    assert sorted(name for fold in folds for name in fold["val"]) == sorted(REAL.names)
    assert not (raw / NAMES[1] / "splits_final.json").exists()


def test_mixed_data_are_validated_on_real_slices_alone(raw):
    synthetic = set(cases_of(raw / NAMES[1]))
    assert set(cases_of(raw / NAMES[2])) == set(REAL.names) | synthetic
    folds = zip(*(read(raw / name / "splits_final.json") for name in (NAMES[0], NAMES[2])))
    for real, mixed in folds:
        assert mixed["val"] == real["val"]
        assert sorted(mixed["train"]) == sorted({*real["train"], *synthetic})


def test_folds_of_few_patients():
    folds = nnunet.patient_folds(list("abcd"), list("PPQQ"), seed=0)
    assert sorted(sorted(fold["val"]) for fold in folds) == [["a", "b"], ["c", "d"]]
    with pytest.raises(ValueError, match="one training patient only, P, and folds need two"):
        nnunet.patient_folds(list("ab"), list("PP"), seed=0)


def contents(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_complete_export_is_kept_and_another_refused(raw):
    before = contents(raw)
    export(raw)
    assert contents(raw) == before
    other = some_slices("sample", "0123", seed=3)
    with pytest.raises(ValueError, match="Dataset502_SyntheticSlices already holds other slices"):
        export(raw, other)
    assert contents(raw) == before


def test_numbers(tmp_path):
    (tmp_path / "Dataset701_Liver").mkdir()
    with pytest.raises(ValueError, match=r"already holds Dataset701_Liver, .* --nnunet_id"):
        export(tmp_path, first_id=700)
    with pytest.raises(ValueError, match="--nnunet_id 998: give a number from 1 to 997"):
        export(tmp_path, first_id=998)
    assert os.listdir(tmp_path) == ["Dataset701_Liver"]
    (real,) = export(tmp_path, None, first_id=42)
    assert real.endswith("Dataset042_RealSlices")


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    original, written = Image.Image.save, []

    def save(image, path):
        written.append(path)
        if len(written) == 50:  # in the second data set
            raise OSError("the disk is full")
        original(image, path)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        with pytest.raises(OSError, match="the disk is full"):
            export(tmp_path)
    assert os.listdir(tmp_path) == NAMES[:1]
    export(tmp_path)
    assert sorted(os.listdir(tmp_path)) == NAMES
