"""The report's experiments: the command lines that their scripts run, and small real runs."""

import gzip
import importlib.util
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion import brats, checkpoint, logger
from improved_diffusion.architecture import RECIPES
from improved_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "experiment_scripts"
CIFAR10 = "introduction/{}_cifar10.py"
LSUN = "introduction/sample_lsun_bedroom.py"
PICTURES = "introduction/cifar10_pictures.py"


def script_of(name, verb):
    return CIFAR10.format(verb) if name == "cifar10" else f"{name}/{verb}.py"


# Written out from the report, not built from the definition under test.
NETWORK = (
    "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
    "--use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 "
    "--noise_schedule linear --rescale_learned_sigmas False --rescale_timesteps False"
)
RGB = f"--in_channels 3 {NETWORK}"
ONE = f"--channels T1CE --in_channels 1 {NETWORK}"
TWO = f"--channels T1CE,Seg --in_channels 2 {NETWORK}"
FIVE = f"--channels FLAIR,Seg,T1,T1CE,T2 --in_channels 5 {NETWORK}"
CIFAR10_NETWORK = (
    "--in_channels 3 --image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True "
    "--dropout 0.3 --diffusion_steps 4000 --noise_schedule cosine"
)
# In the recipe only what makes the network as large; the recipe decides the rest.
ARCHITECTURE = (
    "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 "
    "--use_scale_shift_norm False --attention_resolutions 16"
)
TWO_BRATS = f"--preset brats --channels T1CE,Seg --in_channels 2 {ARCHITECTURE}"
FIVE_BRATS = f"--preset brats --channels FLAIR,Seg,T1,T1CE,T2 --in_channels 5 {ARCHITECTURE}"
TRAIN = {
    "cifar10": (
        "--out_dir Checkpoints/cifar10 --log_interval 10 --save_interval 10000 "
        f"{CIFAR10_NETWORK} --lr 1e-4 --batch_size 128 --microbatch -1 --ema_rate 0.9999 "
        "--ema_warmup False --max_steps 50000"
    ),
    "one_channel_exp1": (
        f"--out_dir Checkpoints/one_channel_exp1 --log_interval 10 --save_interval 10000 {RGB} "
        "--lr 1e-4 --batch_size 1 --microbatch -1 --ema_rate 0.9999 --ema_warmup False "
        "--max_steps 100000"
    ),
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
    "two_channel_brats": (
        "--out_dir Checkpoints/two_channel_brats --log_interval 10 --save_interval 5000 "
        f"{TWO_BRATS} --lr 1e-4 --batch_size 128 --microbatch auto --ema_rate 0.9999 "
        "--max_steps 20000 --precision auto --keep_checkpoints 4 --lr_anneal_steps 20000 "
        "--ema_sigma_rel 0.2"
    ),
    "five_channel_brats": (
        "--out_dir Checkpoints/five_channel_brats --log_interval 10 --save_interval 5000 "
        f"{FIVE_BRATS} --lr 1e-4 --batch_size 128 --microbatch auto --ema_rate 0.9999 "
        "--max_steps 15000 --precision auto --keep_checkpoints 4 --lr_anneal_steps 15000 "
        "--ema_sigma_rel 0.2"
    ),
}
# The flags before --model_path, and the checkpoints.
SAMPLE = {
    "cifar10": (
        f"{CIFAR10_NETWORK} --batch_size 64 --num_samples 64 --timestep_respacing 250",
        ["ema_0.9999_050000"],
    ),
    "one_channel_exp1": (
        f"{RGB} --batch_size 10 --num_samples 40 --sampler ancestral",
        ["ema_0.9999_100000"],
    ),
    "one_channel_exp2": (
        f"{ONE} --batch_size 8 --num_samples 64 --sampler ancestral",
        ["ema_0.9999_230000"],
    ),
    "two_channel_exp1": (
        f"{TWO} --batch_size 8 --num_samples 64 --sampler ancestral",
        ["ema_0.9999_250000"],
    ),
    "two_channel_exp2": (
        f"{TWO} --batch_size 36 --num_samples 72 --sampler ancestral",
        ["ema_0.9999_160000"],
    ),
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
    "two_channel_brats": (
        f"{TWO_BRATS} --batch_size auto --num_samples 1000",
        ["ema_p0.2_020000"],
    ),
    "five_channel_brats": (
        f"{FIVE_BRATS} --batch_size auto --num_samples 1000",
        ["ema_p0.2_015000"],
    ),
}
NAMES = sorted(TRAIN)
IN_RECIPE = ["five_channel_brats", "two_channel_brats"]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(script, *args, cwd=None):
    command = [sys.executable, FOLDER / script, *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120
    )


