"""Cases, volumes, slices and the prepared folder."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import brats_cases as made
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from improved_diffusion import brats, brats_prepare, cli
from improved_diffusion.brats_prepare import choose_test_patients, prepare

REPOSITORY = Path(__file__).resolve().parents[1]
REAL_CASES = REPOSITORY.parent / "shared" / "real_cases"
IMAGES = ["FLAIR", "T1", "T1CE", "T2"]


def quiet(line):
    pass


def pixels(path):
    with Image.open(path) as image:
        assert image.mode == "L" and image.size == (256, 256)
        return np.asarray(image)


# ------------------------------------------------------------------------------- names and codes


def test_parse_channels_gives_the_fixed_order():
    assert brats.parse_channels("T1CE,Seg") == ["Seg", "T1CE"]
    assert brats.parse_channels("T2, T1CE ,T1,Seg,FLAIR") == list(brats.CHANNELS)


@pytest.mark.parametrize("text", ["T1CE,Foo", "T1CE,T1CE", "", "T1CE,", "t1ce"])
def test_parse_channels_refuses(text):
    with pytest.raises(ValueError, match="--channels"):
        brats.parse_channels(text)


def test_unknown_channel_names_it_and_the_known_ones():
    with pytest.raises(ValueError, match=r"'Foo'.*FLAIR, Seg, T1, T1CE, T2"):
        brats.parse_channels("T1CE,Foo")


@pytest.mark.parametrize(
    ("name", "channel", "stem"),
    [
        ("Subject_001_slice_70_T1ce.png", "T1CE", "Subject_001_slice_70"),
        ("Subject_001_slice_70_t1CE.png", "T1CE", "Subject_001_slice_70"),
        ("Subject_001_slice_70.png", "T1CE", "Subject_001_slice_70"),
        ("Subject_001_slice_70_T1.png", "T1", "Subject_001_slice_70"),
        ("a_T1.png", "T1CE", "a_T1"),
        ("a_seg.PNG", "Seg", "a"),
    ],
)
def test_split_slice_name(name, channel, stem):
    assert brats.split_slice_name(name, channel) == stem


@pytest.mark.parametrize("channel", brats.CHANNELS)
def test_slice_name_round_trip(channel):
    assert brats.split_slice_name(brats.slice_name("Subject_007_slice_9", channel), channel) == (
        "Subject_007_slice_9"
    )


def test_snap_mask():
    levels = np.array([0, 25, 26, 51, 76, 77, 102, 152, 153, 154, 204, 255], dtype=np.uint8)
    expected = [0, 0, 51, 51, 51, 102, 102, 102, 102, 204, 204, 204]
    assert brats.snap_mask(levels).tolist() == expected
    assert brats.snap_mask(levels).dtype == np.uint8
    assert set(brats.PALETTE) == set(brats.LABEL_NAMES) == set(brats.MASK_CODES)


# ------------------------------------------------------------------------------------- find cases


@pytest.mark.parametrize(
    ("name", "style", "ext"),
    [
        ("BraTS20_Training_001", 2020, "nii.gz"),
        ("BraTS20_Training_001", 2020, "nii"),
        ("BraTS2021_00000", 2020, "nii.gz"),
        ("BraTS-GLI-00000-000", 2023, "nii.gz"),
        ("any prefix at all", 2020, "nii"),
    ],
)
def test_find_cases_namings(tmp_path, name, style, ext):
    made.write_case(tmp_path / "deep" / "below", name, style=style, ext=ext)
    (case,) = brats.find_cases(str(tmp_path), brats.CHANNELS)
    assert case.name == name
    assert sorted(case.files) == sorted(brats.CHANNELS)
    assert {channel for channel, _, _ in brats.read_case(case, brats.CHANNELS)} == set(
        brats.CHANNELS
    )


def test_find_cases_patient_355(tmp_path):
    folder = made.write_case(tmp_path, "BraTS20_Training_355", channels=IMAGES, ext="nii")
    made.save(os.path.join(folder, "W39_1998.09.19_Segm.nii"), made.volume("Seg"))
    (case,) = brats.find_cases(str(tmp_path), brats.CHANNELS)
    assert case.name == "BraTS20_Training_355"
    assert os.path.basename(case.files["Seg"]) == "W39_1998.09.19_Segm.nii"


def test_find_cases_order_hidden_partial_and_unneeded(tmp_path):
    for number in (10, 9, 1):
        made.write_case(tmp_path, f"P_{number}", channels=["T1CE"])
    made.write_case(tmp_path, "P_2.partial", channels=["T1CE"])
    (tmp_path / "P_1" / "._P_1_t1ce.nii.gz").write_bytes(b"junk")
    (tmp_path / "survival.csv").write_text("x")
    cases = brats.find_cases(str(tmp_path), ["T1CE"])
    assert [case.name for case in cases] == ["P_1", "P_9", "P_10"]


def test_find_cases_follows_links_once(tmp_path):
    made.write_case(tmp_path / "store", "P_1", channels=["T1"])
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "linked").symlink_to(tmp_path / "store" / "P_1")
    (tmp_path / "cases" / "loop").symlink_to(tmp_path / "cases")
    assert [case.name for case in brats.find_cases(str(tmp_path / "cases"), ["T1"])] == ["P_1"]


def test_coverage_modality_is_the_first_that_exists(tmp_path):
    for name, channels in {
        "a": ["T2", "FLAIR", "T1CE", "T1"],
        "b": ["T2", "T1CE", "FLAIR"],
    }.items():
        made.write_case(tmp_path, name, channels=channels)
    cases = brats.find_cases(str(tmp_path), ["FLAIR"])
    assert [case.coverage_modality for case in cases] == ["T1", "T1CE"]


def two_files(root):
    folder = made.write_case(root, "P_1", channels=["T1", "Seg"])
    made.save(os.path.join(folder, "P_1_t1.nii"), made.volume("T1"))
    return ["T1"], rf"{folder} holds two T1 files"


def two_cases(root):
    folder = made.write_case(root, "P_1", channels=["T1"])
    made.save(os.path.join(folder, "P_2_seg.nii"), made.volume("Seg"))
    return ["T1"], f"{folder} holds files of more than one case"


def missing_modality(root):
    folder = made.write_case(root, "P_1", channels=["FLAIR", "T1", "T2", "Seg"])
    return list(brats.CHANNELS), f"the case in {folder} has no T1CE file"


def same_name(root):
    made.write_case(os.path.join(root, "a"), "P_1", channels=["T1"])
    made.write_case(os.path.join(root, "b"), "P_1", channels=["T1"])
    return ["T1"], "case P_1 is in two folders"


def only_a_mask(root):
    made.write_case(root, "P_1", channels=["Seg"])
    return ["Seg"], "only a segmentation"


def nothing(root):
    made.save(os.path.join(root, "imagesTr", "BRATS_001.nii.gz"), made.volume("T1"))
    return ["T1"], "no BraTS case found"


@pytest.mark.parametrize(
    "spoil", [two_files, two_cases, missing_modality, same_name, only_a_mask, nothing]
)
def test_find_cases_refuses(tmp_path, spoil):
    channels, message = spoil(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        brats.find_cases(str(tmp_path), channels)


# ----------------------------------------------------------------------------------- read volumes


def case_of(folder):
    (case,) = brats.find_cases(folder, ["T1", "Seg"])
    return case


def spoil_shape(folder, path):
    made.save(path("seg"), made.volume("Seg", shape=(104, 104, 5)))
    return r"_seg.nii.gz has 104x104x5 voxels but .*_t1.nii.gz has 104x104x4"


def spoil_affine(folder, path):
    shifted = made.AFFINE.copy()
    shifted[0, 3] = 20
    made.save(path("seg"), made.volume("Seg"), shifted)
    return r"_seg.nii.gz lies up to 20.0 mm away"


def spoil_label(folder, path):
    labels = made.volume("Seg")
    labels[0, 0, 0] = 7
    made.save(path("seg"), labels)
    return r"_seg.nii.gz holds 7 as a label"


def spoil_fraction(folder, path):
    labels = made.volume("Seg").astype(np.float32)
    labels[0, 0, 0] = 1.5
    made.save(path("seg"), labels)
    return r"_seg.nii.gz holds 1.5 as a label"


def spoil_both(folder, path):
    labels = made.volume("Seg")
    labels[0, 0, 0] = 3
    made.save(path("seg"), labels)
    return "both label 3 and label 4"


def spoil_nan(folder, path):
    levels = made.volume("T1").astype(np.float32)
    levels[1, 1, 1:3] = np.nan, np.inf
    made.save(path("t1"), levels)
    return r"_t1.nii.gz holds 2 voxels that are NaN or infinite"


def spoil_zero(folder, path):
    made.save(path("t1"), np.zeros(made.SHAPE, dtype=np.int16))
    return r"_t1.nii.gz has no voxel above 0"


def spoil_truncated(folder, path):
    whole = Path(path("t1")).read_bytes()
    Path(path("t1")).write_bytes(whole[: len(whole) // 2])
    return r"_t1.nii.gz cannot be read as NIfTI .*truncated"


def spoil_header(folder, path):
    Path(path("t1")).write_bytes(Path(path("t1")).read_bytes()[:40])
    return r"_t1.nii.gz cannot be read as NIfTI"


def spoil_empty(folder, path):
    Path(path("t1")).write_bytes(b"")
    return r"_t1.nii.gz cannot be read as NIfTI"


def spoil_checksum(folder, path):
    whole = bytearray(Path(path("t1")).read_bytes())
    whole[-6] ^= 1
    Path(path("t1")).write_bytes(whole)
    return r"_t1.nii.gz cannot be read as NIfTI .*CRC"


def spoil_plain(folder, path):
    whole = gzip.decompress(Path(path("t1")).read_bytes())
    Path(path("t1")).write_bytes(whole[:-100])
    return r"_t1.nii.gz cannot be read as NIfTI"


def spoil_4d(folder, path):
    made.save(path("t1"), np.ones((20, 20, 4, 4), dtype=np.int16))
    return r"_t1.nii.gz is 4-D \(20x20x4x4\)"


def spoil_size(folder, path):
    made.save(path("t1"), np.ones((257, 20, 4), dtype=np.int16))
    return r"_t1.nii.gz has slices of 257x20 pixels: at most 256x256"


SPOILERS = [value for name, value in sorted(globals().items()) if name.startswith("spoil_")]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_bad_volume_is_one_sentence_and_leaves_nothing(tmp_path, spoil):
    folder = made.write_case(tmp_path / "cases", "P_2", channels=["T1", "Seg"])
    made.write_case(tmp_path / "cases", "P_1", channels=["T1", "Seg"])
    message = spoil(folder, lambda suffix: os.path.join(folder, f"P_2_{suffix}.nii.gz"))
    with pytest.raises(ValueError, match=message) as caught:
        list(brats.read_case(case_of(folder), ["T1", "Seg"]))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        prepare(str(tmp_path / "cases"), str(tmp_path / "out"), channels=["T1", "Seg"], workers=1)
    assert sorted(os.listdir(tmp_path)) == ["cases"]


def test_volume_without_a_position_agrees_with_any(tmp_path):
    folder = made.write_case(tmp_path, "P_1", channels=["T1"])
    image = nib.Nifti1Image(made.volume("Seg"), None)
    assert image.header["sform_code"] == image.header["qform_code"] == 0
    nib.save(image, os.path.join(folder, "P_1_seg.nii.gz"))
    volumes = list(brats.read_case(case_of(folder), ["T1", "Seg"]))
    assert [channel for channel, _, _ in volumes] == ["T1", "Seg"]
    assert np.array_equal(volumes[1][2], made.AFFINE)


# --------------------------------------------------------------------------------- scale and slice


def test_report_recipe_by_hand():
    volume = np.array([[[-7], [0], [1]], [[2], [5], [1000]]], dtype=np.int16)
    scale = brats.intensity_scale(volume, "report")
    assert scale == {"max": 1000.0}
    scaled = brats.apply_scale(volume[:, :, 0], scale)
    assert np.allclose(scaled, [[0, 0, 0.255], [0.51, 1.275, 255]], rtol=1e-15)
    image = brats.image_slice(volume, 1, scale)
    assert image.dtype == np.uint8 and image.shape == (256, 256)
    # 2 rows: 127 before, 127 after; 3 columns: 126 before, 127 after.
    assert image[127:129, 126:129].tolist() == [[0, 0, 0], [1, 1, 255]]
    assert image.sum() == 257


def test_percentile_recipe_by_hand():
    # 1..201 above 0: percentile q lies at 1 + 2 * q, so 0.5 -> 2 and 99.5 -> 200.
    volume = np.arange(-10, 202, dtype=np.int16).reshape(4, 53, 1)
    scale = brats.intensity_scale(volume, "percentile")
    assert scale == {"low": 2.0, "high": 200.0}
    scaled = brats.apply_scale(np.array([-3, 0, 1, 2, 101, 200, 201]), scale)
    assert scaled.tolist() == [0, 0, 0, 0, 127.5, 255, 255]


def test_percentile_recipe_refuses_a_flat_volume():
    with pytest.raises(ValueError, match=r"f.nii: the 0.5 and 99.5 percentiles .* are both 7"):
        brats.intensity_scale(np.full((4, 4, 4), 7), "percentile", "f.nii")


@pytest.mark.parametrize(("bright", "kept"), [(9830, []), (9831, [1])])
def test_coverage_just_below_and_above(bright, kept):
    # 0.15 * 65536 = 9830.4; the level 50 itself (and its unrounded neighbours) does not count.
    volume = np.full((200, 200, 1), 50.0)
    volume.ravel()[:bright] = 50.001
    assert brats.covered_slices(volume, {"max": 255.0}) == kept


@pytest.mark.parametrize(
    ("size", "expected"), [(240, [8, 8]), (255, [0, 1]), (256, [0, 0]), (155, [50, 51])]
)
def test_padding(size, expected):
    assert brats.padding((size, 240, 155)) == [expected, [8, 8]]


def test_mask_slice_codes():
    labels = np.array([[[0], [1], [2]], [[3], [4], [0]]], dtype=np.uint8)
    assert brats.mask_slice(labels, 1)[127:129, 126:129].tolist() == [[0, 51, 102], [204, 204, 0]]


# ---------------------------------------------------------------------------------------- prepare


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("cases")
    for number in range(1, 5):
        made.write_case(root, f"BraTS20_Training_{number:03d}", seed=number)
    return str(root)


@pytest.fixture(scope="module")
def prepared(cases, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "slices"
    prepare(cases, str(out), workers=1, log=quiet)
    return out


def test_prepared_pixels(prepared):
    for channel, suffix in brats.SUFFIXES.items():
        names = os.listdir(prepared / channel)
        assert len(names) == 16
        image = pixels(prepared / channel / f"Subject_003_slice_2_{suffix}.png")
        volume = made.volume(channel, seed=3)
        if channel == "Seg":
            expected = np.vectorize({0: 0, 1: 51, 2: 102, 4: 204}.get)(volume[:, :, 1])
        else:
            expected = np.round(volume[:, :, 1] / volume.max() * 255)
        assert np.array_equal(image[76:180, 76:180], expected)
        assert np.count_nonzero(image) == np.count_nonzero(expected)


def test_dataset_json(prepared, cases):
    dataset = brats.read_dataset_json(str(prepared))
    assert dataset["source"] == cases
    assert dataset["recipe"] == "report"
    assert dataset["channels"] == list(brats.CHANNELS)
    assert dataset["label_convention"] == "2020"
    assert dataset["label_codes"] == {"0": 0, "1": 51, "2": 102, "4": 204}
    assert dataset["coverage"] == {"threshold": 50, "fraction": 0.15, "modality": "T1"}
    assert dataset["geometry"]["volume_shape"] == [104, 104, 4]
    assert dataset["geometry"]["padding"] == [[76, 76], [76, 76]]
    assert dataset["geometry"]["affine"] == made.AFFINE.tolist()
    assert dataset["counts"]["slices"] == 16
    assert dataset["counts"]["train_slices"] == 12
    assert [case["subject"] for case in dataset["cases"]] == [
        f"Subject_{number:03d}" for number in range(1, 5)
    ]
    assert dataset["cases"][1]["case"] == "BraTS20_Training_002"
    assert dataset["cases"][1]["slices"] == [1, 2, 3, 4]
    assert dataset["cases"][1]["scale"] == {channel: {"max": 1000.0} for channel in IMAGES}
    assert sorted(os.listdir(prepared)) == sorted([*brats.CHANNELS, "dataset.json"])
    assert not os.path.exists(f"{prepared}.partial")


def test_same_bytes_with_two_workers(prepared, cases, tmp_path):
    prepare(cases, str(tmp_path / "out"), workers=2, log=quiet)
    assert made.contents(tmp_path / "out") == made.contents(prepared)


def interrupt_at(monkeypatch, stop):
    convert = brats_prepare._convert_case

    def interrupted(task):
        if task.subject == stop:
            # A slice is half written when the power goes.
            name = brats.slice_name(f"{stop}_slice_999", "T1")
            Path(task.partial, "slices", "T1", name).write_bytes(b"junk")
            raise KeyboardInterrupt
        return convert(task)

    monkeypatch.setattr(brats_prepare, "_convert_case", interrupted)


def test_same_bytes_after_an_interruption(prepared, cases, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_at(patch, "Subject_003")
        with pytest.raises(KeyboardInterrupt):
            prepare(cases, str(out), workers=1, log=quiet)
    assert os.listdir(tmp_path) == ["out.partial"]
    lines = []
    prepare(cases, str(out), workers=1, log=lines.append)
    assert "2 of 4 cases are complete" in lines[0]
    assert made.contents(out) == made.contents(prepared)
    assert os.listdir(tmp_path) == ["out"]


def test_interrupted_folder_refuses_other_settings(cases, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        interrupt_at(patch, "Subject_002")
        with pytest.raises(KeyboardInterrupt):
            prepare(cases, out, workers=1, log=quiet)
    with pytest.raises(ValueError, match=r"out.partial was made with --recipe report, not perc"):
        prepare(cases, out, recipe="percentile", workers=1, log=quiet)
    with pytest.raises(ValueError, match="--seed 0, not 1"):
        prepare(cases, out, seed=1, workers=1, log=quiet)


def test_interrupted_before_the_first_case_leaves_nothing(cases, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, "Subject_001")
    with pytest.raises(KeyboardInterrupt):
        prepare(cases, str(tmp_path / "out"), workers=1, log=quiet)
    assert os.listdir(tmp_path) == []


def test_a_case_that_changed_or_lost_a_slice_is_converted_again(tmp_path, monkeypatch):
    cases = tmp_path / "cases"
    for number in (1, 2, 3):
        made.write_case(cases, f"P_{number}", channels=["T1"], seed=number)
    with monkeypatch.context() as patch:
        interrupt_at(patch, "Subject_003")
        with pytest.raises(KeyboardInterrupt):
            prepare(str(cases), str(tmp_path / "out"), channels=["T1"], workers=1, log=quiet)
    changed = made.volume("T1", seed=9)
    changed[5] = 1
    made.save(str(cases / "P_1" / "P_1_t1.nii.gz"), changed)
    os.remove(tmp_path / "out.partial/slices/T1/Subject_002_slice_4_T1.png")
    lines = []
    prepare(str(cases), str(tmp_path / "out"), channels=["T1"], workers=1, log=lines.append)
    assert not any("continuing" in line for line in lines)
    image = pixels(tmp_path / "out/T1/Subject_001_slice_1_T1.png")
    assert np.array_equal(image[76:180, 76:180], np.round(changed[:, :, 0] / 1000 * 255))
    assert len(os.listdir(tmp_path / "out/T1")) == 12


def test_second_writer_is_refused(cases, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    monkeypatch.setattr(
        brats_prepare, "_convert_case", lambda task: prepare(cases, out, workers=1, log=quiet)
    )
    with pytest.raises(ValueError, match="another process is writing"):
        prepare(cases, out, workers=1, log=quiet)


def test_already_prepared(prepared, cases):
    before = made.contents(prepared)
    lines = []
    prepare(cases, str(prepared), workers=1, log=lines.append)
    assert len(lines) == 1 and "already prepared" in lines[0]
    with pytest.raises(ValueError, match="--test_patients 1, not 2"):
        prepare(cases, str(prepared), test_patients=2, workers=1)
    assert made.contents(prepared) == before


def test_other_out_dirs_are_refused(cases, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="used is not empty"):
        prepare(cases, str(tmp_path / "used"), workers=1)
    with pytest.raises(ValueError, match="is a file"):
        prepare(cases, str(tmp_path / "file"), workers=1)
    with pytest.raises(ValueError, match=r"cannot be created: .*file is not a folder"):
        prepare(cases, str(tmp_path / "file" / "out"), workers=1)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"out.partial holds files of another origin"):
        prepare(cases, str(tmp_path / "out"), workers=1)


def test_empty_out_dir_is_used(cases, tmp_path):
    prepare(cases, str(tmp_path), channels=["T1"], workers=1, log=quiet)
    assert sorted(os.listdir(tmp_path)) == ["T1", "dataset.json"]


def test_convention_2023(tmp_path):
    made.write_case(tmp_path / "cases", "BraTS-GLI-00000-000", style=2023)
    dataset = prepare(str(tmp_path / "cases"), str(tmp_path / "out"), workers=1, log=quiet)
    assert dataset["label_convention"] == "2023"
    assert dataset["label_codes"] == {"0": 0, "1": 51, "2": 102, "3": 204}
    assert dataset["counts"]["test_cases"] == 0  # a lone patient is for training
    mask = pixels(tmp_path / "out/Seg/Subject_001_slice_1_seg.png")
    assert np.unique(mask).tolist() == [0, 51, 102, 204]
    assert mask[76 + 16, 76 + 16] == 204


def test_convention_either_and_mixed(tmp_path):
    made.write_case(tmp_path / "cases", "P_1", enhancing=2)
    dataset = prepare(str(tmp_path / "cases"), str(tmp_path / "either"), workers=1, log=quiet)
    assert dataset["label_convention"] == "either"
    made.write_case(tmp_path / "cases", "P_2", enhancing=3)
    made.write_case(tmp_path / "cases", "P_3", enhancing=4)
    with pytest.raises(ValueError, match="P_2 holds label 3 and case P_3 label 4"):
        prepare(str(tmp_path / "cases"), str(tmp_path / "mixed"), workers=1)
    assert sorted(os.listdir(tmp_path)) == ["cases", "either"]


def test_coverage_falls_back_and_is_recorded(tmp_path):
    made.write_case(tmp_path / "cases", "P_1", channels=["T1", "T2"])
    made.write_case(tmp_path / "cases", "P_2", channels=["T2", "FLAIR"])
    dataset = prepare(
        str(tmp_path / "cases"), str(tmp_path / "out"), channels=["T2"], workers=1, log=quiet
    )
    assert dataset["coverage"]["modality"] == "per case"
    assert [case["coverage_modality"] for case in dataset["cases"]] == ["T1", "FLAIR"]
    assert set(dataset["cases"][0]["scale"]) == {"T1", "T2"}
    assert sorted(os.listdir(tmp_path / "out")) == ["T2", "dataset.json"]


def test_own_grid_is_recorded(tmp_path):
    for number, shape in ((1, (104, 104, 4)), (2, (120, 110, 3))):
        path = tmp_path / "cases" / f"P_{number}" / f"P_{number}_t1.nii"
        made.save(str(path), made.volume("T1", shape=shape), np.diag([number] * 3 + [1]))
    dataset = prepare(
        str(tmp_path / "cases"), str(tmp_path / "out"), channels=["T1"], workers=1, log=quiet
    )
    first, second = dataset["cases"]
    assert not {"shape", "padding", "affine"} & set(first)
    assert second["shape"] == [120, 110, 3]
    assert second["padding"] == [[68, 68], [73, 73]]
    assert second["affine"] == np.diag([2.0, 2, 2, 1]).tolist()


def test_patient_without_slices(tmp_path):
    made.write_case(tmp_path / "cases", "P_1", channels=["T1"])
    dark = made.volume("T1", shape=(120, 120, 4))
    dark[0, 0, 0] = 32000  # one bright voxel darkens the whole patient
    made.save(str(tmp_path / "cases" / "P_2" / "P_2_t1.nii.gz"), dark)
    lines = []
    dataset = prepare(
        str(tmp_path / "cases"), str(tmp_path / "out"), channels=["T1"], workers=1, log=lines.append
    )
    assert any("warning: P_2 keeps no slice" in line for line in lines)
    assert dataset["cases"][1]["slices"] == [] and dataset["cases"][1]["note"]
    assert dataset["counts"]["cases_without_slices"] == 1

    (tmp_path / "cases" / "P_1" / "P_1_t1.nii.gz").unlink()
    (tmp_path / "cases" / "P_1").rmdir()
    with pytest.raises(ValueError, match=r"no slice of .* shows enough brain"):
        prepare(str(tmp_path / "cases"), str(tmp_path / "none"), channels=["T1"], workers=1)
    assert sorted(os.listdir(tmp_path)) == ["cases", "out"]
    # The percentiles do not see the bright voxel.
    dataset = prepare(
        str(tmp_path / "cases"),
        str(tmp_path / "robust"),
        channels=["T1"],
        recipe="percentile",
        workers=1,
        log=quiet,
    )
    assert dataset["counts"]["slices"] == 4


# ------------------------------------------------------------------------------------------- split


@pytest.mark.parametrize(("patients", "expected"), [(1, 0), (2, 1), (7, 1), (20, 3), (369, 56)])
def test_default_number_of_test_patients(patients, expected):
    names = [str(i) for i in range(patients)]
    assert len(choose_test_patients(names, None, seed=0)) == expected


def test_split_depends_on_the_seed_alone():
    names = [f"P_{i}" for i in range(50)]
    first = choose_test_patients(names, 10, seed=3)
    assert first == choose_test_patients(names, 10, seed=3)
    assert first != choose_test_patients(names, 10, seed=4)
    assert choose_test_patients(names, 0, seed=3) == frozenset()


@pytest.mark.parametrize("number", [-1, 5, 6])
def test_split_refuses(number):
    with pytest.raises(ValueError, match=f"--test_patients {number}: with 5 patients"):
        choose_test_patients(list("abcde"), number, seed=0)


def test_time_points_of_a_patient_stay_together():
    names = [f"BraTS-GLI-{i:05d}-{t:03d}" for i in range(10) for t in range(2)]
    patients = [brats.Case(name, "", {}).patient for name in names]
    assert len(set(patients)) == 10
    assert len(choose_test_patients(patients, 3, seed=0)) == 3
    assert brats.Case("BraTS2021_00000", "", {}).patient == "BraTS2021_00000"


# ------------------------------------------------------------------------------------ dataset.json


def test_read_dataset_json(tmp_path):
    assert brats.read_dataset_json(str(tmp_path)) is None
    path = tmp_path / "dataset.json"
    good = {"format": "brats-slices", "version": 1, "cases": []}
    for text, message in [
        ('{"format": "brats-sl', "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({**good, "cases": [{"split": "train"}]}), "is damaged"),
        (json.dumps({**good, "version": 2}), "version 2: expected"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            brats.read_dataset_json(str(tmp_path))
    path.write_text(json.dumps(good))
    assert brats.read_dataset_json(str(tmp_path)) == good


# -------------------------------------------------------------------------------------- the script


def load_script(name):
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--channels", "T1CE,Foo"], "'Foo'"),
        (["--test_patients", "4"], "--test_patients 4"),
        (["--workers", "0"], "--workers 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--brats_dir", "/no/such/folder"], "is not a folder"),
    ],
)
def test_script_errors(cases, tmp_path, monkeypatch, capsys, flags, message):
    arguments = ["brats_prepare.py", "--brats_dir", cases, "--out_dir", str(tmp_path / "o"), *flags]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        cli.run(load_script("brats_prepare").main)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert os.listdir(tmp_path) == []


def test_script_from_another_folder_with_two_workers(tmp_path):
    folder = made.write_case(tmp_path / "my cases", "P_1", channels=["T1CE", "Seg"])
    made.write_case(tmp_path / "my cases", "P_2", channels=["T1CE", "Seg"])
    command = [sys.executable, str(REPOSITORY / "scripts" / "brats_prepare.py"), "--workers", "2"]
    command += ["--brats_dir", "my cases", "--out_dir", "out", "--channels", "T1CE,Seg"]
    python_path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": python_path}

    path = os.path.join(folder, "P_1_t1ce.nii.gz")
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:1000])
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "P_1_t1ce.nii.gz" in errors[0]
    assert os.listdir(tmp_path) == ["my cases"]

    Path(path).write_bytes(whole)
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "8 slices per channel of 2 patients" in result.stdout
    assert len(os.listdir(tmp_path / "out" / "T1CE")) == 8


@pytest.mark.skipif(not REAL_CASES.is_dir(), reason=f"no real patients at {REAL_CASES}")
def test_real_patients(tmp_path):
    dataset = prepare(
        str(REAL_CASES), str(tmp_path / "out"), channels=["FLAIR", "T1CE", "Seg"], log=quiet
    )
    assert [len(case["slices"]) for case in dataset["cases"]] == [67, 45]
    assert dataset["label_convention"] == "2020"
    assert dataset["coverage"]["modality"] == "T1CE"
    assert dataset["geometry"]["padding"] == [[8, 8], [8, 8]]
    masks = [pixels(path) for path in (tmp_path / "out" / "Seg").iterdir()]
    assert set(np.unique(masks)) == set(brats.MASK_CODES)
