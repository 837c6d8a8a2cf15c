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

from improved_diffusion import brats, brats_prepare, cli, nifti_import
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


def test_prefix_may_be_written_with_composed_and_decomposed_accents(tmp_path):
    """A copy over macOS writes an accented letter as two characters."""
    made.save(str(tmp_path / "P" / "caf\u00e9_t1.nii"), made.volume("T1"))
    made.save(str(tmp_path / "P" / "cafe\u0301_seg.nii"), made.volume("Seg"))
    (case,) = brats.find_cases(str(tmp_path), ["T1", "Seg"])
    assert case.name == "caf\u00e9" and sorted(case.files) == ["Seg", "T1"]


def test_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Permissions don't bind a superuser, so the system's answer is made up."""
    made.write_case(tmp_path, "P_1", channels=["T1"])
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("P_1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"the folder .*P_1 cannot be read: Permission denied"):
        brats.find_cases(str(tmp_path), ["T1"])


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
    return ["T1"], "no BraTS case found"


def decathlon(root):
    made.save(os.path.join(root, "imagesTr", "BRATS_001.nii.gz"), made.volume("T1"))
    return ["T1"], "no BraTS case found.* It holds BRATS_001.nii.gz"


def lost_folder(root):
    made.write_case(root, "P_1", channels=["T1"])
    os.symlink(os.path.join(root, "nowhere"), os.path.join(root, "P_2"))
    return ["T1"], "P_2 is a link that leads nowhere"


def folder_linked_in_a_circle(root):
    os.symlink(os.path.join(root, "P_1"), os.path.join(root, "P_2"))
    os.symlink(os.path.join(root, "P_2"), os.path.join(root, "P_1"))
    return ["T1"], "P_1 is a link that leads nowhere"


def folder_named_like_a_file(root):
    made.write_case(root, "P_1", channels=["T1"])
    os.mkdir(os.path.join(root, "P_1", "P_1_seg.nii.gz"))
    return ["T1", "Seg"], "has no Seg file"


@pytest.mark.parametrize(
    "spoil",
    [
        two_files,
        two_cases,
        missing_modality,
        same_name,
        only_a_mask,
        nothing,
        decathlon,
        lost_folder,
        folder_linked_in_a_circle,
        folder_named_like_a_file,
    ],
)
def test_find_cases_refuses(tmp_path, spoil):
    channels, message = spoil(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        brats.find_cases(str(tmp_path), channels)


# ----------------------------------------------------------------------------------- read volumes


def case_of(folder):
    (case,) = brats.find_cases(folder, ["T1", "Seg"])
    return case


def set_header(path, **fields):
    """Write fields into a gzipped file's header as they are."""
    content = bytearray(gzip.decompress(Path(path).read_bytes()))
    for name, value in fields.items():
        kind, place = nib.Nifti1Header.template_dtype.fields[name]
        content[place : place + kind.itemsize] = np.array(value, kind.base).tobytes()
    Path(path).write_bytes(gzip.compress(content))


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
    return r"_t1.nii.gz has 4 slices of 257x20 pixels: at most 1024 of 256x256"


def spoil_4d_of_one(folder, path):
    made.save(path("t1"), np.ones((20, 20, 4, 1), dtype=np.int16))
    return r"_t1.nii.gz is 4-D \(20x20x4x1\).* remove the last axis"


def spoil_voxel_size(folder, path):
    made.save(path("t1"), made.volume("T1"), made.AFFINE @ np.diag([0.9, 0.9, 1, 1]))
    return r"_t1.nii.gz has voxels of 0.9 x 0.9 x 1 mm: expected 1 x 1 x 1 mm"


def spoil_voxel_size_without_position(folder, path):
    set_header(path("t1"), sform_code=0, qform_code=0, pixdim=[1, 1, 1, 3, 0, 0, 0, 0])
    return r"_t1.nii.gz has voxels of 1 x 1 x 3 mm"


