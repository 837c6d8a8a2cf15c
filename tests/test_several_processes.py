"""Training on two processes, started by torchrun and by mpiexec."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soak
import together
import torch

from improved_diffusion import checkpoint, logger

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
MPIEXEC = Path(sys.executable).with_name("mpiexec")
LAUNCHERS = {"torchrun": TORCHRUN, "mpiexec": [MPIEXEC, "-n", "2", sys.executable]}
TRAIN = [*soak.FLAGS, *"--batch_size 2 --num_workers 0 --eval_interval 0".split()]
RATES = (0.9, 0.99)

needs_mpi = pytest.mark.skipif(
    not MPIEXEC.exists(), reason="no MPI library: pip install mpich (the extra 'mpi')"
)


def launch(launcher, *argv, output):
    """Start two processes; their output goes into a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with open(output, "wb") as file:
        return subprocess.Popen(
            [str(word) for word in [*launcher, *argv]],
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "slices"
    soak.write_slices(folder)
    return folder


def train(slices, run, *argv, launcher=TORCHRUN, wait=True):
    command = [soak.SCRIPT, "--data_dir", slices, "--out_dir", run, *TRAIN, *argv]
    process = launch(launcher, *command, output=run.with_suffix(".txt"))
    if wait:
        process.wait(timeout=120)
    return process


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)


def assert_equal_runs(one, two, step):
    names = [checkpoint.model_name(step), checkpoint.opt_name(step), "progress.csv"]
    for name in [*names, *(checkpoint.ema_name(rate, step) for rate in RATES)]:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def close(a, b, tolerance=1e-5):
    return (a - b).norm() <= tolerance * b.norm()


def test_two_processes_compute_what_one_does(tmp_path):
    """Of a batch of 8 they have 3 and 5 images, in microbatches of 2."""
    process = launch(TORCHRUN, together.__file__, tmp_path, output=tmp_path / "output.txt")
    one = together.train(tmp_path / "one", 0, together.IMAGES, microbatch=-1)
    assert process.wait(timeout=120) == 0, (tmp_path / "output.txt").read_text()
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for rank, own in enumerate(both):
        assert close(own["gradient"], one["gradient"])
        # Adam takes whole steps along the rounding of gradients that are 0, as those of biases are
        # that a normalisation takes away again.
        assert close(own["weights"], one["weights"], 3e-5)
        assert close(own["history"]["history"], one["history"]["history"])
        assert torch.equal(own["history"]["counts"], one["history"]["counts"])
        assert own["samples"] == one["samples"] == together.IMAGES * together.STEPS
        assert own["numbers"] == [(0, 10), (1, 11)]
        assert own["rows"].tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
        assert own["first"] == "from 0", rank
    # What the processes add up, both have to the last bit.
    for name in ("gradient", "weights"):
        assert torch.equal(both[0][name], both[1][name])
    assert torch.equal(both[0]["history"]["history"], both[1]["history"]["history"])
    runs = ("one", "together")
    rows = [logger.read_progress(str(tmp_path / run / "progress.csv")) for run in runs]
    assert [row["samples"] for row in rows[0]] == [16, 32]
    for alone, shared in zip(*rows, strict=True):
        assert shared == pytest.approx(alone, rel=1e-4)
        assert {"mse_Seg", "mse_class_a", "grad_norm", "vb_q0"} <= shared.keys()
    step = together.STEPS
    states = [
        checkpoint.load_weights(str(tmp_path / run / checkpoint.ema_name(0.9, step)))
        for run in runs
    ]
    averages = [torch.cat([value.flatten() for value in state.values()]) for state in states]
    assert close(averages[1], averages[0])


