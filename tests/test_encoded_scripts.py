"""Training with encoded masks and augmentation, and what is made of such models."""

import json

import numpy as np
import pytest
import torch
import untrained
from PIL import Image
from test_conditional_scripts import SIZES, pictures, script  # noqa: F401 (fixtures)
from test_scripts import TRAIN, refused, write_slices
from test_train_util import make, unet_loop

from benchmarks import sampling_quality
from improved_diffusion import checkpoint, dist_util, figures, logger, sampling
from improved_diffusion.augmentation import Augmentation
from improved_diffusion.encodings import MaskEncoding
from improved_diffusion.respace import respaced
from improved_diffusion.sampling import SampleNoise
from improved_diffusion.script_util import load_model_and_diffusion
from improved_diffusion.seeds import derive_seed
from improved_diffusion.training_data import find_training_data

NAMES = ["Seg_51", "Seg_102", "Seg_204", "T1CE"]


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    return write_slices(tmp_path_factory.mktemp("data") / "slices")


@pytest.fixture(scope="module")
def begin(slices):
    """A command line that trains with one-hot masks and changed slices."""
    argv = ["--data_dir", slices, *TRAIN, "--channels", "T1CE,Seg", "--mask_encoding", "onehot"]
    argv += ["--augment", 0.7, "--augment_flip", "True", "--class_cond", "True"]
    argv += ["--save_interval", 2, "--sample_interval", 4, "--sample_respacing", 5]
    return [*argv, "--eval_interval", 4, "--eval_samples", 4]


