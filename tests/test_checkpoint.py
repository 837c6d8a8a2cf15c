import itertools
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from improved_diffusion import checkpoint
from improved_diffusion.script_util import (
    create_gaussian_diffusion,
    create_model_and_diffusion,
    load_model_and_diffusion,
    model_and_diffusion_defaults,
)

FLAGS = {
    **model_and_diffusion_defaults(),
    "in_channels": 2,
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "8",
    "diffusion_steps": 20,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model, _ = create_model_and_diffusion(**FLAGS)
    return model


@pytest.fixture
def saved(model, tmp_path):
    path = str(tmp_path / "model000005.pt")
    metadata = {"flags": FLAGS, "channels": ["Seg", "T1CE"], "step": 5}
    checkpoint.save(checkpoint.with_metadata(model.state_dict(), metadata), path)
    return path


def test_flags_travel_inside_without_adding_a_key(model, saved):
    plain = torch.load(saved, weights_only=True)
    assert list(plain) == list(model.state_dict())
    # As the reference loads it: strictly, knowing nothing of the metadata.
    other, _ = create_model_and_diffusion(**FLAGS)
    other.load_state_dict(plain)
    loaded = load_model_and_diffusion(saved)
    assert loaded.flags == FLAGS
    assert loaded.channels == ["Seg", "T1CE"]
    assert checkpoint.step_of(saved, loaded.metadata) == 5
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_metadata_does_not_leak_into_the_model_that_gave_the_weights(model):
    state = model.state_dict()
    checkpoint.with_metadata(state, {"step": 1})
    assert checkpoint.METADATA_KEY not in state._metadata


def test_given_flags_must_agree_where_training_fixed_them(saved):
    with pytest.raises(ValueError, match=r"--num_heads 2 contradicts .*--num_heads 4"):
        load_model_and_diffusion(saved, {"num_heads": 2})
    with pytest.raises(ValueError, match="--noise_schedule cosine contradicts"):
        load_model_and_diffusion(saved, {"noise_schedule": "cosine"})
    loaded = load_model_and_diffusion(saved, {"timestep_respacing": "5", "num_heads": 4})
    assert loaded.diffusion.num_timesteps == 5


def test_the_schedule_is_training_s(model, tmp_path):
    """A shift by its number; a checkpoint from before the flags has no shift and no zero end."""
    later = ("snr_shift", "zero_terminal_snr", "mask_encoding", "self_condition")
    old = {name: FLAGS[name] for name in FLAGS if name not in later}
    own = {**FLAGS, "snr_shift": "auto", "zero_terminal_snr": True, "predict_v": True}
    paths = []
    for number, flags in enumerate((old, own)):
        paths.append(str(tmp_path / f"model{number:06d}.pt"))
        checkpoint.save(checkpoint.with_metadata(model.state_dict(), {"flags": flags}), paths[-1])
    before, shifted = paths
    same = {"snr_shift": "1.0", "zero_terminal_snr": False, "loss_weighting": "min_snr"}
    loaded = load_model_and_diffusion(before, same)
    plain = create_gaussian_diffusion(steps=20)
    np.testing.assert_array_equal(loaded.diffusion.betas, plain.betas)
    assert loaded.diffusion.loss_weights[0] == pytest.approx(5 * (1 / plain.alphas_cumprod[0] - 1))
    with pytest.raises(ValueError, match=r"--snr_shift auto contradicts .*--snr_shift 1;"):
        load_model_and_diffusion(before, {"snr_shift": "auto"})
    with pytest.raises(ValueError, match=r"--zero_terminal_snr True contradicts .* False;"):
        load_model_and_diffusion(before, {"zero_terminal_snr": True})
    # (64 / 16)^2
    loaded = load_model_and_diffusion(shifted, {"snr_shift": "16"})
    again = load_model_and_diffusion(shifted)
    np.testing.assert_array_equal(loaded.diffusion.betas, again.diffusion.betas)
    assert again.diffusion.alphas_cumprod[-1] == 0
    with pytest.raises(ValueError, match=r"--snr_shift 1 contradicts .*--snr_shift auto;"):
        load_model_and_diffusion(shifted, {"snr_shift": "1"})


def test_file_of_the_reference_takes_flags_from_the_user(model, tmp_path):
    path = str(tmp_path / "ema_0.9999_000070.pt")
    torch.save(OrderedDict(model.state_dict()), path)
    loaded = load_model_and_diffusion(path, FLAGS)
    assert loaded.channels == []
    assert checkpoint.step_of(path, loaded.metadata) == 70
    with pytest.raises(ValueError, match=r"--num_res_blocks 2 contradicts .* say 1"):
        load_model_and_diffusion(path, {**FLAGS, "num_res_blocks": 2})


def test_weights_that_do_not_fit_are_named(model):
    weights = OrderedDict(model.state_dict())
    weights["input_blocks.0.0.weight"] = torch.zeros(32, 1, 3, 3)
    with pytest.raises(ValueError, match=r"is \[32, 1, 3, 3\] in the file and \[32, 2, 3, 3\]"):
        checkpoint.load_into(model, weights, "x.pt")
    del weights["out.2.bias"]
    with pytest.raises(ValueError, match=r"another architecture.*out\.2\.bias is missing"):
        checkpoint.load_into(model, weights, "x.pt")


def test_file_of_the_reference_is_told_its_channels_by_name(model, tmp_path):
    path = str(tmp_path / "model000001.pt")
    torch.save(OrderedDict(model.state_dict()), path)
    given = {name: value for name, value in FLAGS.items() if name != "in_channels"}
    loaded = load_model_and_diffusion(path, {**given, "channels": "T1CE,Seg"})
    assert (loaded.channels, loaded.flags["in_channels"]) == (["Seg", "T1CE"], 2)
    with pytest.raises(ValueError, match="--in_channels 2 contradicts --channels FLAIR,T1,T2"):
        load_model_and_diffusion(path, {**FLAGS, "channels": "FLAIR,T1,T2"})


def test_step_that_nothing_tells(tmp_path):
    with pytest.raises(ValueError, match="neither inside the file nor in its name"):
        checkpoint.step_of(str(tmp_path / "best.pt"), {})


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    trap = tmp_path / "trap"
    for name, write in {"torch.pt": torch.save, "pickle.pt": dump}.items():
        path = str(tmp_path / name)
        write(OrderedDict(weight=torch.zeros(1), bad=Malicious(str(trap))), path)
        with pytest.raises(ValueError, match=f"{name} holds more than tensors"):
            checkpoint.load(path)
    assert not trap.exists()


def dump(content, path):
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol=2)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_file(saved, keep):
    size = os.path.getsize(saved)
    with open(saved, "r+b") as file:
        file.truncate(int(keep * size) if isinstance(keep, float) else keep)
    with pytest.raises(ValueError, match=r"model000005.pt is no readable checkpoint"):
        checkpoint.load(saved)


