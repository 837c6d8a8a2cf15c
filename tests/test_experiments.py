"""The report's experiments: the command lines that their scripts run, and how they run them."""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "experiment_scripts"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/train.py"))

# Written out from the report, not built from the definition under test.
NETWORK = (
    "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
    "--use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 "
    "--noise_schedule linear --rescale_learned_sigmas False --rescale_timesteps False"
)
ONE = f"--channels T1CE --in_channels 1 {NETWORK}"
TWO = f"--channels T1CE,Seg --in_channels 2 {NETWORK}"
FIVE = f"--channels FLAIR,Seg,T1,T1CE,T2 --in_channels 5 {NETWORK}"
TRAIN = {
    "one_channel_exp2": (
        f"--out_dir Checkpoints/one_channel_exp2 --log_interval 10 --save_interval 10000 {ONE} "
        "--lr 1e-4 --batch_size 1 --microbatch -1 --ema_rate 0.9999 --ema_warmup False "
        "--max_steps 230000"
    ),
    "two_channel_exp1": (
        f"--out_dir Checkpoints/two_channel_exp1 --log_interval 10 --save_interval 10000 {TWO} "
        "--lr 1e-4 --batch_size 1 --microbatch -1 --ema_rate 0.9999 --ema_warmup False "
        "--max_steps 250000"
    ),
    "two_channel_exp2": (
        f"--out_dir Checkpoints/two_channel_exp2 --log_interval 10 --save_interval 10000 {TWO} "
        "--lr 1e-4 --batch_size 6 --microbatch -1 --ema_rate 0.9999 --ema_warmup False "
        "--max_steps 160000"
    ),
    "two_channel_exp3": (
        f"--out_dir Checkpoints/two_channel_exp3 --log_interval 10 --save_interval 10000 {TWO} "
        "--lr 1e-6 --batch_size 7 --microbatch -1 --ema_rate 0.9999 --ema_warmup False "
        "--max_steps 220000"
    ),
    "two_channel_exp4": (
        f"--out_dir Checkpoints/two_channel_exp4 --log_interval 10 --save_interval 10000 {TWO} "
        "--lr 1e-4 --batch_size 128 --microbatch 7 --ema_rate 0.9999 --ema_warmup False "
        "--max_steps 60000"
    ),
    "five_channel_exp1": (
        f"--out_dir Checkpoints/five_channel_exp1 --log_interval 10 --save_interval 5000 {FIVE} "
        "--lr 1e-4 --batch_size 128 --microbatch 6 --ema_rate 0.9999 --ema_warmup False "
        "--max_steps 45000"
    ),
}
# The flags before --model_path, and the checkpoints.
SAMPLE = {
    "one_channel_exp2": (f"{ONE} --batch_size 8 --num_samples 64", ["ema_0.9999_230000"]),
    "two_channel_exp1": (f"{TWO} --batch_size 8 --num_samples 64", ["ema_0.9999_250000"]),
    "two_channel_exp2": (f"{TWO} --batch_size 36 --num_samples 72", ["ema_0.9999_160000"]),
    "two_channel_exp3": (
        f"{TWO} --batch_size 42 --num_samples 42 --timestep_respacing 250",
        ["ema_0.9999_220000", "model220000"],
    ),
    "two_channel_exp4": (
        f"{TWO} --batch_size 42 --num_samples 42 --timestep_respacing 250",
        ["ema_0.9999_060000", "model060000"],
    ),
    "five_channel_exp1": (
        f"{FIVE} --batch_size 42 --num_samples 84 --timestep_respacing 250",
        [
            *("ema_0.9999_010000", "model010000", "ema_0.9999_015000", "model015000"),
            *("ema_0.9999_020000", "model020000", "ema_0.9999_025000", "model025000"),
            *("ema_0.9999_030000", "model030000"),
        ],
    ),
}


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run(script, *args, cwd=None):
    command = [sys.executable, FOLDER / script, *args]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)


def printed(script, *args, cwd=None):
    """The commands that a script prints, each without the Python that runs it."""
    result = run(script, "--print", *args, cwd=cwd)
    assert result.returncode == 0, result.stderr
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    assert all(command[0] == sys.executable for command in commands)
    return [command[1:] for command in commands]


def test_every_experiment_is_checked():
    assert sorted(TRAIN) == sorted(SAMPLE) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_training_has_the_reports_flags_and_then_the_users(name, tmp_path):
    extra = ["--data_dir", "my slices", "--max_steps", "20", "--batch_size=2"]
    assert printed(f"{name}/train.py", *extra, cwd=tmp_path) == [
        [str(ROOT / "scripts/image_train.py"), *TRAIN[name].split(), *extra]
    ]


