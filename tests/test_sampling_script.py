"""What image_sample.py does with its flags, signals and fellow processes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import untrained
from test_samples import contents

from improved_diffusion import cli, sampling, sampling_script
from improved_diffusion.nifti_export import BRATS_GEOMETRY
from improved_diffusion.script_util import create_model_and_diffusion

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "scripts" / "image_sample.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model000003.pt"
    return untrained.save(path, ["Seg", "T1CE"])


@pytest.fixture
def sample(model_path, monkeypatch, capfd):
    """Run the script in this process: its record, or its error."""

    def run(out, *argv):
        words = ["image_sample.py", "--model_path", model_path, "--sample_dir", str(out)]
        monkeypatch.setattr(sys, "argv", [*words, *map(str, argv)])
        try:
            cli.run(lambda: sampling_script.sample("draws"))
        except SystemExit as end:
            assert end.code == 2
            return capfd.readouterr().err.strip().splitlines()[-1]
        return json.loads((Path(out) / "samples.json").read_text())

    return run


def command(model_path, out, *argv):
    return [SCRIPT, "--model_path", model_path, "--sample_dir", str(out), *map(str, argv)]


@pytest.mark.parametrize(
    ("argv", "sampler", "evaluations"),
    [
        ("", sampling.DEFAULT_SAMPLER, sampling.DEFAULT_STEPS),
        ("--timestep_respacing 10", "ancestral", 10),
        ("--timestep_respacing 50", "ancestral", 50),
        ("--use_ddim True --sampling_steps 5", "ddim", 5),
        ("--sampler heun --sampling_steps 4 --timestep_spacing karras", "heun", 7),
        ("--sampler unipc --timestep_respacing 10", "unipc", 10),
    ],
)
def test_flags_choose_the_sampler(sample, tmp_path, argv, sampler, evaluations):
    record = sample(tmp_path / "out", "--num_samples", 1, *argv.split())
    assert (record["sampler"], record["evaluations"]) == (sampler, evaluations)


def test_samplers_make_different_samples_from_the_same_noise(sample, tmp_path):
    found = {}
    for sampler in sampling.SAMPLERS:
        sample(tmp_path / sampler, "--sampler", sampler, "--num_samples", 2, "--sampling_steps", 8)
        found[sampler] = np.load(tmp_path / sampler / "samples_2x16x16x2.npz")["arr_0"]
    assert len({levels.tobytes() for levels in found.values()}) == len(sampling.SAMPLERS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--sampler euler", "error: --sampler euler: choose from ancestral, ddim, heun, dpmpp_2m,"),
        ("--sampler heun --use_ddim True", "error: --use_ddim True contradicts --sampler heun"),
        ("--sampling_steps 51", "error: --sampling_steps 51: the process has 50 timesteps"),
        ("--timestep_spacing even", "error: --timestep_spacing even: choose from uniform"),
        ("--batch_size 0", "error: --batch_size 0: give a number of samples, 1 or more, or auto"),
        ("--batch_size many", "error: --batch_size many: give a number"),
        ("--precision fp8", "error: --precision fp8: choose from auto, fp32"),
        ("--compile yes", "error: --compile yes: choose from auto, on, off"),
        ("--format npz,jpg", "error: --format npz,jpg: choose one or more of npz,png,nifti"),
        ("--num_samples 0", "error: --num_samples 0: give 1 or more"),
    ],
)
def test_wrong_flags(sample, tmp_path, argv, message):
    assert sample(tmp_path / "out", *argv.split()).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_stays_close(sample, tmp_path):
    for name in ("fp32", "bf16"):
        record = sample(tmp_path / name, "--precision", name, "--num_samples", 4)
        assert record["precision"] == name
    full, short = (
        np.load(tmp_path / name / "samples_4x16x16x2.npz")["arr_0"].astype(int)
        for name in ("fp32", "bf16")
    )
    difference = np.abs(full - short)
    assert 0 < difference.mean() < 3


def test_automatic_batch_size(sample, tmp_path, monkeypatch):
    assert sample(tmp_path / "few", "--batch_size", "auto", "--num_samples", 3)["batch_size"] == 3
    many = ("--batch_size", "auto", "--num_samples", 20, "--sampling_steps", 2)
    assert sample(tmp_path / "many", *many)["batch_size"] == sampling_script.MOST_ON_CPU

    # What a run began with is kept, also where less memory is free when it is continued.
    interrupt(sample, monkeypatch, tmp_path / "out", *many)
    monkeypatch.setattr(sampling_script, "free_memory", lambda device: 0)
    assert sample(tmp_path / "out", *many)["batch_size"] == sampling_script.MOST_ON_CPU
    assert sample(tmp_path / "small", *many)["batch_size"] == 1


def test_a_batch_that_does_not_fit_is_drawn_in_parts(sample, tmp_path, monkeypatch):
    flags = ("--num_samples", 7, "--batch_size", 5, "--sampling_steps", 2)
    sample(tmp_path / "whole", *flags)
    original, sizes = sampling_script.draw, []

    def small(model, diffusion, indices, *args, **kwargs):
        sizes.append(len(indices))
        if len(indices) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, diffusion, indices, *args, **kwargs)

    monkeypatch.setattr(sampling_script, "draw", small)
    sample(tmp_path / "parts", *flags)
    assert sizes == [5, 3, 2, 2, 1, 2]  # halved until it fits, and then no more tried
    whole, parts = (
        np.load(tmp_path / name / "samples_7x16x16x2.npz")["arr_0"].astype(int)
        for name in ("whole", "parts")
    )
    assert np.abs(whole - parts).max() <= 1


def test_nifti_without_a_known_geometry(sample, tmp_path):
    record = sample(tmp_path / "out", "--format", "nifti", "--num_samples", 1)
    assert record["geometry"] == "BraTS default"
    image = nib.load(tmp_path / "out/nifti/sample_000000/sample_000000_seg.nii.gz")
    assert image.shape == (16, 16, 1)
    assert image.header.get_zooms() == (16, 16, 1)
    assert set(np.unique(np.asarray(image.dataobj))) <= {0, 1, 2, 4}
    corner = image.affine @ [-0.5, -0.5, 0, 1]
    expected = np.array(BRATS_GEOMETRY["affine"]) @ [-8.5, -8.5, 77, 1]
    np.testing.assert_allclose(corner, expected)


def test_stopped_by_a_signal_and_continued(model_path, tmp_path):
    """The command that it prints ends with the files of an undisturbed run."""
    argv = ("--num_samples", 24, "--batch_size", 2, "--sampling_steps", 30)
    whole = command(model_path, tmp_path / "whole", *argv)
    subprocess.run([sys.executable, *whole], check=True, capture_output=True, env=ENVIRONMENT)

    process = subprocess.Popen(
        [sys.executable, *command(model_path, tmp_path / "out", *argv)],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    marks = tmp_path / "out.partial" / ".work" / "complete"
    deadline = time.monotonic() + 60
    while not (marks.exists() and any(marks.read_bytes())):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    found = re.search(r"SIGTERM: (\d+) of 24 samples are kept in \S+; continue with: (.*)", output)
    assert 2 <= int(found[1]) < 24
    words = found[2].replace("python", sys.executable, 1)
    result = subprocess.run(
        words, shell=True, check=True, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert f"continuing: {found[1]} of 24 samples are there" in result.stdout
    assert_equal_but_for_its_place(tmp_path / "out", tmp_path / "whole")


def assert_equal_but_for_its_place(out, whole):
    own, other = contents(out), contents(whole)
    for record in (own["samples.json"], other["samples.json"]):
        del record["flags"]["sample_dir"]
    assert own == other


def interrupt(sample, monkeypatch, out, *argv):
    """Begin samples, of which the first batch gets complete."""
    original = sampling_script.draw

    def interrupted(*args, **kwargs):
        if args[2].start:
            raise OSError("the power failed")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sampling_script, "draw", interrupted)
        assert sample(out, *argv) == "error: the power failed"


def test_what_a_checkpoint_does_not_tell_is_kept_too(sample, tmp_path, monkeypatch):
    """Without flags in the file, they determine the samples from the command line."""
    path = str(tmp_path / "plain.pt")
    model, _ = create_model_and_diffusion(**untrained.FLAGS)
    torch.save(dict(model.state_dict()), path)
    names = ("image_size", "diffusion_steps", "num_heads", "rescale_timesteps")
    argv = [word for name in names for word in (f"--{name}", untrained.FLAGS[name])]
    argv += ["--model_path", path, "--num_samples", 4, "--batch_size", 2, "--sampling_steps", 2]
    out = tmp_path / "out"
    interrupt(sample, monkeypatch, out, *argv, "--noise_schedule", "linear")
    error = sample(out, *argv, "--noise_schedule", "cosine")
    assert "were begun with --noise_schedule linear, not cosine; give the same flags" in error
    assert sample(out, *argv, "--noise_schedule", "linear")["batch_size"] == 2


def torchrun(model_path, out, *argv):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc_per_node=2", *command(model_path, out, *argv)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
    )


def test_two_processes_make_the_files_of_one(model_path, sample, tmp_path, monkeypatch):
    argv = ("--num_samples", 7, "--batch_size", 2, "--sampling_steps", 3)
    argv += ("--format", "npz,png,nifti")
    one = command(model_path, tmp_path / "one", *argv)
    subprocess.run([sys.executable, *one], check=True, capture_output=True, env=ENVIRONMENT)
    interrupt(sample, monkeypatch, tmp_path / "two", *argv)  # begun by one process
    result = torchrun(model_path, tmp_path / "two", *argv)
    assert result.returncode == 0, result.stderr
    assert "continuing: 2 of 7 samples are there" in result.stdout
    assert result.stdout.count("wrote 7 samples") == 1
    assert_equal_but_for_its_place(tmp_path / "two", tmp_path / "one")

    # What is wrong is said once, and nobody waits for anybody.
    result = torchrun(model_path, tmp_path / "two", *argv, "--sampler", "euler")
    assert result.returncode != 0
    assert result.stderr.count("error: --sampler euler: choose from") == 1
    assert "sampling_script.py" not in result.stderr  # in a traceback


def test_mpiexec_needs_a_library(sample, tmp_path, monkeypatch):
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    monkeypatch.setenv("PMI_SIZE", "2")
    with contextlib.suppress(KeyError):
        monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    error = sample(tmp_path / "out")
    assert "no MPI library: pip install mpich" in error
    assert "or use torchrun --nproc_per_node=2" in error