@pytest.mark.parametrize("content", [b"hello\n" * 50, b"\x89PNG\r\n\x1a\n", b"PK\x03\x04 no zip"])
def test_other_kinds_of_files(tmp_path, content):
    path = tmp_path / "model000001.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is no readable checkpoint"):
        checkpoint.load(str(path))


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "model000001.pt", tmp_path):
        with pytest.raises(ValueError, match="there is no checkpoint file"):
            checkpoint.load(str(path))


def test_optimizer_file_is_no_network(tmp_path):
    path = str(tmp_path / "opt000001.pt")
    torch.save({"state": {}, "param_groups": []}, path)
    with pytest.raises(ValueError, match="no state dict of a network"):
        checkpoint.load_weights(path)


def test_failed_write_leaves_the_old_file_and_no_other(saved, monkeypatch):
    before = Path(saved).read_bytes()

    def fail(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"cannot write .*No space left"):
        checkpoint.save({}, saved)
    assert Path(saved).read_bytes() == before
    assert os.listdir(os.path.dirname(saved)) == ["model000005.pt"]


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(name)


def write_set(folder, step, seed=0):
    """A checkpoint of one weight as training writes it."""
    generator = torch.Generator().manual_seed(seed)
    weights = OrderedDict(weight=torch.randn(50, 50, generator=generator))
    ema, opt = checkpoint.ema_name(0.9, step), checkpoint.opt_name(step)
    about = {"step": step}
    files = {
        ema: checkpoint.save(checkpoint.with_metadata(weights, about), str(folder / ema)),
        opt: checkpoint.save({"training": {**about, "seed": seed}}, str(folder / opt)),
    }
    path = str(folder / checkpoint.model_name(step))
    checkpoint.save(checkpoint.with_metadata(weights, {**about, "files": files}), path)
    return path


def test_latest_is_the_newest_complete_one(tmp_path):
    run = tmp_path / "run"
    assert checkpoint.find_resume_checkpoint("latest", str(run)) == ("", [])
    write_set(run, 10)
    newest = write_set(run, 100000)
    # Killed while saving: the model comes last.
    touch(run, "ema_0.9_200000.pt", "opt200000.pt", "model300000.pt.partial")
    assert checkpoint.find_resume_checkpoint("latest", str(run)) == (newest, [])


def flip(path, place):
    """Turn around one bit, so many bytes (or such a share of them) into the file."""
    with open(path, "r+b") as file:
        file.seek(int(place * os.path.getsize(path)))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))


def cut(path):
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) - 100)


DAMAGES = {
    "flipped": lambda path: flip(path, 0.5),
    "cut": cut,
    "emptied": lambda path: open(path, "w").close(),
    "of another run": lambda path: write_set_beside(path, seed=1),
    "missing": os.unlink,
}