def spoil_tilt(folder, path):
    cos, sin = np.cos(0.25), np.sin(0.25)  # 14 degrees
    tilt = np.array([[cos, -sin, 0, 0], [sin, cos, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    made.save(path("t1"), made.volume("T1"), made.AFFINE @ tilt)
    return r"_t1.nii.gz has axes that are tilted by up to 14 degrees"


def spoil_shear(folder, path):
    set_header(path("t1"), srow_x=[-0.99, 0.1, 0, 0])
    return r"_t1.nii.gz has axes that are .* not perpendicular"


def spoil_singular(folder, path):
    set_header(path("t1"), srow_x=[0, 0, 0, 0])
    return r"_t1.nii.gz has voxels of 0 x 1 x 1 mm"


def spoil_two_axes_in_one_direction(folder, path):
    set_header(path("t1"), srow_x=[1, 1, 0, 0], srow_y=[0, 0, 0, 0])
    return r"_t1.nii.gz has axes that are .* not perpendicular"


def spoil_affine_nan(folder, path):
    set_header(path("t1"), srow_y=[np.nan, 0, 0, 0])
    return r"_t1.nii.gz cannot be read as NIfTI \(its affine is not finite"


def spoil_petabytes(folder, path):
    set_header(path("t1"), dim=[3, 32767, 32767, 32767, 1, 1, 1, 1])
    return r"_t1.nii.gz has 32767 slices of 32767x32767 pixels"


def spoil_promise(folder, path):
    set_header(path("t1"), dim=[3, 256, 256, 1024, 1, 1, 1, 1])
    return r"its header promises 134217728 bytes of voxels, but 86528 follow"


def spoil_bomb(folder, path):
    with gzip.open(path("t1"), "ab") as file:
        file.write(bytes(2 << 20))
    return r"more than 1048576 bytes follow the voxels"


def spoil_dim(folder, path):
    set_header(path("t1"), dim=[3, -104, 104, 4, 1, 1, 1, 1])
    return r"its header gives 3 dimensions of \[-104, 104, 4,"


def spoil_offset(folder, path):
    set_header(path("t1"), vox_offset=0)  # the header would be read as voxels
    return r"its voxels begin at byte 0"


def spoil_pair(folder, path):
    set_header(path("t1"), magic=b"ni1")
    return r"it is half of a pair of files"


def spoil_intercept(folder, path):
    set_header(path("t1"), scl_slope=1, scl_inter=np.nan)
    return r"_t1.nii.gz cannot be read as NIfTI \(.*intercept nan"


def spoil_type(folder, path):
    set_header(path("t1"), datatype=77)
    return r"its voxels are of the unknown type 77"


def spoil_rgb(folder, path):
    set_header(path("t1"), datatype=128)
    return r"_t1.nii.gz holds RGB voxels: expected integers or floats"


def spoil_complex_mask(folder, path):
    made.save(path("seg"), made.volume("Seg").astype(np.complex64))
    return r"_seg.nii.gz holds complex64 voxels"


def spoil_z_scores(folder, path):
    levels = (made.volume("T1") - 750.0) / 150
    made.save(path("t1"), levels)
    return r"_t1.nii.gz has 5\d% of its voxels other than 0 below 0.*z-scores"


def spoil_pipe(folder, path):
    os.remove(path("t1"))
    os.mkfifo(path("t1"))
    return r"_t1.nii.gz is no file but a folder, a pipe or a device"


def spoil_link(folder, path):
    os.remove(path("t1"))
    os.symlink("elsewhere.nii.gz", path("t1"))
    return r"_t1.nii.gz is a link that leads nowhere"


def spoil_link_to_itself(folder, path):
    os.remove(path("t1"))
    os.symlink(os.path.basename(path("t1")), path("t1"))
    return r"_t1.nii.gz is a link that leads nowhere"


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
    # Stored in another orientation, a volume could not be matched with one that states none.
    made.save(os.path.join(folder, "P_1_t1.nii.gz"), made.volume("T1"), np.eye(4))
    with pytest.raises(ValueError, match=r"_seg.nii.gz does not say how it lies.*stored as RAS"):
        list(brats.read_case(case_of(folder), ["T1", "Seg"]))


def test_volumes_are_turned_to_the_challenges_orientation(tmp_path):
    """A volume gives the same slices and the same place in whatever order it is stored."""
    lps = made.volume("T1", shape=(5, 6, 7))
    codes = ["LPS", "RAS", "LAS", "PIR", "SRA", "IPL"]
    for code in codes:
        turn = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt(code)
        )
        stored = nib.orientations.apply_orientation(lps, turn)
        affine = made.AFFINE @ nib.orientations.inv_ornt_aff(turn, lps.shape)
        assert nib.aff2axcodes(affine) == tuple(code)
        path = made.save(str(tmp_path / f"{code}.nii"), stored, affine)
        volume, own, orientation = nifti_import.read_volume(path, (256, 256, 1024))
        assert orientation == code
        assert np.array_equal(volume, lps)
        assert np.array_equal(own, made.AFFINE)
    # By hand: in RAS the first voxel lies at the right, behind, below; in LPS at the left's end.
    ras = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    path = made.save(str(tmp_path / "ras.nii"), ras, np.eye(4))
    volume, own, _ = nifti_import.read_volume(path, (256, 256, 1024))
    assert np.array_equal(volume, ras[::-1, ::-1])
    assert own.tolist() == [[-1, 0, 0, 1], [0, -1, 0, 2], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_volumes_of_a_case_may_be_stored_differently(tmp_path):
    folder = made.write_case(tmp_path, "P_1", channels=["T1", "Seg"])
    before = [volume for _, volume, _ in brats.read_case(case_of(folder), ["T1", "Seg"])]
    path = os.path.join(folder, "P_1_seg.nii.gz")
    nib.save(nib.as_closest_canonical(nib.load(path)), path)
    assert nib.aff2axcodes(nib.load(path).affine) == ("R", "A", "S")
    after = [volume for _, volume, _ in brats.read_case(case_of(folder), ["T1", "Seg"])]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_small_tilt_is_taken(tmp_path):
    cos, sin = np.cos(0.15), np.sin(0.15)  # 8.6 degrees
    tilt = np.array([[cos, -sin, 0, 0], [sin, cos, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    path = made.save(str(tmp_path / "a.nii"), made.volume("T1"), made.AFFINE @ tilt)
    volume, affine, orientation = nifti_import.read_volume(path, (256, 256, 1024))
    assert np.array_equal(volume, made.volume("T1")) and orientation == "LPS"
    assert np.allclose(affine, made.AFFINE @ tilt, atol=1e-6)


def big_endian(path):
    header = nib.Nifti1Header(endianness=">")
    nib.save(nib.Nifti1Image(made.volume("T1"), made.AFFINE, header, dtype=np.int16), path)
    assert gzip.decompress(Path(path).read_bytes())[:4] == b"\0\0\1\x5c"


def nifti_2(path):
    nib.save(nib.Nifti2Image(made.volume("T1"), made.AFFINE), path)


def slope_zero(path):
    set_header(path, scl_slope=0, scl_inter=5)


def slope_nan(path):
    set_header(path, scl_slope=np.nan, scl_inter=np.nan)


def slope_infinite(path):
    set_header(path, scl_slope=np.inf)


def qform_of_another_orientation(path):
    set_header(path, qform_code=1, quatern_b=0, quatern_c=0, quatern_d=0)
    assert nib.aff2axcodes(nib.load(path).get_qform()) == ("R", "A", "S")


def notes_of_a_program(path):
    """An extension of nibabel's kind for pickles, which must not be opened."""
    image = nib.Nifti1Image(made.volume("T1"), made.AFFINE)
    trap = f"cos\nmkdir\n(S'{os.path.dirname(path)}/trap'\ntR.".encode()
    image.header.extensions.append(nib.nifti1.Nifti1Extension("pypickle", trap))
    nib.save(image, path)


def surplus(path):
    with gzip.open(path, "ab") as file:
        file.write(b"x" * 100)


def sizes_unknown(path):
    set_header(path, sform_code=0, qform_code=0, pixdim=[1, 0, 0, 0, 0, 0, 0, 0])


def linked(path):
    elsewhere = Path(path).parents[2] / "elsewhere.nii.gz"
    os.rename(path, elsewhere)
    os.symlink(elsewhere, path)


UNUSUAL = [
    big_endian,
    nifti_2,
    slope_zero,
    slope_nan,
    slope_infinite,
    qform_of_another_orientation,
    notes_of_a_program,
    surplus,
    sizes_unknown,
    linked,
]


@pytest.mark.parametrize("change", UNUSUAL)
def test_unusual_files_are_read(tmp_path, change):
    folder = made.write_case(tmp_path / "cases", "P_1", channels=["T1"])
    change(os.path.join(folder, "P_1_t1.nii.gz"))
    (case,) = brats.find_cases(str(tmp_path / "cases"), ["T1"])
    ((_, volume, _),) = brats.read_case(case, ["T1"])
    assert volume.dtype == np.int16 and np.array_equal(volume, made.volume("T1"))
    assert len(os.listdir(folder)) == 1


def test_header_scales_voxels(tmp_path):
    path = made.save(str(tmp_path / "a.nii.gz"), made.volume("T1"))
    set_header(path, scl_slope=0.5, scl_inter=-3)
    volume, _, _ = nifti_import.read_volume(path, (256, 256, 1024))
    assert np.array_equal(volume, made.volume("T1") * 0.5 - 3)


@pytest.mark.parametrize("factor", [1e-310, 1e-30, 1e30, 1e304])
def test_units_of_intensities_do_not_matter(tmp_path, factor):
    plain = made.save(str(tmp_path / "a.nii"), made.volume("T1").astype(np.float64))
    scaled = made.save(str(tmp_path / "b.nii"), made.volume("T1").astype(np.float64) * factor)
    slices = []
    for path in (plain, scaled):
        volume, _, _ = nifti_import.read_volume(path, (256, 256, 1024))
        brats.check_intensities(volume, path)
        slices.append(brats.image_slice(volume, 1, brats.intensity_scale(volume, "report")))
    difference = np.abs(slices[0].astype(int) - slices[1])
    assert difference.max() <= 1 and difference.mean() < 0.01


def test_a_few_negative_voxels_become_zero(tmp_path):
    levels = made.volume("T1")
    levels[3] = -5
    brats.check_intensities(levels, "a.nii")
    assert not brats.image_slice(levels, 1, brats.intensity_scale(levels, "report"))[76 + 3].any()


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (os.utime, "files in .*P_2 changed while they were read: start again"),
        (os.remove, "P_2_t1.nii.gz cannot be opened"),
    ],
)
def test_a_case_that_changes_after_the_check_is_refused(tmp_path, monkeypatch, change, message):
    for number in (1, 2):
        made.write_case(tmp_path / "cases", f"P_{number}", channels=["T1"])
    convert = brats_prepare._convert_case

    def change_and_convert(task):
        if task.case.name == "P_2":
            change(task.case.files["T1"])
        return convert(task)

    settings = {"channels": ["T1"], "workers": 1, "log": quiet}
    with monkeypatch.context() as patch:
        patch.setattr(brats_prepare, "_convert_case", change_and_convert)
        with pytest.raises(ValueError, match=message):
            prepare(str(tmp_path / "cases"), str(tmp_path / "out"), **settings)
    # The first case is kept for the next start, which mends the second.
    assert sorted(os.listdir(tmp_path)) == ["cases", "out.partial"]
    made.write_case(tmp_path / "cases", "P_2", channels=["T1"])
    dataset = prepare(str(tmp_path / "cases"), str(tmp_path / "out"), **settings)
    assert dataset["counts"]["slices"] == 8
    assert sorted(os.listdir(tmp_path)) == ["cases", "out"]


def test_damaged_settings_of_an_interrupted_start_are_named(cases, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, "Subject_002")
        with pytest.raises(KeyboardInterrupt):
            prepare(cases, str(tmp_path / "out"), workers=1, log=quiet)
    for content in ("", "[1]", "{"):
        (tmp_path / "out.partial/state/settings.json").write_text(content)
        with pytest.raises(ValueError, match=r"settings.json is damaged: delete .*out.partial "):
            prepare(cases, str(tmp_path / "out"), workers=1, log=quiet)


@pytest.mark.parametrize(
    "name",
    ["my cases", "-cases", "F\u00e4lle \u4e2d", "cafe\u0301", "new\nline", "x\udce9y", "a%20b"],
)
def test_folders_and_cases_may_have_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    made.write_case(name, f"P {name} 1", channels=["T1"])
    dataset = prepare(name, f"-out {name}", channels=["T1"], workers=1, log=quiet)
    assert dataset["counts"]["slices"] == 4
    assert len(os.listdir(f"-out {name}/T1")) == 4


def test_one_patient_of_one_slice(tmp_path):
    path = tmp_path / "cases" / "P_1" / "P_1_t1.nii.gz"
    made.save(str(path), made.volume("T1", shape=(104, 104, 1)))
    dataset = prepare(
        str(tmp_path / "cases"), str(tmp_path / "out"), channels=["T1"], workers=1, log=quiet
    )
    assert dataset["counts"]["train_slices"] == 1 and dataset["counts"]["test_slices"] == 0
    assert os.listdir(tmp_path / "out" / "T1") == ["Subject_001_slice_1_T1.png"]


def test_out_dir_may_be_a_link(tmp_path):
    made.write_case(tmp_path / "cases", "P_1", channels=["T1"])
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    prepare(str(tmp_path / "cases"), str(tmp_path / "out"), channels=["T1"], workers=1, log=quiet)
    assert (tmp_path / "out").is_symlink()
    assert sorted(os.listdir(tmp_path / "disk")) == ["T1", "dataset.json"]


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
    (tmp_path / "out.partial").write_text("x")
    with pytest.raises(ValueError, match=r"out.partial is of another origin"):
        prepare(cases, str(tmp_path / "out"), workers=1)
    (tmp_path / "out.partial").unlink()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"out.partial is of another origin"):
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
    moved = made.AFFINE.copy()
    moved[:3, 3] = 7, -8, 9
    for number, shape, affine in (
        (1, (104, 104, 4), made.AFFINE),
        (2, (120, 110, 3), moved),
    ):
        path = tmp_path / "cases" / f"P_{number}" / f"P_{number}_t1.nii"
        made.save(str(path), made.volume("T1", shape=shape), affine)
    dataset = prepare(
        str(tmp_path / "cases"), str(tmp_path / "out"), channels=["T1"], workers=1, log=quiet
    )
    first, second = dataset["cases"]
    assert not {"shape", "padding", "affine"} & set(first)
    assert second["shape"] == [120, 110, 3]
    assert second["padding"] == [[68, 68], [73, 73]]
    assert second["affine"] == moved.tolist()


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
    own = {"subject": "a", "split": "train", "slices": [1, 2]}
    geometry = {"volume_shape": [240, 240, 155], "padding": [[8, 8], [8, 8]]}
    placed = {**good, "image_size": 256, "label_convention": "2020"}
    for text, message in [
        ('{"format": "brats-sl', "is damaged"),
        ("[]", "is damaged"),
        ("[" * 100_000, "is damaged"),
        (json.dumps({**good, "cases": [own, own]}), "a slice of 'a' is listed twice"),
        (json.dumps({**good, "cases": [{**own, "slices": [1, 1]}]}), "listed twice"),
        (json.dumps({**good, "cases": [{**own, "slices": [0]}]}), "no list of numbers"),
        (json.dumps({**good, "cases": [{**own, "slices": [True]}]}), "no list of numbers"),
        (json.dumps({**placed, "geometry": {**geometry, "affine": [[0] * 4] * 3}}), "geometry"),
        (json.dumps({**placed, "geometry": {"affine": [[0] * 4] * 4}}), "is damaged"),
        (json.dumps({**good, "cases": [{"split": "train"}]}), "is damaged"),
        (json.dumps({**good, "version": 2}), "version 2: expected"),
        (json.dumps({"format": "other"}), "is damaged"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            brats.read_dataset_json(str(tmp_path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is damaged"):
        brats.read_dataset_json(str(tmp_path))
    placed["geometry"] = {**geometry, "affine": made.AFFINE.tolist()}
    for content in (good, {**good, "cases": [own]}, placed):
        path.write_text(json.dumps(content))
        assert brats.read_dataset_json(str(tmp_path)) == content
    path.write_text("\ufeff" + json.dumps(good), encoding="utf-8")  # as some editors on Windows do
    assert brats.read_dataset_json(str(tmp_path)) == good
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"dataset.json is no file but"):
        brats.read_dataset_json(str(tmp_path))


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