@pytest.mark.parametrize("name", NAMES)
def test_sampling_has_the_reports_flags_and_then_the_users(name, tmp_path):
    flags, stems = SAMPLE[name]
    extra = ["--seed", "3", "--num_samples=2"]
    assert printed(f"{name}/sample.py", *extra, cwd=tmp_path) == [
        [
            *(str(ROOT / "scripts/image_sample.py"), *flags.split()),
            *("--model_path", f"Checkpoints/{name}/{stem}.pt"),
            *("--sample_dir", f"Samples/{name}/{stem}"),
            *extra,
        ]
        for stem in stems
    ]


def paths(commands):
    return [
        (
            c[c.index("--model_path") + 1],
            c[c.index("--sample_dir") + 1],
            "--timestep_respacing" in c,
        )
        for c in commands
    ]


def test_steps_and_types_are_chosen():
    chosen = ("--steps", "10000,20000", "--types", "model,ema_0.999", "--out_dir", "a b")
    assert paths(printed("two_channel_exp4/sample.py", *chosen, "--sample_dir", "c")) == [
        ("a b/model010000.pt", "c/model010000", True),
        ("a b/ema_0.999_010000.pt", "c/ema_0.999_010000", True),
        ("a b/model020000.pt", "c/model020000", True),
        ("a b/ema_0.999_020000.pt", "c/ema_0.999_020000", True),
    ]


def test_all_timesteps_go_beside_the_respaced_samples():
    every = printed(
        "two_channel_exp3/sample.py", "--types", "ema_0.9999", "--timestep_respacing", ""
    )
    assert paths(every) == [
        (
            "Checkpoints/two_channel_exp3/ema_0.9999_220000.pt",
            "Samples/two_channel_exp3/ema_0.9999_220000_1000steps",
            False,
        )
    ]


def test_one_checkpoint_by_its_path():
    assert paths(printed("two_channel_exp4/sample.py", "--model_path", "gs://bucket/x.pt")) == [
        ("gs://bucket/x.pt", "Samples/two_channel_exp4/x", True)
    ]


def test_missing_checkpoints_are_named_before_anything_runs(tmp_path):
    result = run("two_channel_exp4/sample.py", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: no checkpoint Checkpoints/two_channel_exp4/ema_0.9999_")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    for wrong in (["--steps", "10k"], ["--steps", ""], ["--types", "ema"]):
        assert run("two_channel_exp4/sample.py", "--print", *wrong).returncode == 2


@pytest.fixture
def experiments():
    spec = importlib.util.spec_from_file_location(
        "experiments_under_test", FOLDER / "experiments.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_training_becomes_the_program(tmp_path):
    """``train`` replaces its process, so the recorded process ID stays true."""
    program = tmp_path / "image_train.py"
    program.write_text("import json, os, sys; print(json.dumps([os.getpid(), sys.argv[-2:]]))")
    starter = (
        f"import pathlib, sys; sys.path.insert(0, {str(FOLDER)!r}); import experiments; "
        f"experiments.SCRIPTS = pathlib.Path({str(tmp_path)!r}); "
        "experiments.train('two_channel_exp4')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", starter, "--data_dir", "my slices"],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = process.communicate(timeout=30)
    assert json.loads(out) == [process.pid, ["--data_dir", "my slices"]]


def test_runs_stop_at_the_first_failure(experiments, tmp_path):
    def step(name, status):
        code = f"import sys; open({str(tmp_path / name)!r}, 'w'); sys.exit({status})"
        return [sys.executable, "-c", code]

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    try:
        status = experiments.run_in_turn([step("a", 0), step("b", 5), step("c", 0)])
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), handlers):
            signal.signal(number, handler)
    assert status == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


# Counts its signals for a moment after the first one.
COUNTS = """
import pathlib, signal, sys, time
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append(1))
pathlib.Path(sys.argv[1] + ".ready").touch()
while not got:
    time.sleep(0.02)
time.sleep(0.3)
pathlib.Path(sys.argv[1]).write_text(str(len(got)))
"""


@pytest.mark.parametrize("to_group", [False, True])
def test_a_stop_reaches_the_running_program_once_and_starts_no_other(tmp_path, to_group):
    (tmp_path / "counts.py").write_text(COUNTS)
    commands = [
        [sys.executable, str(tmp_path / "counts.py"), str(tmp_path / name)] for name in "ab"
    ]
    starter = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import experiments; "
        f"sys.exit(experiments.run_in_turn({commands!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", starter],
        env=environment(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 20
    while not (tmp_path / "a.ready").exists():
        assert time.monotonic() < end, "the first program did not start"
        time.sleep(0.02)
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out == "stopped with 1 of 2 checkpoints left\n"
    assert (tmp_path / "a").read_text() == "1"
    assert not (tmp_path / "b.ready").exists()