def write_set_beside(path, seed):
    """Replace one file of a set by the same of another run."""
    other = path.parent / "other"
    other.mkdir()
    write_set(other, 20, seed)
    os.replace(other / path.name, path)


@pytest.mark.parametrize("name", ["model000020.pt", "ema_0.9_000020.pt", "opt000020.pt"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, name, damage):
    older, newer = write_set(tmp_path, 10), write_set(tmp_path, 20)
    DAMAGES[damage](tmp_path / name)
    path, sentences = checkpoint.find_resume_checkpoint("latest", str(tmp_path))
    assert path == older
    if damage == "missing" and not name.startswith("ema"):
        assert sentences == []  # no checkpoint, as far as anyone can tell
        return
    (sentence,) = sentences
    of_model = name.startswith("model") and damage == "of another run"  # then the others differ
    assert of_model or name in sentence
    with pytest.raises(ValueError, match=re.escape(sentence)):
        checkpoint.verify(newer)
    os.unlink(older)
    with pytest.raises(ValueError, match="holds no checkpoint that can be continued"):
        checkpoint.find_resume_checkpoint("latest", str(tmp_path))


def test_every_flipped_bit_of_the_content_is_seen(tmp_path):
    """Weights, structure and directory; only fields that nothing reads may change unseen."""
    path = write_set(tmp_path, 10)
    content = Path(path).read_bytes()
    weights = checkpoint.load_weights(path)
    unseen = 0
    for place in np.linspace(0, len(content) - 1, 400).astype(int):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        Path(path).write_bytes(changed)
        try:
            own = checkpoint.load_weights(path)
        except ValueError as error:
            assert path in str(error)
            continue
        unseen += 1
        assert torch.equal(own["weight"], weights["weight"])
        assert checkpoint.metadata_of(own) == checkpoint.metadata_of(weights)
    assert unseen < 40


def test_a_member_that_calls_itself_a_folder_is_refused(tmp_path):
    """One bit of the directory, for which PyTorch would give memory as it is for the weights."""
    path = write_set(tmp_path, 10)
    content = bytearray(Path(path).read_bytes())
    entry = content.rindex(b"archive/data/0") - 46  # of the zip's central directory
    assert content[entry : entry + 4] == b"PK\x01\x02"
    content[entry + 38] |= 0x10
    Path(path).write_bytes(content)
    with pytest.raises(ValueError, match="is no readable checkpoint"):
        checkpoint.load(path)


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model000010.pt")
    with pytest.raises(ValueError, match=r"model000010\.pt"):
        checkpoint.load(str(tmp_path / "model000010.pt"))


def test_compressed_archives_are_refused(tmp_path):
    """They may hold far more than the file is large."""
    path = write_set(tmp_path, 10)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="is no readable checkpoint"):
        checkpoint.load(path)


def test_sets_without_checksums_are_read_through(tmp_path):
    """Those of the first version and of openai/improved-diffusion."""
    path = write_set(tmp_path, 10)
    weights = checkpoint.load_weights(path)
    torch.save(OrderedDict(weights), path)
    checkpoint.verify(path, [0.9])
    with pytest.raises(ValueError, match=r"ema_0\.5_000010\.pt is missing .* out of --ema_rate"):
        checkpoint.verify(path, [0.5])
    flip(tmp_path / "opt000010.pt", 0.3)
    with pytest.raises(ValueError, match=r"opt000010\.pt is no readable checkpoint"):
        checkpoint.verify(path)


def test_a_run_is_never_overwritten(tmp_path):
    run = tmp_path / "run"
    own = write_set(run, 10)
    with pytest.raises(ValueError, match="already holds a run; continue it with"):
        checkpoint.find_resume_checkpoint("", str(run))
    assert checkpoint.find_resume_checkpoint(own, str(run)) == (own, [])
    with pytest.raises(ValueError, match="already holds a run"):
        checkpoint.find_resume_checkpoint(str(tmp_path / "model000020.pt"), str(run))
    other = tmp_path / "other"
    assert checkpoint.find_resume_checkpoint(own, str(other)) == (own, [])


def is_free(folder):
    """Whether another process could train in the folder."""
    program = "import sys; from improved_diffusion import checkpoint as c\n"
    program += "with c.exclusive(sys.argv[1]): print('free')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", program, folder], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0 or "another process is training in" in result.stderr
    return result.stdout == "free\n"


def test_one_training_at_a_time_in_a_folder(tmp_path):
    folder = str(tmp_path / "new" / "run")
    with checkpoint.exclusive(folder):
        assert not is_free(folder)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    with checkpoint.exclusive(folder):
        child.start()  # as the loader's workers, which outlive a killed training for a moment
    assert is_free(folder)
    child.kill()
    touch(tmp_path, "file")
    blocked = checkpoint.exclusive(str(tmp_path / "file/a"))
    with pytest.raises(OSError, match="cannot be made"), blocked:
        pass


