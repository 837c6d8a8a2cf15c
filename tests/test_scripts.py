"""The scripts as a user runs them."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion import checkpoint, logger
from improved_diffusion.evaluation import distribution, validity

ROOT = Path(__file__).parent.parent
# Tests run side by side, and networks this small are faster on one thread.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
NETWORK = (
    "--image_size 32 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1 "
    "--attention_resolutions 16 --num_heads 1 --diffusion_steps 20"
).split()
TRAIN = [*NETWORK, *"--batch_size 4 --log_interval 1 --ema_rate 0.9 --num_workers 0".split()]


def write_slices(folder, count=6, size=32, channels=("Seg", "T1CE")):
    """A slice folder without dataset.json: a disc as the brain, a smaller one as the tumour."""
    rows, columns = np.mgrid[:size, :size] - size / 2
    for i in range(count):
        brain = np.hypot(rows, columns) < size / 3 + i % 3
        tumour = np.hypot(rows - 4, columns - i) < 4
        for channel in channels:
            levels = tumour * 102 if channel == "Seg" else brain * 120 + tumour * 80
            path = folder / channel / f"Subject_001_slice_{i + 1}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    return write_slices(tmp_path_factory.mktemp("data") / "slices")


@pytest.fixture
def script(monkeypatch, capfd):
    """Run a script of the project in this process: exit status, output and error output."""

    def run(name, *argv):
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        status = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        return status, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def trained(slices, tmp_path_factory):
    """A run of four steps, as a process of its own."""
    out = tmp_path_factory.mktemp("trained") / "run"
    command = [sys.executable, ROOT / "scripts/image_train.py", "--data_dir", slices]
    command += [*TRAIN, "--channels", "T1CE,Seg", "--out_dir", out, "--max_steps", "4"]
    command += ["--sample_interval", "2", "--sample_respacing", "5"]
    subprocess.run(command, check=True, capture_output=True, timeout=120, env=ENVIRONMENT)
    return out


def refused(result, *parts):
    """One sentence on standard error and exit status 2."""
    status, _, error = result
    lines = [line for line in error.splitlines() if line.strip()]
    assert status == 2
    assert lines[-1].startswith(("error: ", "image_")), lines
    assert "Traceback" not in error
    for part in parts:
        assert str(part) in error, error


def test_files_of_a_run(trained):
    assert sorted(path.name for path in trained.iterdir() if path.name != "tb") == [
        ".lock",
        "ema_0.9_000004.pt",
        "log.txt",
        "model000004.pt",
        "opt000004.pt",
        "previews",
        "progress.csv",
    ]
    assert sorted(os.listdir(trained / "previews")) == ["step000002.png", "step000004.png"]
    rows = logger.read_progress(str(trained / "progress.csv"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    weights = checkpoint.load_weights(str(trained / "ema_0.9_000004.pt"))
    about = checkpoint.metadata_of(weights)
    assert (about["step"], about["channels"], about["ema_rate"]) == (4, ["Seg", "T1CE"], 0.9)
    assert about["flags"]["in_channels"] == 2
    assert str(trained) not in json.dumps(about)


def test_sampling_needs_no_model_flag(trained, script, tmp_path):
    out = tmp_path / "samples"
    argv = ["--model_path", trained / "ema_0.9_000004.pt", "--num_samples", 5, "--seed", 3]
    argv += ["--timestep_respacing", 5]
    status, _, _ = script("image_sample", *argv, "--batch_size", 5, "--sample_dir", out)
    assert status == 0
    samples = np.load(out / "samples_5x32x32x2.npz")["arr_0"]
    assert (samples.dtype, samples.shape) == (np.uint8, (5, 32, 32, 2))
    for i in range(5):
        image = np.asarray(Image.open(out / f"T1CE/sample_{i:06d}_T1ce.png"))
        np.testing.assert_array_equal(image, samples[i, :, :, 1])
        mask = np.asarray(Image.open(out / f"Seg/sample_{i:06d}_seg.png"))
        assert set(np.unique(mask)) <= {0, 51, 102, 204}
    record = json.loads((out / "samples.json").read_text())
    assert record["channels"] == ["Seg", "T1CE"]
    assert record["checkpoint_sha256"] == checkpoint.sha256(str(trained / "ema_0.9_000004.pt"))
    assert (record["flags"]["seed"], record["step"]) == (3, 4)
    assert record["seconds_per_sample"] > 0

    other = tmp_path / "smaller_batches"
    assert script("image_sample", *argv, "--batch_size", 2, "--sample_dir", other)[0] == 0
    again = np.load(other / "samples_5x32x32x2.npz")["arr_0"].astype(int)
    assert np.abs(again - samples).max() <= 1  # another batch rounds differently

    ddim = tmp_path / "ddim"
    argv += ["--use_ddim", "True", "--batch_size", 5, "--sample_dir", ddim]
    assert script("image_sample", *argv)[0] == 0
    assert (np.load(ddim / "samples_5x32x32x2.npz")["arr_0"] != samples).any()


def test_a_run_is_continued_not_overwritten(trained, slices, script, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    before = (out / "progress.csv").read_bytes()
    argv = ["--data_dir", slices, *TRAIN, "--out_dir", out, "--max_steps", 6]
    refused(script("image_train", *argv), "already holds a run", "--resume_checkpoint latest")
    assert (out / "progress.csv").read_bytes() == before
    # Neither the network nor the rates, the batch or the data need be named again.
    argv = ["--out_dir", out, "--resume_checkpoint", "latest", "--max_steps", 6]
    status, output, _ = script("image_train", *argv)
    assert status == 0
    assert "at step 4" in output and "finished at step 6" in output
    assert (out / "progress.csv").read_bytes().startswith(before)
    assert checkpoint.complete_steps(str(out)) == [4, 6]
    argv[-1] = 4
    assert "finished at step 6" in script("image_train", *argv)[1]


def test_a_damaged_checkpoint_is_passed_over(trained, slices, script, tmp_path):
    """Named, put aside, and the one before it continued."""
    out = tmp_path / "run"
    argv = ["--data_dir", slices, *TRAIN, "--out_dir", out, "--save_interval", 2]
    assert script("image_train", *argv, "--max_steps", 4)[0] == 0
    expected = (out / "model000004.pt").read_bytes(), (out / "progress.csv").read_bytes()
    for name in ("opt000004.pt", "model000004.pt"):
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 1
        (out / name).write_bytes(content)
        model = out / "model000004.pt"
        refused(script("image_train", *argv, "--resume_checkpoint", model), name)
        again = [*argv, "--resume_checkpoint", "latest", "--max_steps", 4]
        status, output, _ = script("image_train", *again)
        assert status == 0
        assert f"not continued from: {out / name}" in output
        assert "at step 2" in output and f"moved {name}, newer than step 2" in output
        assert ((out / "model000004.pt").read_bytes(), (out / "progress.csv").read_bytes()) == (
            expected
        )
    for path in out.glob("model*.pt"):
        path.write_bytes(b"")
    refused(script("image_train", *again), "no checkpoint that can be continued", "model000004.pt")


def test_a_run_begins_anew_where_nothing_was_saved(slices, script, tmp_path):
    """As the same command says that would continue it."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "progress.csv").write_text("loss,step\n0.5,1\n")
    argv = ["--data_dir", slices, *TRAIN, "--out_dir", out, "--max_steps", 2]
    refused(script("image_train", *argv), "already holds a run")
    assert script("image_train", *argv, "--resume_checkpoint", "latest")[0] == 0
    assert [row["step"] for row in logger.read_progress(str(out / "progress.csv"))] == [1, 2]
    assert (out / "superseded" / "progress.csv").read_text() == "loss,step\n0.5,1\n"