@pytest.fixture(scope="module")
def undisturbed(slices, tmp_path_factory):
    """Two processes, 24 steps."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    process = train(slices, run, "--max_steps", "24")
    output = run.with_suffix(".txt").read_text()
    assert process.returncode == 0, output
    return run


def test_only_the_first_process_writes_and_speaks(undisturbed):
    lines = undisturbed.with_suffix(".txt").read_text().splitlines()
    assert lines.count("2 processes of 2 images: 4 images in each step") == 1
    assert lines.count("finished at step 24") == 1
    rows = logger.read_progress(str(undisturbed / "progress.csv"))
    assert [row["step"] for row in rows] == list(range(3, 25, 3))
    assert [row["samples"] for row in rows] == list(range(12, 97, 12))
    assert checkpoint.complete_steps(str(undisturbed)) == [8, 16, 24]


@needs_mpi
def test_mpiexec_gives_the_same_files(undisturbed, slices, tmp_path):
    process = train(slices, tmp_path / "run", "--max_steps", "24", launcher=LAUNCHERS["mpiexec"])
    assert process.returncode == 0, (tmp_path / "run.txt").read_text()
    assert_equal_runs(tmp_path / "run", undisturbed, 24)


def workers_of(run):
    """The ranks' processes by rank."""
    found = {}
    for pid in soak.children_of(run):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks = [word for word in variables if re.fullmatch(rb"(RANK|PMI_RANK)=\d", word)]
        if ranks:
            found[int(ranks[0][-1:])] = pid
    return found


def test_torchrun_restarts_from_the_latest_checkpoint(undisturbed, slices, tmp_path):
    """Without another word on the command line; what the killed process, the one that writes,
    held is let go."""
    run = tmp_path / "run"
    argv = ["--max_steps", "24", "--resume_checkpoint", ""]
    launcher = [*TORCHRUN, "--max-restarts", "1"]
    process = train(slices, run, *argv, launcher=launcher, wait=False)
    wait_for(lambda: checkpoint.complete_steps(str(run)))
    os.kill(workers_of(run)[0], signal.SIGKILL)
    assert process.wait(timeout=120) == 0, run.with_suffix(".txt").read_text()
    assert "resuming from" in run.with_suffix(".txt").read_text()
    assert_equal_runs(run, undisturbed, 24)


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpiexec", marks=needs_mpi)])
def test_a_process_that_dies_ends_the_others(slices, tmp_path, launcher):
    run = tmp_path / "run"
    process = train(slices, run, launcher=LAUNCHERS[launcher], wait=False)
    wait_for(lambda: checkpoint.complete_steps(str(run)))
    os.kill(workers_of(run)[1], signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    wait_for(lambda: not soak.children_of(run), seconds=20)
    step = checkpoint.complete_steps(str(run))[-1]
    checkpoint.verify(str(run / checkpoint.model_name(step)), RATES)


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpiexec", marks=needs_mpi)])
def test_a_bad_file_of_one_process_ends_all_and_costs_nothing(slices, tmp_path, launcher):
    """Its message stands there once, and what was learned before it is saved."""
    own = tmp_path / "slices"
    shutil.copytree(slices, own)
    # Of the third step, places 8 to 11 of the order, process 1 has the last two.
    victim = own / "Seg" / f"Subject_001_slice_{soak.order(epoch=0)[10]}.png"
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    process = train(own, tmp_path / "run", launcher=LAUNCHERS[launcher])
    output = (tmp_path / "run.txt").read_text()
    assert process.returncode != 0
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and str(victim) in errors[0], output
    assert checkpoint.complete_steps(str(tmp_path / "run")) == [2]


def test_sigterm_to_torchrun_saves_and_the_run_goes_on(undisturbed, slices, tmp_path):
    run = tmp_path / "run"
    process = train(slices, run, "--max_steps", "24", wait=False)
    wait_for(lambda: (run / "progress.csv").exists() and soak.last_row(run) >= 3)
    process.terminate()
    process.wait(timeout=60)
    wait_for(lambda: not soak.children_of(run), seconds=20)
    output = run.with_suffix(".txt").read_text()
    assert output.count("SIGTERM: finishing this step") == 1
    assert "continue with: torchrun --standalone --nproc_per_node=2 /" in output
    assert "--resume_checkpoint latest" in output
    assert checkpoint.complete_steps(str(run))[-1] >= soak.last_row(run)
    assert train(slices, run, "--max_steps", "24").returncode == 0
    assert_equal_runs(run, undisturbed, 24)
