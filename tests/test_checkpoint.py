import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from improved_diffusion import checkpoint
from improved_diffusion.script_util import (
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


def test_latest_is_the_newest_complete_one(tmp_path):
    run = tmp_path / "run"
    assert checkpoint.find_resume_checkpoint("latest", str(run)) == ""
    touch(run, "model000010.pt", "opt000010.pt", "model100000.pt", "opt100000.pt")
    # Killed while saving: the model comes last.
    touch(run, "ema_0.9_200000.pt", "opt200000.pt", "model300000.pt.partial")
    assert checkpoint.find_resume_checkpoint("latest", str(run)) == str(run / "model100000.pt")


def test_a_run_is_never_overwritten(tmp_path):
    run = tmp_path / "run"
    touch(run, "model000010.pt", "opt000010.pt")
    with pytest.raises(ValueError, match="already holds a run; continue it with"):
        checkpoint.find_resume_checkpoint("", str(run))
    own = str(run / "model000010.pt")
    assert checkpoint.find_resume_checkpoint(own, str(run)) == own
    with pytest.raises(ValueError, match="already holds a run"):
        checkpoint.find_resume_checkpoint(str(tmp_path / "model000020.pt"), str(run))
    other = tmp_path / "other"
    assert checkpoint.find_resume_checkpoint(own, str(other)) == own


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
    assert checkpoint.training_flags(str(tmp_path / "model000001.pt"), 1) == {
        "lr": 1e-4,
        "channels": "Seg",
    }
    assert os.listdir(tmp_path) == ["opt000001.pt"]