def test_a_restart_does_not_forget_where_the_run_began(
    trained, slices, script, tmp_path, monkeypatch
):
    """torchrun repeats the command line: from the folder's own checkpoint, once there is one."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    out = tmp_path / "run"
    argv = ["--data_dir", slices, *TRAIN, "--out_dir", out, "--save_interval", 1]
    argv += ["--resume_checkpoint", trained / "model000004.pt"]
    assert "at step 4" in script("image_train", *argv, "--max_steps", 5)[1]
    assert "at step 5" in script("image_train", *argv, "--max_steps", 6)[1]
    for path in out.glob("*.pt"):
        path.unlink()
    refused(script("image_train", *argv, "--max_steps", 6), out, "already holds a run")


def test_the_disk_need_is_told_at_the_start(slices, script, tmp_path, monkeypatch):
    """Of 2 channels, 32 wide: 318,692 parameters, an average and two moments, 4 bytes each."""
    room = 10**9
    monkeypatch.setattr(checkpoint, "free_bytes", lambda folder: room)
    out = tmp_path / "run"
    base = ["--data_dir", slices, *TRAIN, "--out_dir", out]
    argv = [*base, "--max_steps", 4, "--save_interval", 1]
    assert (
        "a checkpoint takes 5.1 MB, 4 of them 20.4 MB; 1.0 GB are free"
        in (script("image_train", *argv)[1])
    )
    argv[-3], room = 9, 16 * 10**6
    output = script("image_train", *argv, "--resume_checkpoint", "latest")[1]
    assert "5 of them 25.5 MB; 16.0 MB are free, which is NOT ENOUGH: see --keep" in output
    argv = [*base[:-1], tmp_path / "new", "--max_steps", 9, "--save_interval", 1]
    output = script("image_train", *argv, "--keep_checkpoints", 2)[1]
    assert "a checkpoint takes 5.1 MB, 3 of them 15.3 MB; 16.0 MB are free\n" in output
    assert checkpoint.complete_steps(str(tmp_path / "new")) == [8, 9]
    room = 10**6
    out = tmp_path / "no room"
    argv = [*base[:-1], out]
    refused(script("image_train", *argv), out, "a checkpoint takes 5.1 MB", "1.0 MB are free")
    assert not out.exists()


def test_two_trainings_in_one_folder(trained, slices, script, tmp_path):
    """The second is refused and changes nothing; the lock goes with the process that holds it."""
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    holder = "import sys; from improved_diffusion import checkpoint as c\n"
    holder += "with c.exclusive(sys.argv[1]): print(1, flush=True); sys.stdin.read()"
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", holder, out],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    process.stdout.readline()
    files = {path: path.read_bytes() for path in out.glob("*.*")}
    argv = ["--out_dir", out, "--resume_checkpoint", "latest", "--max_steps", 5]
    refused(script("image_train", *argv), out, "another process is training")
    assert {path: path.read_bytes() for path in out.glob("*.*")} == files
    process.kill()
    process.wait()
    assert script("image_train", *argv)[0] == 0


def test_evaluations_during_training_are_those_of_the_samples(slices, script, tmp_path):
    """Of the average, drawn as image_sample.py draws them, against the training slices."""
    out = tmp_path / "run"
    argv = ["--data_dir", slices, *TRAIN, "--out_dir", out, "--max_steps", 5, "--log_interval", 2]
    assert script("image_train", *argv, "--eval_interval", 5, "--eval_samples", 6)[0] == 0
    rows = logger.read_progress(str(out / "progress.csv"))
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert "loss" not in rows[2] and "eval_distance" not in rows[1]
    found = {name: value for name, value in rows[2].items() if name.startswith("eval_")}

    sample = ["--model_path", out / "ema_0.9_000005.pt", "--num_samples", 6]
    assert script("image_sample", *sample, "--sample_dir", tmp_path / "samples")[0] == 0
    samples = np.load(tmp_path / "samples/samples_6x32x32x2.npz")["arr_0"]
    names = ["Seg", "T1CE"]
    real = np.stack(
        [
            np.stack(
                [
                    np.asarray(Image.open(slices / name / f"Subject_001_slice_{i + 1}.png"))
                    for name in names
                ],
                axis=-1,
            )
            for i in range(6)
        ]
    )
    measured = validity.measure(samples, names)
    flags = validity.check(measured, validity.calibrate(validity.measure(real, names)))
    features = distribution.scale(distribution.features(real), distribution.features(samples))
    expected = {
        "eval_valid_share": 1 - flags.any().mean(),
        "eval_broken_share": flags.broken(names).mean(),
        "eval_background_level": validity.background_level(samples, names).mean(axis=0).max(),
        "eval_off_code_share": validity.off_code_share(samples, names).mean(),
        "eval_distance": distribution.kernel_distance(*features)["value"],
    }
    if not flags.broken(["Seg"]).all():
        whole = ~flags.broken(["Seg"])
        expected["eval_empty_mask_share"] = validity.empty_mask(samples, names)[whole].mean()
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-3)

    again = ["--out_dir", out, "--resume_checkpoint", "latest", "--max_steps", 6]
    assert script("image_train", *again)[0] == 0  # the interval is continued, too


def test_numbers_that_explode_end_the_run_with_its_images_named(slices, script, tmp_path):
    out = tmp_path / "run"
    argv = ["--data_dir", slices, *TRAIN, "--out_dir", out, "--lr", 1e30, "--max_steps", 40]
    result = script("image_train", *argv, "--max_skipped_steps", 3)
    refused(result, "3 steps in a row", "not finite", "T1CE/Subject_001_slice_", "--grad_clip")
    assert checkpoint.complete_steps(str(out))


def test_contradictions_are_refused(trained, slices, script, tmp_path):
    model = trained / "model000004.pt"
    argv = ["--data_dir", slices, "--out_dir", tmp_path / "new", "--resume_checkpoint", model]
    refused(script("image_train", *argv, "--num_res_blocks", 2), "--num_res_blocks 1")
    refused(script("image_train", *argv, "--channels", "T1CE"), "trained on Seg,T1CE")
    sample = ["--model_path", model, "--sample_dir", tmp_path / "new", "--num_samples", 1]
    refused(script("image_sample", *sample, "--predict_v", "True"), "--predict_v False")
    refused(script("image_sample", *sample, "--channels", "T1,T2"), "contradicts the checkpoint")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--channels", "T1CE,Foo"], ["Foo", "FLAIR, Seg, T1, T1CE, T2"]),
        (["--channels", "T1CE,Seg", "--in_channels", 3], ["--in_channels 3", "T1CE,Seg"]),
        (["--in_channels", 4], ["--in_channels 4", "--channels"]),
        (["--channels", "T1,Seg"], ["T1"]),
        (["--batch_size", 7], ["--batch_size 7", "6"]),
        (["--batch_size", 0], ["--batch_size 0"]),
        (["--class_cond", "True", "--num_classes", 1], ["--num_classes 1", "2 classes"]),
        (["--num_classes", 2], ["--num_classes 2", "--class_cond False"]),
        (["--log_interval", 0], ["--log_interval 0"]),
        (["--grad_clip", -1], ["--grad_clip -1"]),
        (["--warmup_steps", -1], ["--warmup_steps -1"]),
        (["--max_skipped_steps", 0], ["--max_skipped_steps 0"]),
        (["--eval_samples", 2], ["--eval_samples 2"]),
        (["--keep_checkpoints", 1], ["--keep_checkpoints 1"]),
        (["--schedule_sampler", "foo"], ["--schedule_sampler foo"]),
        (["--ema_rate", "2"], ["--ema_rate 2"]),
        (["--sample_respacing", "x"], ["x"]),
        (["--split", "test"], ["test"]),
        (["--learn_sigma", "maybe"], ["--learn_sigma", "True or False"]),
        (["--learning_rate", "1"], ["--learning_rate"]),
        (["--predict_v", "True", "--predict_xstart", "True"], ["--predict_v"]),
        (["--resume_checkpoint", "nowhere/model000001.pt"], ["nowhere/model000001.pt"]),
        (["--data_dir", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_training_flags(slices, script, tmp_path, argv, parts):
    out = tmp_path / "run"
    result = script("image_train", "--data_dir", slices, *TRAIN, "--out_dir", out, *argv)
    refused(result, *parts)
    assert not out.exists()


def test_bad_slices(script, tmp_path):
    slices = write_slices(tmp_path / "slices")
    out = tmp_path / "run"
    victim = slices / "Seg" / "Subject_001_slice_3.png"
    original = victim.read_bytes()

    def attempt():
        argv = ["--data_dir", slices, *TRAIN, "--out_dir", out, "--max_steps", 3]
        return script("image_train", *argv)

    victim.unlink()
    refused(attempt(), "Subject_001_slice_3")
    Image.new("RGB", (32, 32)).save(victim)
    refused(attempt(), victim, "RGB")
    Image.new("L", (32, 48)).save(victim)
    refused(attempt(), victim)
    assert not out.exists()
    victim.write_bytes(original[: len(original) // 2])
    refused(attempt(), victim, "truncated")


def test_output_that_cannot_be_written(trained, slices, script, tmp_path):
    """A file stands where a folder is needed; permissions don't bind a superuser."""
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    refused(script("image_train", "--data_dir", slices, *TRAIN, "--out_dir", out), out)
    model = trained / "model000004.pt"
    refused(
        script("image_sample", "--model_path", model, "--sample_dir", out), f"--sample_dir {out}"
    )