@pytest.fixture(scope="module")
def trained(script, begin, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("trained") / "run"
    assert script("image_train", *begin, "--max_steps", 4, "--out_dir", out)[0] == 0
    return out


@pytest.fixture(scope="module")
def loaded(trained):
    return load_model_and_diffusion(str(trained / "ema_0.9_000004.pt"))


def test_the_network_alone_has_more_channels(trained, loaded):
    assert (loaded.flags["in_channels"], loaded.flags["mask_encoding"]) == (2, "onehot")
    assert (loaded.channels, loaded.encoding.names) == (["Seg", "T1CE"], NAMES)
    weights = checkpoint.load_weights(str(trained / "model000004.pt"))
    assert weights["input_blocks.0.0.weight"].shape[1] == 4
    assert weights["out.2.weight"].shape[0] == 8  # with a learned variance
    rows = logger.read_progress(str(trained / "progress.csv"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert "mse_Seg" not in row
        assert row["mse"] == pytest.approx(np.mean([row[f"mse_{name}"] for name in NAMES]))


def drawn_by_hand(loaded, diffusion, **how):
    """The samples 0 to 3 before decoding: [4, 4, 32, 32]."""
    how = {"seed": 0, "device": "cpu", **how}
    labels = {"y": torch.arange(4) % 2}
    model = loaded.model.eval()
    with torch.no_grad():
        return sampling.draw(model, diffusion, range(4), (4, 32, 32), model_kwargs=labels, **how)


def test_samples_hold_label_codes(trained, loaded, script, tmp_path):  # noqa: F811
    argv = ["--model_path", trained / "ema_0.9_000004.pt", "--num_samples", 4]
    argv += ["--batch_size", 4, "--timestep_respacing", 5, "--sample_dir", tmp_path / "samples"]
    assert script("image_sample", *argv)[0] == 0
    samples = np.load(tmp_path / "samples" / "samples_4x32x32x2.npz")["arr_0"]
    raw = drawn_by_hand(loaded, respaced(loaded.diffusion, "5"))
    planes = raw[:, :3].numpy()
    codes = np.where(planes.max(1) > 0, np.array([51, 102, 204])[planes.argmax(1)], 0)
    np.testing.assert_array_equal(samples[..., 0], codes)
    assert len(np.unique(codes)) == 4
    image = ((raw[:, 3].numpy() + 1) * 127.5).round().clip(0, 255)
    assert np.abs(samples[..., 1] - image).max() <= 1
    mask = Image.open(tmp_path / "samples" / "Seg" / "sample_000002_seg.png")
    np.testing.assert_array_equal(np.asarray(mask), codes[2])


def test_previews_and_evaluations_are_decoded(trained, loaded, tmp_path):
    raw = drawn_by_hand(loaded, respaced(loaded.diffusion, "5"))
    levels = sampling.to_levels(loaded.encoding.decode(raw))
    figures.save_grid(figures.sample_grid(levels, loaded.channels), str(tmp_path / "grid.png"))
    expected = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
    found = np.asarray(Image.open(trained / "previews" / "step000004.png")).astype(int)
    height = min(len(found), len(expected)) * 3 // 4  # eight samples there, and no lower margin
    assert np.abs(found[:height] - expected[:height]).max() <= 1

    plan = sampling.choose_plan(loaded.diffusion)
    how = {"sampler": plan.sampler, "timesteps": plan.timesteps}
    # What is beyond 1 counts as 1.
    planes = drawn_by_hand(loaded, loaded.diffusion, **how)[:, :3].clamp(-1, 1)
    words = torch.tensor([[-1, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1.0]])
    gaps = (planes[:, None] - words[None, :, :, None, None]).abs().amax(dim=2).amin(dim=1)
    row = logger.read_progress(str(trained / "progress.csv"))[-1]
    share = (gaps > 12 / 127.5).float().mean().item()
    assert row["eval_off_code_share"] == pytest.approx(share, abs=1e-3) and share > 0.1


def test_a_continued_run_changes_the_same_slices(trained, begin, script, tmp_path):  # noqa: F811
    argv = [*begin, "--out_dir", tmp_path / "run", "--max_steps"]
    assert script("image_train", *argv, 2)[0] == 0
    again = ["--out_dir", tmp_path / "run", "--resume_checkpoint", "latest", "--max_steps", 4]
    assert script("image_train", *again)[0] == 0
    for name in ("model000004.pt", "ema_0.9_000004.pt", "progress.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes(), name


def test_contradictions_are_refused(trained, slices, script, pictures, tmp_path):  # noqa: F811
    out = ["--out_dir", tmp_path / "x"]
    model = trained / "model000004.pt"
    argv = ["--model_path", model, "--sample_dir", tmp_path / "x", "--mask_encoding"]
    refused(script("image_sample", *argv, "bits"), "bits contradicts", "--mask_encoding onehot")
    bare = tmp_path / "bare.pt"
    torch.save(dict(checkpoint.load_weights(str(model))), bare)
    argv[1] = bare
    refused(script("image_sample", *argv, "onehot"), "--mask_encoding onehot", "holds no flags")

    base = ["--data_dir", slices, *TRAIN, *out]
    alone = [*base, "--channels", "T1CE", "--mask_encoding", "sdf"]
    refused(script("image_train", *alone), "--mask_encoding sdf needs Seg", "T1CE")
    refused(script("image_train", *base, "--mask_encoding", "rgb"), "choose from grey, labels")
    refused(script("image_train", *base, "--augment", 2), "--augment 2.0", "from 0 to 1")
    refused(script("image_train", *base, "--augment_scale", 1), "--augment_scale 1.0")
    of_pictures = ["--data_dir", pictures, *TRAIN, *out]
    for flag in (["--mask_encoding", "bits"], ["--augment", 0.5]):
        refused(script("image_train", *of_pictures, *flag), " ".join(map(str, flag)), "pictures")
    large = ["--data_dir", slices, *SIZES, *TRAIN[2:], *out, "--augment", 0.5]
    refused(script("super_res_train", *large), "--augment 0.5", "super-resolution")
    assert not (tmp_path / "x").exists()


def test_the_recipe_predicts_labels_where_there_is_a_mask(slices, script, tmp_path):  # noqa: F811
    base = ["--data_dir", slices, "--preset", "brats", *TRAIN, "--max_steps", 2]
    base += ["--save_interval", 2, "--diffusion_steps", 1000]
    for channels, encoding, outputs in (("T1CE,Seg", "labels", 5), ("T1CE", "grey", 1)):
        out = tmp_path / encoding
        assert script("image_train", *base, "--channels", channels, "--out_dir", out)[0] == 0
        model = out / "ema_0.9_000002.pt"
        found = load_model_and_diffusion(str(model), {"preset": "brats"})
        assert found.flags["mask_encoding"] == encoding and found.flags["predict_v"]
        assert found.model.out_channels == outputs
        again = ["--out_dir", out, "--resume_checkpoint", "latest", "--max_steps", 3]
        assert script("image_train", *base, "--channels", channels, *again)[0] == 0
        rows = logger.read_progress(str(out / "progress.csv"))
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert all((row.get("ce") or 0) > 0 for row in rows) is (encoding == "labels")
        samples = tmp_path / f"samples {encoding}"
        argv = ["--model_path", model, "--num_samples", 2, "--sample_dir", samples]
        assert script("image_sample", *argv, "--preset", "brats")[0] == 0
    mask = np.load(tmp_path / "samples labels" / "samples_2x32x32x2.npz")["arr_0"][..., 0]
    gaps = np.abs(mask[..., None].astype(int) - [0, 51, 102, 204]).min(axis=-1)
    assert (gaps <= 12).mean() > 0.995  # of a network that has learned nothing
    argv = ["--model_path", tmp_path / "labels" / "model000002.pt", "--sample_dir", tmp_path / "x"]
    result = script("image_sample", *argv, "--mask_encoding", "grey")
    refused(result, "--mask_encoding grey contradicts", "--mask_encoding labels")


def test_a_checkpoint_from_before_the_flag_is_grey(tmp_path):
    path = untrained.save(tmp_path / "model000003.pt", ["Seg", "T1CE"])
    weights = checkpoint.load_weights(path)
    del weights._metadata["improved_diffusion"]["flags"]["mask_encoding"]
    checkpoint.save(weights, path)
    found = load_model_and_diffusion(path)
    assert (found.flags["mask_encoding"], found.encoding.width) == ("grey", 2)
    with pytest.raises(ValueError, match=r"bits contradicts .* --mask_encoding grey"):
        load_model_and_diffusion(path, {"mask_encoding": "bits"})


def test_likelihood_of_the_encoded_channels(slices, script, tmp_path):  # noqa: F811
    def save(name):
        flags = {"mask_encoding": name, "image_size": 32, "diffusion_steps": 4}
        return untrained.save(tmp_path / f"{name}.pt", ["Seg", "T1CE"], **flags)

    argv = ["--data_dir", slices, "--num_samples", 1, "--out_dir", tmp_path / "nll"]
    result = script("image_nll", "--model_path", save("sdf"), *argv)
    refused(result, "sdf.pt was trained with --mask_encoding sdf")
    assert script("image_nll", "--model_path", save("bits"), *argv)[0] == 0
    bits = json.loads((tmp_path / "nll" / "nll.json").read_text())["bits_per_dim"]

    found = load_model_and_diffusion(str(tmp_path / "bits.pt"))
    data = find_training_data(str(slices), channels="Seg,T1CE", in_channels=None)
    image = data.dataset(32)[0][0]
    label = ((image[0] + 1) * 2.5).round().long()  # 0, 1, 2 of the codes' multiples of 51
    encoded = torch.stack([(label >= 2) * 2.0 - 1, (label == 1) * 2.0 - 1, image[1]])[None]
    out = found.diffusion.calc_bpd_loop(
        found.model.eval(), encoded, noise_fn=SampleNoise(0, range(1), "cpu")
    )
    assert bits == pytest.approx(out["total_bpd"].item(), rel=1e-5)


def test_quality_of_samplers_counts_before_decoding(tmp_path):
    path = untrained.save(tmp_path / "model.pt", ["FLAIR", "Seg"], mask_encoding="bits")
    found, sets = load_model_and_diffusion(path), [("ancestral", 3, "uniform")]
    argv = ["--model_path", path, "--data_dir", "", "--out_dir", "", "--num_samples", "5"]
    args = sampling_quality.create_argparser().parse_args([*argv, "--precision", "fp32"])
    sampling_quality.draw_missing(found, sets, tmp_path, args)
    levels = np.load(tmp_path / "ancestral_3_uniform.npy")
    assert levels.shape == (5, 16, 16, 2) and set(np.unique(levels[..., 1])) == {0, 51, 102, 204}
    row = sampling_quality.measure(sets, tmp_path, (levels, levels), ["FLAIR", "Seg"])[-1]

    raw = sampling.draw(
        found.model.eval(),
        found.diffusion,
        range(5),
        (3, 16, 16),
        seed=0,
        device="cpu",
        timesteps=sampling.choose_plan(found.diffusion, sampler="ancestral", steps=3).timesteps,
    )
    off = ((raw[:, 1:].abs() - 1).abs() > 12 / 127.5).any(dim=1).float().mean()
    assert row["off_code_share"]["value"] == pytest.approx(off.item()) and off > 0


# The training step


def inputs_of(loop, batch, cond=None):
    """What a step trains on: images, timesteps and noise."""
    seen = []
    inner = loop.diffusion.training_losses

    def spy(model, x, t, **kwargs):
        seen.append((x, t, kwargs["noise"]))
        return inner(model, x, t, **kwargs)

    loop.diffusion.training_losses = spy
    torch.manual_seed(9)
    loop.forward_backward(batch, cond or {})
    return [torch.cat(parts) for parts in zip(*seen)]


def augmentation():
    return Augmentation(["T1CE"], 0.6, rotate=20.0)


def test_augmentation_leaves_timesteps_and_noise(tmp_path):
    """Its numbers derive from the seed and the step, whatever the microbatch."""
    batch = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = inputs_of(make(tmp_path), batch)
    loop = make(tmp_path, augmentation=augmentation(), microbatch=4, seed=3)
    loop.step = 5
    changed = inputs_of(loop, batch)
    assert torch.equal(plain[0], batch)
    assert torch.equal(changed[1], plain[1]) and torch.equal(changed[2], plain[2])
    generator = torch.Generator().manual_seed(derive_seed(3, "augmentation", 5))
    drawn = augmentation().draw(6, generator)
    expected, _ = augmentation().apply(batch, {}, drawn)
    assert torch.equal(changed[0], expected)
    assert 0 < (changed[0] != batch).flatten(1).any(dim=1).sum() < 6


def test_each_process_changes_its_part_as_one_process_would(tmp_path, monkeypatch):
    batch = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = inputs_of(make(tmp_path, augmentation=augmentation()), batch)
    loop = make(tmp_path, augmentation=augmentation())
    monkeypatch.setattr(dist_util, "rank", lambda: 1)
    monkeypatch.setattr(dist_util, "gather", lambda *values: [(2,), (4,)])
    part = inputs_of(loop, batch[2:])
    assert all(torch.equal(own, all_[2:]) for own, all_ in zip(part, whole))


def test_levels_are_changed_before_they_are_encoded(tmp_path):
    """From uint8 levels of a mask alone to two bits at -1 and 1."""
    levels = torch.zeros(4, 1, 16, 16, dtype=torch.uint8)
    levels[:, :, 4:12, 4:9] = 204
    loop = unet_loop(
        tmp_path,
        encoding=MaskEncoding("bits", ["Seg"]),
        augmentation=Augmentation(["Seg"], 1.0, flip=True),
        network={"mask_encoding": "bits"},
    )
    (x, _, noise) = inputs_of(loop, levels)
    assert x.shape == noise.shape == (4, 2, 16, 16)
    assert torch.equal(x[:, 0], x[:, 1])  # background 00, enhancing tumour 11
    assert x.unique().tolist() == [-1, 1]
    assert len({own.numpy().tobytes() for own in x[:, 0]}) == 4
