"""Samples as NIfTI lie where the slices they imitate were cut from."""

import gzip

import brats_cases
import nibabel as nib
import numpy as np
import pytest

from improved_diffusion import brats, nifti_export
from improved_diffusion.brats_prepare import prepare
from improved_diffusion.nifti_export import BRATS_GEOMETRY

CHANNELS = ["Seg", "T1CE"]
# The first axis of the files runs forwards and the second to the left.
AFFINE = np.array([[0.0, -1, 0, 30], [1, 0, 0, -50], [0, 0, 1, 7], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """What preparing a case says about it, whose grid is not the challenge's."""
    root = tmp_path_factory.mktemp("nifti")
    for channel in ("Seg", "T1CE"):
        suffix = brats_cases.SUFFIXES_2023[channel]
        volume = brats_cases.volume(channel, enhancing=3)
        path = root / "cases" / "BraTS-GLI-00000-000" / f"BraTS-GLI-00000-000-{suffix}.nii.gz"
        brats_cases.save(str(path), volume, AFFINE)
    prepare(str(root / "cases"), str(root / "slices"), channels=CHANNELS, test_patients=0)
    return brats.read_dataset_json(str(root / "slices"))


def read(path):
    return nib.load(path)


def test_a_pixel_lies_where_its_voxel_does(dataset, tmp_path):
    """At the prepared size a sample's pixel is a voxel, shifted by the padding."""
    geometry = nifti_export.geometry_of(dataset)
    sample = np.arange(256 * 256 * 2, dtype=np.uint32).astype(np.uint8).reshape(256, 256, 2)
    nifti_export.write_volumes(tmp_path, "sample_000003", sample, CHANNELS, geometry)
    image = read(tmp_path / "sample_000003" / "sample_000003_t1ce.nii.gz")
    assert image.shape == (256, 256, 1)
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(image.dataobj)[:, :, 0], sample[:, :, 1])
    before = [pad[0] for pad in geometry["padding"]]
    assert before == [76, 76]  # 104 of 256
    for voxel in ([0, 0], [103, 50]):
        pixel = [voxel[0] + before[0], voxel[1] + before[1], 0, 1]
        stored = [103 - voxel[1], voxel[0], 2, 1]  # slice 2 of 4
        np.testing.assert_allclose(image.affine @ pixel, AFFINE @ stored)
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    assert image.header.get_zooms() == (1, 1, 1)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert (image.header["qform_code"], image.header["sform_code"]) == (1, 1)
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-5)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_smaller_samples_cover_the_same_place(size):
    """The outer corners of the slice's pixels stay where they are."""
    full, small = (nifti_export.slice_affine(BRATS_GEOMETRY, n) for n in (256, size))
    for corner in (0, 1):
        i, j = 256 * corner - 0.5, size * corner - 0.5
        np.testing.assert_allclose(small @ [j, j, 0, 1], full @ [i, i, 0, 1])
    spacing = np.linalg.norm(small[:3, :3], axis=0)
    np.testing.assert_allclose(spacing, [256 / size, 256 / size, 1])


def test_the_challenges_space():
    """240 x 240 x 155 voxels of 1 mm; the first axis runs to the left, the second to the back."""
    affine = nifti_export.slice_affine(BRATS_GEOMETRY, 256)
    np.testing.assert_allclose(affine @ [8, 8, 0, 1], [0, 239, 77, 1])
    np.testing.assert_allclose(affine @ [8 + 239, 8 + 239, 0, 1], [-239, 0, 77, 1])
    assert nib.aff2axcodes(affine) == ("L", "P", "S")


@pytest.mark.parametrize(
    ("convention", "labels"), [("2020", [0, 1, 2, 4]), ("2023", [0, 1, 2, 3]), ("either", None)]
)
def test_masks_hold_the_sources_labels(tmp_path, convention, labels):
    mask = np.array([[0, 20, 60, 51], [102, 90, 204, 255]], dtype=np.uint8)
    expected = np.array([[0, 0, 1, 1], [2, 2, 9, 9]])
    expected[expected == 9] = (labels or [0, 1, 2, 4])[3]
    np.testing.assert_array_equal(nifti_export.labels_of(mask, convention), expected)
    geometry = {**BRATS_GEOMETRY, "label_convention": convention}
    nifti_export.write_volumes(tmp_path, "s", mask[:, :, None], ["Seg"], geometry)
    stored = np.asarray(read(tmp_path / "s" / "s_seg.nii.gz").dataobj)
    np.testing.assert_array_equal(stored[:, :, 0], expected)


def test_the_convention_is_the_sources(dataset):
    assert dataset["label_convention"] == "2023"
    assert nifti_export.geometry_of(dataset)["label_convention"] == "2023"
    assert nifti_export.geometry_of({**dataset, "geometry": None}) == {}
    none = {**dataset, "label_convention": None}  # prepared without masks
    assert nifti_export.geometry_of(none)["label_convention"] == "2020"


def test_equal_samples_make_equal_files(tmp_path):
    sample = np.zeros((8, 8, 2), np.uint8)
    for name in ("a", "b"):
        nifti_export.write_volumes(tmp_path / name, "s", sample, CHANNELS, BRATS_GEOMETRY)
    one, other = ((tmp_path / name / "s" / "s_seg.nii.gz").read_bytes() for name in "ab")
    assert one == other
    assert gzip.decompress(one)[344:348] == b"n+1\0"


def test_brats_prepare_finds_them(tmp_path):
    """The files have the names of BraTS 2020, so that they are cases again."""
    sample = np.full((256, 256, 2), 204, np.uint8)
    for i in range(2):
        stem = f"sample_{i:06d}"
        nifti_export.write_volumes(tmp_path / "nifti", stem, sample, CHANNELS, BRATS_GEOMETRY)
    cases = brats.find_cases(str(tmp_path / "nifti"), CHANNELS)
    assert [case.name for case in cases] == ["sample_000000", "sample_000001"]
    for channel, volume, affine in brats.read_case(cases[0], CHANNELS):
        assert np.unique(volume).tolist() == [4 if channel == "Seg" else 204]
        np.testing.assert_allclose(affine, nifti_export.slice_affine(BRATS_GEOMETRY, 256))