def test_half_written_files_of_a_killed_process_are_removed(tmp_path):
    names = ["model000010.pt.partial", "ema_0.9_000010.pt.partial", "opt000010.pt.partial"]
    touch(tmp_path, *names, "model000005.pt", "mine.pt.partial", "grid.png.partial")
    checkpoint.remove_partial(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["grid.png.partial", "mine.pt.partial", "model000005.pt"]


def test_thinning_by_hand():
    """The two newest stay; of the others goes the one with the closest neighbours."""
    assert checkpoint.to_thin_out([10, 20], 2) == []
    assert checkpoint.to_thin_out([10, 20, 30, 40, 50], 4) == [10]  # 0-20, 10-30, 20-40: the oldest
    assert checkpoint.to_thin_out([20, 30, 40, 50, 60], 4) == [30]  # 0-30, 20-40, 30-50
    assert checkpoint.to_thin_out([10, 20, 30, 40], 2) == [10, 20]


@pytest.mark.parametrize("keep", [2, 3, 5, 10])
def test_what_thinning_leaves_is_spread_over_the_run(keep):
    left = []
    for step in range(10, 2010, 10):
        left.append(step)
        removed = checkpoint.to_thin_out(left, keep)
        assert len(removed) <= 1
        left = [own for own in left if own not in removed]
        assert left[-2:] == [step - 10, step][-len(left) :]
    assert len(left) == keep
    spread = [0, *left[:-2], 2000]
    even = 2000 / (keep - 1)
    assert max(b - a for a, b in itertools.pairwise(spread)) <= 2 * even + 10


def test_thinning_removes_all_files_of_a_step(tmp_path):
    for step in (10, 20, 30):
        write_set(tmp_path, step)
    touch(tmp_path, "notes000010.pt", "progress.csv")
    assert checkpoint.thin_out(str(tmp_path), 2) == [10]
    assert checkpoint.complete_steps(str(tmp_path)) == [20, 30]
    assert sorted(path.name for path in tmp_path.glob("*10.pt")) == ["notes000010.pt"]
    assert checkpoint.thin_out(str(tmp_path), 2) == []


def test_size_of_a_checkpoint(tmp_path):
    """Weights, an average and two moments of 2,500 numbers, and little else."""
    write_set(tmp_path, 10)
    moments = {"exp_avg": torch.zeros(50, 50), "exp_avg_sq": torch.zeros(50, 50)}
    checkpoint.save({"state": {0: moments}}, str(tmp_path / "opt000010.pt"))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    expected = checkpoint.size_in_bytes(2500, averages=1)
    assert expected == 40_000
    assert expected < size < expected + 8_000
    assert checkpoint.free_bytes(str(tmp_path / "not" / "there")) > 0
    assert checkpoint.free_bytes("gs://bucket/run") is None


def test_a_run_that_begins_anew_keeps_its_log(tmp_path):
    touch(tmp_path, "progress.csv", "opt000010.pt")
    assert checkpoint.supersede(str(tmp_path), -1) == ["opt000010.pt"]
    assert sorted(os.listdir(tmp_path / "superseded")) == ["opt000010.pt", "progress.csv"]
    assert (tmp_path / "progress.csv").exists()


def test_newer_checkpoints_are_moved_aside(tmp_path):
    run = tmp_path / "run"
    names = ["model000010.pt", "ema_0.9_000020.pt", "model000020.pt", "opt000020.pt", "notes.txt"]
    for _ in range(2):
        touch(run, *names)
        moved = checkpoint.supersede(str(run), 10)
        assert moved == ["ema_0.9_000020.pt", "model000020.pt", "opt000020.pt"]
        assert sorted(os.listdir(run)) == ["model000010.pt", "notes.txt", "superseded"]
    assert sorted(os.listdir(run / "superseded")) == [
        "ema_0.9_000020.pt",
        "ema_0.9_000020_2.pt",
        "model000020.pt",
        "model000020_2.pt",
        "opt000020.pt",
        "opt000020_2.pt",
    ]
    assert checkpoint.supersede(str(run), 10) == []


def test_checksum(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert checkpoint.sha256(str(tmp_path / "a")) == expected


def test_plain_values_survive(tmp_path):
    path = str(tmp_path / "opt000001.pt")
    content = {"state": {}, "training": {"step": 3, "flags": {"lr": 1e-4, "channels": "Seg"}}}
    checkpoint.save(content, path)
    assert checkpoint.load(path) == content
    assert checkpoint.training_state(str(tmp_path / "model000001.pt"), 1) == content["training"]
    assert os.listdir(tmp_path) == ["opt000001.pt"]