def test_bad_sampling_flags(trained, script, tmp_path):
    out = tmp_path / "samples"
    model = trained / "ema_0.9_000004.pt"
    base = ["--model_path", model, "--sample_dir", out]
    refused(script("image_sample"), "--model_path")
    refused(script("image_sample", *base, "--timestep_respacing", 2000), "2000", "20")
    refused(script("image_sample", *base, "--num_samples", 0), "--num_samples 0")
    refused(script("image_sample", "--model_path", trained / "opt000004.pt"), "opt000004.pt")
    cut = tmp_path / "ema_0.9_000004.pt"
    cut.write_bytes(model.read_bytes()[:5000])
    refused(script("image_sample", "--model_path", cut, "--sample_dir", out), cut, "truncated")
    bare = tmp_path / "model000001.pt"
    torch.save(dict(checkpoint.load_weights(str(model))), bare)
    result = script("image_sample", "--model_path", bare, "--sample_dir", out, "--in_channels", 2)
    refused(result, bare, "holds no flags", "--image_size, --diffusion_steps", "--num_heads")
    assert sorted(os.listdir(tmp_path)) == ["ema_0.9_000004.pt", "model000001.pt"]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.1)


def test_from_scans_to_samples(tmp_path):
    """Prepare, train in the background, stop, continue, sample, train on the samples."""
    work = tmp_path / "my scans"
    work.mkdir()
    environment = {**ENVIRONMENT, "PYTHON": sys.executable, "RUN_SCRIPT_WATCH": "1"}

    def call(*command):
        return subprocess.run(
            [str(part) for part in command],
            cwd=work,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def python(name, *argv):
        return call(sys.executable, ROOT / "scripts" / f"{name}.py", *argv)

    python("brats_phantom", "--out_dir", "cases", "--patients", 3, "--seed", 1)
    python("brats_prepare", "--brats_dir", "cases", "--out_dir", "slices")
    dataset = json.loads((work / "slices/dataset.json").read_text())
    assert [case["split"] for case in dataset["cases"]].count("test") == 1

    train = ["--data_dir", "slices", "--channels", "FLAIR,T1CE,Seg", *TRAIN]
    # A loader's process gets the signal to the group too, and must not end before the step does.
    train += ["--max_steps", 40, "--sample_interval", 0, "--num_workers", 1]
    script = ROOT / "scripts/image_train.py"
    call(ROOT / "run_script.sh", script, *train, "--out_dir", "run one", "--save_interval", 10)
    progress = work / "run one/progress.csv"
    wait_for(lambda: progress.exists() and progress.read_text().count("\n") > 6)
    call(ROOT / "kill_pid.sh")
    output = (work / "output.txt").read_text()
    assert "SIGTERM: finishing this step" in output
    assert "--resume_checkpoint latest" in output
    assert not (work / "PID_current.txt").exists()
    steps = checkpoint.complete_steps(str(work / "run one"))
    rows = logger.read_progress(str(progress))
    assert 6 <= steps[-1] == rows[-1]["step"] < 40

    python("image_train", *train, "--out_dir", "run one", "--resume_checkpoint", "latest")
    python("image_train", *train, "--out_dir", "run two")
    for name in ("model000040.pt", "ema_0.9_000040.pt"):
        one, two = (
            checkpoint.load_weights(str(work / run / name)) for run in ("run one", "run two")
        )
        assert all(torch.equal(one[key], two[key]) for key in two)
    assert progress.read_bytes() == (work / "run two/progress.csv").read_bytes()

    python("image_sample", "--model_path", "run one/ema_0.9_000040.pt", "--num_samples", 4)
    assert sorted(path.name for path in (work / "Samples").iterdir()) == [
        "FLAIR",
        "Seg",
        "T1CE",
        "grid.png",
        "samples.json",
        "samples_4x32x32x3.npz",
    ]
    again = ["--data_dir", "Samples", "--channels", "FLAIR,T1CE,Seg", *TRAIN]
    python("image_train", *again, "--max_steps", 1, "--out_dir", "third")
    assert checkpoint.complete_steps(str(work / "third")) == [1]


@pytest.mark.parametrize(
    "name",
    [
        *("image_train", "image_sample", "image_nll", "super_res_train", "super_res_sample"),
        *("brats_prepare", "brats_phantom", "ema_posthoc"),
    ],
)
def test_every_flag_is_explained(script, name):
    status, output, _ = script(name, "--help")
    assert status == 0
    listed = " ".join(output.split("options:")[1].split())
    entries = re.split(r"\s(?=--\w+ [A-Z{])", listed)[1:]
    assert len(entries) > 3
    for entry in entries:
        _flag, _values, *explanation = entry.split()
        assert len(explanation) >= 2 and explanation[0] != "(default:", entry