def succeeds(script, *args, cwd):
    """What a script prints on standard output."""
    result = run(script, *args, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(script, *args, cwd, texts):
    """The script ends with one sentence, in which all the texts are."""
    result = run(script, *args, cwd=cwd)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for text in texts:
        assert str(text) in result.stderr


def printed(script, *args, cwd=None):
    """The commands that a script prints, each without the Python that runs it."""
    result = run(script, "--print", *args, cwd=cwd)
    assert result.returncode == 0, result.stderr
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    assert all(command[0] == sys.executable for command in commands)
    return [command[1:] for command in commands]


def test_every_experiment_is_checked():
    assert sorted(TRAIN) == sorted(SAMPLE)
    scripts = {script_of(name, verb) for name in NAMES for verb in ("train", "sample")}
    found = {str(path.relative_to(FOLDER)) for path in FOLDER.glob("*/*.py")}
    assert found == scripts | {LSUN, PICTURES}


@pytest.mark.parametrize("name", NAMES)
def test_training_has_the_reports_flags_and_then_the_users(name, tmp_path):
    extra = ["--data_dir", "my slices", "--max_steps", "20", "--batch_size=2"]
    assert printed(script_of(name, "train"), *extra, cwd=tmp_path) == [
        [str(ROOT / "scripts/image_train.py"), *TRAIN[name].split(), *extra]
    ]


@pytest.mark.parametrize("name", NAMES)
def test_sampling_has_the_reports_flags_and_then_the_users(name, tmp_path):
    flags, stems = SAMPLE[name]
    extra = ["--seed", "3", "--num_samples=2"]
    assert printed(script_of(name, "sample"), *extra, cwd=tmp_path) == [
        [
            *(str(ROOT / "scripts/image_sample.py"), *flags.split()),
            *("--model_path", f"Checkpoints/{name}/{stem}.pt"),
            *("--sample_dir", f"Samples/{name}/{stem}"),
            *extra,
        ]
        for stem in stems
    ]


@pytest.mark.parametrize("name", IN_RECIPE)
def test_the_recipe_is_not_contradicted(name):
    """A flag that stands beside ``--preset`` would win over the recipe's.

    The batches and the learning rate are those of the report, to be comparable.
    """
    named = {word.removeprefix("--") for word in TRAIN[name].split() if word.startswith("--")}
    assert named & RECIPES["brats"].keys() == {"batch_size", "microbatch"}


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
    # What is named twice is sampled once.
    chosen = ("--steps", "10000,20000,10000", "--types", "model,ema_0.999", "--out_dir", "a b")
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


def test_lsun_bedroom_is_the_published_model(tmp_path):
    name = "lsun_uncond_100M_1200K_bs128"
    flags = (
        "--preset lsun_bedroom --diffusion_steps 1000 --batch_size 42 --num_samples 252 "
        f"--timestep_respacing 250 --model_path Checkpoints/{name}.pt "
        f"--sample_dir Samples/lsun_bedroom/{name} --seed 3"
    )
    assert printed(LSUN, "--seed", "3", cwd=tmp_path) == [
        [str(ROOT / "scripts/image_sample.py"), *flags.split()]
    ]
    address = f"https://openaipublic.blob.core.windows.net/diffusion/march-2021/{name}.pt"
    refused(LSUN, cwd=tmp_path, texts=[f"Checkpoints/{name}.pt", address, "--model_path"])


def test_pictures_must_be_named(tmp_path):
    (tmp_path / "T2").mkdir()
    for name, folder in (("cifar10", "cifar10_pictures.py"), ("one_channel_exp1", "SLICES/T1CE")):
        script = script_of(name, "train")
        refused(script, cwd=tmp_path, texts=["--data_dir is missing", folder])
        refused(script, "--data_dir=.", cwd=tmp_path, texts=["--data_dir . is a slice", folder])
        latest = ["--resume_checkpoint", "latest"]
        assert printed(script_of(name, "train"), *latest, cwd=tmp_path)[0][-2:] == latest


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


# --- CIFAR-10's archive


def write_archive(path, files, compress=True):
    """A .tar.gz of names and bytes."""
    with tarfile.open(path, "w:gz" if compress else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def cifar10_files(count=2):
    """Files in the layout of cifar-10-binary.tar.gz, in its mixed order, of count records each."""
    rng = np.random.default_rng(0)
    files = {"cifar-10-batches-bin/batches.meta.txt": b"airplane\n"}
    order = "data_batch_4 data_batch_1 test_batch data_batch_5 data_batch_2 data_batch_3"
    for number, name in enumerate(order.split()):
        records = rng.integers(0, 256, (count, 3073), dtype=np.uint8)
        records[:, 0] = [(5 * number + 3 * i) % 10 for i in range(count)]
        files[f"cifar-10-batches-bin/{name}.bin"] = records.tobytes()
    return files


CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar10_pictures(split, tmp_path):
    files = cifar10_files(3)
    archive = write_archive(tmp_path / "cifar.tar.gz", files)
    (tmp_path / "out.partial").mkdir()  # an earlier call was interrupted
    (tmp_path / "out.partial" / "cat_00000.png").touch()
    flags = ["--archive", archive, "--out_dir", tmp_path / "out", "--split", split]
    result = succeeds(PICTURES, *flags, cwd=tmp_path)
    numbers = range(1, 6) if split == "train" else []
    names = [f"data_batch_{number}" for number in numbers] or ["test_batch"]
    content = b"".join(files[f"cifar-10-batches-bin/{name}.bin"] for name in names)
    assert result == f"wrote {3 * len(names)} pictures to {tmp_path / 'out'}\n"
    expected = {}
    for number in range(3 * len(names)):
        record = content[3073 * number : 3073 * (number + 1)]
        planes = [record[1 + 1024 * c : 1025 + 1024 * c] for c in range(3)]
        # Pixel by pixel, row by row: (red, green, blue).
        expected[f"{CLASSES[record[0]]}_{number:05d}.png"] = list(zip(*planes))
    assert sorted(os.listdir(tmp_path / "out")) == sorted(expected)
    for name, pixels in expected.items():
        with Image.open(tmp_path / "out" / name) as picture:
            assert (picture.mode, picture.size) == ("RGB", (32, 32))
            assert picture.tobytes() == bytes(level for pixel in pixels for level in pixel)
    assert sorted(os.listdir(tmp_path)) == ["cifar.tar.gz", "out"]
    refused(PICTURES, *flags, cwd=tmp_path, texts=["--out_dir", "already holds something"])


def test_bad_cifar10_archives_are_refused(tmp_path):
    good = cifar10_files()
    test_batch = "cifar-10-batches-bin/test_batch.bin"
    archive = tmp_path / "cifar.tar.gz"

    def is_refused(*texts):
        flags = ["--archive", archive, "--out_dir", tmp_path / "out", "--split", "test"]
        refused(PICTURES, *flags, cwd=tmp_path, texts=[archive, *texts])
        assert sorted(os.listdir(tmp_path)) == (["cifar.tar.gz"] if archive.exists() else [])

    is_refused("no such file", "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz")
    write_archive(archive, good, compress=False)
    is_refused("damaged or no .tar.gz")
    whole = write_archive(archive, good).read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    is_refused("damaged")
    # The checksum behind the last file, which tells a changed pixel.
    archive.write_bytes(gzip.compress(gzip.decompress(whole))[:-8] + bytes(8))
    is_refused("damaged", "CRC")
    write_archive(archive, {"cifar-10-batches-py/test_batch": good[test_batch]})
    is_refused(f"no file {test_batch}", "binary version")
    write_archive(archive, {test_batch: good[test_batch][:-1]})
    is_refused(test_batch, "6145 bytes")
    write_archive(archive, {test_batch: b""})
    is_refused(test_batch, "0 bytes")
    records = bytearray(good[test_batch])
    records[3073] = 10
    write_archive(archive, {test_batch: bytes(records)})
    is_refused("record 1", "label 10")
    with tarfile.open(archive, "w:gz") as links:
        link = tarfile.TarInfo(test_batch)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        links.addfile(link)
    is_refused(f"no file {test_batch}")


# --- real runs, small


def readme_flags(script):
    """The flags with which README.md tries a script out."""
    start = f"python experiment_scripts/{script} "
    section = (FOLDER / "README.md").read_text().split("## Trying one out")[1].split("\n## ")[0]
    (line,) = (line for line in section.splitlines() if line.startswith(start))
    return shlex.split(line.removeprefix(start))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with SLICES and cifar10_train, in which all the runs are made."""
    folder = tmp_path_factory.mktemp("work")
    rng = np.random.default_rng(0)
    for channel in brats.CHANNELS:
        (folder / "SLICES" / channel).mkdir(parents=True)
        for number in range(3):
            levels = rng.integers(0, 256, (64, 64), dtype=np.uint8)
            if channel == brats.MASK_CHANNEL:
                levels = brats.snap_mask(levels)
            name = brats.slice_name(f"BraTS20_Training_001_slice_{number}", channel)
            Image.fromarray(levels).save(folder / "SLICES" / channel / name)
    archive = write_archive(folder / "cifar.tar.gz", cifar10_files())
    succeeds(PICTURES, "--archive", archive, "--out_dir", "cifar10_train", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def trained(work):
    """Train an experiment for README's two steps, once."""
    done = set()

    def train(name):
        if name not in done:
            shown = name if name in ("cifar10", "one_channel_exp1") else "two_channel_exp4"
            flags = readme_flags(script_of(shown, "train"))
            # Smaller than a first try needs, to save time here.
            flags += ["--num_res_blocks", "1", "--channel_mult", "1,1", "--num_workers", "0"]
            flags += ["--save_interval", "1", "--log_interval", "1"]
            succeeds(script_of(name, "train"), *flags, cwd=work)
            done.add(name)
        return work / "Checkpoints" / name

    return train


SAMPLE_FLAGS = readme_flags("two_channel_exp4/sample.py")


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def files_of_samples(channels, count=2):
    if not channels:
        pictures = [f"images/sample_{number:06d}.png" for number in range(count)]
    else:
        pictures = [
            f"{channel}/{brats.slice_name(f'sample_{number:06d}', channel)}"
            for channel in channels
            for number in range(count)
        ]
    size = f"{count}x32x32x{len(channels) or 3}"
    return sorted([*pictures, "grid.png", "samples.json", f"samples_{size}.npz"])


CHANNELS = {"one_channel_exp2": ["T1CE"], "five_channel_exp1": list(brats.CHANNELS)}
CHANNELS |= {f"two_channel_exp{number}": ["Seg", "T1CE"] for number in range(1, 5)}
CHANNELS |= {"five_channel_brats": list(brats.CHANNELS)}
FILES = ["ema_0.9999_{:06d}.pt", "model{:06d}.pt", "opt{:06d}.pt"]


# Left out are those that differ from another one in channels, batch or length alone.
ALIKE = {"two_channel_brats", "two_channel_exp1", "two_channel_exp2"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ALIKE])
def test_each_experiment_trains_and_samples(name, work, trained):
    channels = CHANNELS.get(name, [])
    folder = trained(name)
    names = [pattern.format(step) for pattern in FILES for step in (1, 2)]
    assert {*names, "progress.csv"} <= set(os.listdir(folder))
    assert [row["step"] for row in logger.read_progress(str(folder / "progress.csv"))] == [1, 2]
    metadata = checkpoint.metadata_of(checkpoint.load_weights(str(folder / "model000002.pt")))
    assert metadata["step"] == 2
    assert metadata["channels"] == channels
    assert metadata["flags"]["in_channels"] == (len(channels) or 3)
    assert metadata["flags"]["image_size"] == 32
    # What README's small network does not replace is the report's.
    schedule = "cosine" if name in ("cifar10", *IN_RECIPE) else "linear"
    assert metadata["flags"]["noise_schedule"] == schedule
    assert metadata["flags"]["dropout"] == (0.3 if name == "cifar10" else 0.0)
    assert metadata["flags"]["use_scale_shift_norm"] == (name == "cifar10")
    used = checkpoint.training_state(str(folder / "model000002.pt"), 2)["flags"]
    assert used["ema_warmup"] == (name in IN_RECIPE)
    if name in IN_RECIPE:
        # The run names a batch size of its own, and the experiment its learning rate.
        own = {flag: used[flag] for flag in RECIPES["brats"]}
        assert own == {**RECIPES["brats"], "batch_size": used["batch_size"]}
        assert used["lr"] == 1e-4
        assert used["keep_checkpoints"] == 4
        assert used["lr_anneal_steps"] == 15_000

    shown = script_of(name, "sample") if not channels else "two_channel_exp4/sample.py"
    flags = readme_flags(shown)
    assert flags == SAMPLE_FLAGS
    if name == "two_channel_exp3":  # raw models are sampled by the other tests
        flags += ["--types", "ema_0.9999"]
    if name == "five_channel_exp1":
        flags += ["--steps", "1,2"]
    if name in IN_RECIPE:  # by the default sampler
        flags += ["--timestep_respacing", ""]
    suffix = "" if name in IN_RECIPE else "_4steps"
    output = succeeds(script_of(name, "sample"), *flags, cwd=work)

    samples = work / "Samples" / name
    kinds = ["ema_p0.2_"] if name in IN_RECIPE else ["ema_0.9999_"]
    if name in ("two_channel_exp4", "five_channel_exp1"):
        kinds.append("model")
    steps = (1, 2) if "1,2" in flags else (2,)
    sets = [f"{kind}{step:06d}{suffix}" for step in steps for kind in kinds]
    figures = []
    if len(kinds) == 2:
        figures += [f"ema_beside_raw_{step:06d}{suffix}.png" for step in steps]
    if len(steps) == 2:
        figures += [f"evolution_{kind.removesuffix('_')}{suffix}.png" for kind in kinds]
    assert sorted(os.listdir(samples)) == sorted(sets + figures)
    assert output.count("wrote ") == len(sets) + len(figures)
    for own in sets:
        assert files_below(samples / own) == files_of_samples(channels)
        record = json.loads((samples / own / "samples.json").read_text())
        assert record["channels"] == channels
        assert record["shape"] == [2, 32, 32, len(channels) or 3]
        assert record["step"] == int(own.removesuffix(suffix)[-6:])
        assert record["flags"]["timestep_respacing"] == ("" if name in IN_RECIPE else "4")
        expected = ("dpmpp_2m_sde", 15) if name in IN_RECIPE else ("ancestral", 4)
        assert (record["sampler"], record["evaluations"]) == expected
    panels = {own: panel_sizes(samples / own) for own in figures}
    for own, (width, height) in panels.items():
        # Two samples, each panel enlarged to 128 pixels.
        across, down = (2, 2) if own.startswith("evolution") else (2, 1)
        assert width > across * len(channels) * 128
        assert height > down * 128
    evolutions = [samples / own for own in figures if own.startswith("evolution")]
    assert len({path.read_bytes() for path in evolutions}) == len(evolutions)


def panel_sizes(path):
    with Image.open(path) as picture:
        picture.load()
        return picture.size


def test_sampling_goes_on_where_it_stopped(work, trained):
    out = trained("two_channel_exp4")
    samples = work / "again"
    flags = [*SAMPLE_FLAGS, "--sample_dir", samples, "--timestep_respacing", 2]
    script = "two_channel_exp4/sample.py"
    first, second = samples / "ema_0.9999_000002_2steps", samples / "model000002_2steps"
    beside = samples / "ema_beside_raw_000002_2steps.png"
    succeeds(script, *flags, "--types", "ema_0.9999", cwd=work)
    assert os.listdir(samples) == [first.name]
    before = (first / "samples.json").stat().st_mtime_ns

    # The batch size changes no sample.
    output = succeeds(script, *flags, "--batch_size", 1, cwd=work).splitlines()
    assert output == [
        f"{first} holds these samples already",
        f"wrote 2 samples to {second}",
        f"wrote {beside}",
    ]
    assert (first / "samples.json").stat().st_mtime_ns == before
    drawn = beside.read_bytes()
    beside.unlink()

    # Other samples than are asked for are neither kept nor overwritten.
    for flag, value in (("--seed", 1), ("--num_samples", 1), ("--use_ddim", "True")):
        texts = [first, flag, f'"{value}"', "--sample_dir"]
        refused(script, *flags, flag, value, cwd=work, texts=texts)
    refused(script, *flags, "--predict_v", "True", cwd=work, texts=[first, "--predict_v"])
    other = work / "other run"
    other.mkdir()
    for name in ("ema_0.9999_000002.pt", "model000002.pt"):
        shutil.copy(trained("two_channel_exp3") / name, other / name)
    refused(
        script, *flags, "--out_dir", other, cwd=work, texts=[first, other / "ema_0.9999_000002.pt"]
    )
    assert not beside.exists()

    # Complete samples need their checkpoints no more.
    for path in other.iterdir():
        path.unlink()
    output = succeeds(script, *flags, "--out_dir", other, cwd=work).splitlines()
    assert output[-1] == f"wrote {beside}" and len(output) == 3
    assert beside.read_bytes() == drawn
    (first / "samples.json").write_text("[]")
    refused(script, *flags, cwd=work, texts=[first / "samples.json"])
    assert files_below(out) == files_below(trained("two_channel_exp4"))


# In the place of image_sample.py: stops when it is asked to, and leaves no samples.
STOPS = """
import pathlib, signal, sys, time
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append(1))
folder = pathlib.Path(sys.argv[sys.argv.index("--sample_dir") + 1])
folder.parent.mkdir(exist_ok=True)
folder.with_name(folder.name + ".ready").touch()
while not got:
    time.sleep(0.02)
"""


def test_a_stopped_sampling_draws_no_figures(work, trained, tmp_path):
    trained("two_channel_exp4")
    (tmp_path / "image_sample.py").write_text(STOPS)
    starter = (
        f"import pathlib, sys; sys.path.insert(0, {str(FOLDER)!r}); import experiments; "
        f"experiments.SCRIPTS = pathlib.Path({str(tmp_path)!r}); "
        "experiments.sample('two_channel_exp4')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", starter, *SAMPLE_FLAGS, "--sample_dir", tmp_path / "samples"],
        cwd=work,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ready = tmp_path / "samples" / "ema_0.9999_000002_4steps.ready"
    end = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < end, "sampling did not start"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert out == "stopped with 1 of 2 checkpoints left\n"
    assert os.listdir(tmp_path / "samples") == [ready.name]


def test_a_checkpoint_tells_its_own_flags(work, trained):
    """Those of the experiment are for files without, such as the report's."""
    folder = trained("two_channel_exp4")
    bare = work / "bare"
    bare.mkdir()
    weights = checkpoint.load_weights(str(folder / "model000002.pt"))
    torch.save(dict(weights), bare / "model000002.pt")
    flags = ["--steps", "2", "--types", "model"]
    (own,) = printed("two_channel_exp4/sample.py", *flags, cwd=work)
    assert "--channels" not in own and "--image_size" not in own and "--preset" not in own
    without = printed("two_channel_exp4/sample.py", *flags, "--out_dir", bare, cwd=work)
    assert without[0][1 : 1 + len(TWO.split())] == TWO.split()


def test_lsun_bedroom_samples(tmp_path):
    """A file without flags, as the published one, of a much smaller network."""
    small = {
        **model_and_diffusion_defaults(),
        **{"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1"},
        **{"attention_resolutions": "16", "num_heads": 1, "use_scale_shift_norm": False},
    }
    torch.manual_seed(0)
    model, _ = create_model_and_diffusion(**small)
    path = tmp_path / "Checkpoints/lsun_uncond_100M_1200K_bs128.pt"
    path.parent.mkdir()
    torch.save(model.state_dict(), path)
    own = "--preset none --image_size 32 --channel_mult 1,1 --num_heads 1 --noise_schedule linear"
    own += " --rescale_timesteps False --rescale_learned_sigmas False"
    succeeds(LSUN, *readme_flags(LSUN), *own.split(), cwd=tmp_path)
    samples = tmp_path / "Samples/lsun_bedroom"
    (folder,) = samples.iterdir()
    assert folder.name == "lsun_uncond_100M_1200K_bs128_4steps"
    assert files_below(folder) == files_of_samples([], count=1)
    with np.load(folder / "samples_1x32x32x3.npz") as arrays:
        assert arrays["arr_0"].shape == (1, 32, 32, 3)
    assert json.loads((folder / "samples.json").read_text())["flags"]["diffusion_steps"] == 1000
