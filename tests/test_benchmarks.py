"""The benchmark commands run and report what they say; how fast, no test can tell."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import untrained
from PIL import Image

ROOT = Path(__file__).parent.parent


def run(module, *argv):
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_step_beside_a_reference(tmp_path):
    """Our own package in another folder stands in for the reference, whose interface it has."""
    shutil.copytree(ROOT / "improved_diffusion", tmp_path / "improved_diffusion")
    shutil.copy(ROOT / "brats_dataset.py", tmp_path)
    output = run(
        "train_step",
        *("--reference", tmp_path, "--rounds", 2, "--steps", 1, "--batch_size", 2),
        *("--image_size", 32, "--num_channels", 32, "--num_res_blocks", 1),
        *("--channel_mult", "1,1", "--diffusion_steps", 20, "--precision", "bf16"),
    )
    assert "32x32, 2 channels, batch 2, bf16, " in output
    rows = dict(re.findall(r"^(ours|reference) +(.*)$", output, re.MULTILINE))
    assert list(rows) == ["ours", "reference"]
    for row in rows.values():
        seconds, rate, peak, first, ratio = map(float, row.split())
        assert abs(rate * seconds / 2 - 1) < 0.02 or seconds < 0.01  # both are rounded
        assert peak > 0.1 and first > 0 and ratio > 0
    assert float(rows["ours"].split()[-1]) == 1
    assert re.search(r"\d+% utilisation", output)


def test_reading_slices(tmp_path):
    for channel in ("Seg", "T1CE"):
        (tmp_path / channel).mkdir()
        for i in range(4):
            levels = np.full((32, 32), 10 * i, np.uint8)
            Image.fromarray(levels).save(tmp_path / channel / f"Subject_001_slice_{i}.png")
    output = run(
        "data_loading",
        *("--data_dir", tmp_path, "--channels", "T1CE,Seg", "--image_size", 32),
        *("--batch_size", 2, "--num_workers", 0, "--rate", 20, "--seconds", 0.5),
    )
    rows = dict(re.findall(r"^(decoded|packed) +(.*)$", output, re.MULTILINE))
    for row in rows.values():
        speed, waiting = row.replace("%", "").split()
        # Far faster than 20 images a second, so hardly any waiting.
        assert float(speed) > 100 and float(waiting) < 25
    assert sorted(rows) == ["decoded", "packed"]


def test_drawing_beside_a_reference(tmp_path):
    """As above; the reference takes twice as many steps."""
    shutil.copytree(ROOT / "improved_diffusion", tmp_path / "improved_diffusion")
    shutil.copy(ROOT / "brats_dataset.py", tmp_path)
    output = run(
        "sampling_speed",
        *("--reference", tmp_path, "--rounds", 2, "--batch_size", 2, "--sampler", "heun"),
        *("--sampling_steps", 3, "--reference_steps", 10, "--precision", "bf16"),
        *("--image_size", 32, "--num_channels", 32, "--num_res_blocks", 1),
        *("--channel_mult", "1,1", "--diffusion_steps", 20),
    )
    assert "32x32, 2 channels, batch 2, bf16, " in output
    rows = dict(re.findall(r"^(ours|reference) +(.*)$", output, re.MULTILINE))
    own, other = ([float(value) for value in row.split()] for row in rows.values())
    assert (own[0], other[0]) == (5, 10)  # evaluations
    assert own[4:] == [1, 1]
    assert other[4] > 0 and abs(other[5] / (other[4] / 2) - 1) < 0.05


def test_quality_of_samplers(tmp_path):
    """The base is worse than itself in nothing; the floor has no steps."""
    model_path = untrained.save(tmp_path / "model000003.pt", ["FLAIR", "Seg"])
    rng = np.random.default_rng(0)
    for channel in ("FLAIR", "Seg"):
        (tmp_path / "slices" / channel).mkdir(parents=True)
        for subject, i in itertools.product((1, 2), range(4)):
            levels = np.zeros((32, 32), np.uint8)
            levels[8:24, 8:24] = 102 if channel == "Seg" else rng.integers(60, 200, (16, 16))
            name = f"Subject_00{subject}_slice_{i}.png"
            Image.fromarray(levels).save(tmp_path / "slices" / channel / name)
    out = tmp_path / "out"
    argv = ("--model_path", model_path, "--data_dir", tmp_path / "slices")
    argv += ("--out_dir", out, "--num_samples", 4, "--sets")
    output = run("sampling_quality", *argv, "ancestral:20 heun:3:logsnr")
    rows = json.loads((out / "quality.json").read_text())
    assert [(row["sampler"], row["evaluations"]) for row in rows] == [
        ("real", 0),
        ("ancestral", 20),
        ("heun", 5),
    ]
    assert rows[0]["off_code_share"]["value"] == 0 < rows[1]["off_code_share"]["value"]
    assert rows[1]["distance"]["value"] > 10 * abs(rows[0]["distance"]["value"])
    assert rows[1]["worse"] == []
    assert len(re.findall(r"^\| (real|ancestral|heun) \|", output, re.MULTILINE)) == 3
    assert Image.open(out / "quality.png").size == (800, 450)
    levels = np.load(out / "heun_3_logsnr.npy")
    assert (levels.shape, levels.dtype) == ((4, 16, 16, 2), np.uint8)
