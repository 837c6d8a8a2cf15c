"""Synthetic patients."""

import os
import sys
from pathlib import Path

import brats_cases as made
import nibabel as nib
import numpy as np
import pytest

from improved_diffusion import brats, cli, phantom
from improved_diffusion.brats_prepare import prepare

REPOSITORY = Path(__file__).resolve().parents[1]


def quiet(line):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("phantoms") / "cases"
    phantom.write_phantoms(str(path), 2, seed=5, workers=2, log=quiet)
    return path


def load(folder, number, modality):
    name = f"BraTS20_Training_{number:03d}"
    return nib.load(folder / name / f"{name}_{modality}.nii.gz")


def test_layout(folder):
    names = ["BraTS20_Training_001", "BraTS20_Training_002", "phantom.json"]
    assert sorted(os.listdir(folder)) == names
    for modality in ("flair", "t1", "t1ce", "t2", "seg"):
        image = load(folder, 1, modality)
        assert image.shape == (240, 240, 155)
        assert image.get_data_dtype() == np.int16
        assert np.array_equal(
            image.affine, [[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]]
        )


@pytest.mark.parametrize("number", [1, 2])
def test_anatomy(folder, number):
    volumes = {
        modality: np.asarray(load(folder, number, modality).dataobj)
        for modality in ("flair", "t1", "t1ce", "t2", "seg")
    }
    labels = volumes.pop("seg")
    brain = volumes["t1"] > 0
    assert 0.12 < brain.mean() < 0.20  # a real skull-stripped brain fills 12 to 18 %
    for volume in volumes.values():
        assert np.array_equal(volume > 0, brain) and volume.min() == 0
        # Nothing touches the border of the volume.
        assert not any(np.take(volume, end, axis).any() for axis in range(3) for end in (0, -1))
    assert np.unique(labels).tolist() == [0, 1, 2, 4]
    assert not labels[~brain].any()
    oedema, core, rim = (labels == label for label in (2, 1, 4))
    healthy = brain & (labels == 0)
    assert volumes["flair"][oedema].mean() > 1.5 * volumes["flair"][healthy].mean()
    assert volumes["t2"][oedema].mean() > 1.3 * volumes["t2"][healthy].mean()
    assert volumes["t1ce"][rim].mean() > 1.5 * volumes["t1ce"][healthy].mean()
    assert volumes["t1ce"][core].mean() < 0.7 * volumes["t1ce"][healthy].mean()
    # Nested: the rim surrounds the core.
    grown = np.zeros_like(core)
    for axis in range(3):
        grown |= np.roll(core, 1, axis) | np.roll(core, -1, axis)
    shell = grown & ~core & brain
    assert (rim[shell]).mean() > 0.99


def test_slices_pass_the_coverage_rule(folder, tmp_path):
    dataset = prepare(str(folder), str(tmp_path / "slices"), workers=2, log=quiet)
    assert all(62 <= len(case["slices"]) <= 92 for case in dataset["cases"])
    assert dataset["label_convention"] == "2020"


def test_patient_depends_on_seed_and_index_alone(folder, tmp_path):
    phantom.write_phantoms(str(tmp_path / "one"), 1, seed=5, workers=1, log=quiet)
    name = "BraTS20_Training_001"
    assert made.contents(tmp_path / "one" / name) == made.contents(folder / name)
    first, second = (np.asarray(load(folder, number, "t1").dataobj) for number in (1, 2))
    assert not np.array_equal(first, second)
    other = phantom.phantom_patient(6, 0)["t1"]
    assert not np.array_equal(first, other)


def test_continues_an_interrupted_folder(folder, tmp_path, monkeypatch):
    out = tmp_path / "cases"

    def copy_patient(task):  # the drawing itself is tested above
        made.write_case(os.path.dirname(task[0]), os.path.basename(task[0]), channels=["T1"])
        drawn.append(os.path.basename(task[0]))
        if len(drawn) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(phantom, "_write_patient", copy_patient)
    drawn = []
    with pytest.raises(KeyboardInterrupt):
        phantom.write_phantoms(str(out), 4, seed=1, workers=1, log=quiet)
    (out / "BraTS20_Training_003.partial").mkdir()
    lines = []
    drawn = ["x", "y"]
    phantom.write_phantoms(str(out), 4, seed=1, workers=1, log=lines.append)
    assert drawn[2:] == ["BraTS20_Training_003", "BraTS20_Training_004"]
    assert "2 of 4 patients" in lines[0]
    with pytest.raises(ValueError, match="holds other phantoms"):
        phantom.write_phantoms(str(out), 4, seed=2, workers=1)
    with pytest.raises(ValueError, match="already holds BraTS20_Training_003"):
        phantom.write_phantoms(str(out), 2, seed=1, workers=1)


def test_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        phantom.write_phantoms(str(tmp_path), 1, workers=1)
    with pytest.raises(ValueError, match=r"notes.txt is a file"):
        phantom.write_phantoms(str(tmp_path / "notes.txt"), 1, workers=1)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_smooth_noise_has_unit_variance_and_is_smooth():
    noise = phantom.smooth_noise(np.random.default_rng(0), (60, 70, 80), 4)
    assert noise.shape == (60, 70, 80) and noise.dtype == np.float32
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert np.abs(np.diff(noise, axis=2)).std() < 0.3


def test_smooth_noise_reproduces_a_constant():
    class Ones:
        def standard_normal(self, shape, dtype):
            return np.ones(shape, dtype=dtype)

    noise = phantom.smooth_noise(Ones(), (7, 8, 9), 3)  # B-spline weights sum to 1
    assert np.allclose(noise, 0.479**-1.5, rtol=1e-5)


def test_script_refuses_zero_patients(tmp_path, monkeypatch, capsys):
    import runpy

    script = str(REPOSITORY / "scripts" / "brats_phantom.py")
    monkeypatch.setattr(sys, "argv", [script, "--out_dir", str(tmp_path / "o"), "--patients", "0"])
    main = runpy.run_path(script)["main"]
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: --patients 0")
    assert os.listdir(tmp_path) == []


def test_palette_covers_the_labels():
    assert {brats.LABEL_CODES[label] for label in (0, 1, 2, 4)} == set(brats.PALETTE)
