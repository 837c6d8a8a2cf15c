"""The scripts beyond plain slices: classes, ordinary pictures, super-resolution, likelihood."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_scripts import NETWORK, refused, write_slices

from improved_diffusion import checkpoint, logger
from improved_diffusion.respace import respaced
from improved_diffusion.sampling import SampleNoise, choose_plan, draw, to_levels
from improved_diffusion.script_util import load_model_and_diffusion
from improved_diffusion.training_data import find_training_data

ROOT = Path(__file__).parent.parent
TRAIN = (
    "--batch_size 2 --log_interval 1 --ema_rate 0.9 --num_workers 0 --sample_respacing 2".split()
)
SIZES = ["--large_size", "32", "--small_size", "16"]
SUPER_RES = [*SIZES, *NETWORK[2:]]


@pytest.fixture(scope="module")
def script():
    """Run a script of the project in this process: exit status and error output."""

    def run(name, *argv):
        status, error = 0, io.StringIO()
        before, sys.argv = sys.argv, [name, *map(str, argv)]
        try:
            with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
                runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        finally:
            sys.argv = before
        return status, "", error.getvalue()

    return run


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """Six slices, half of them without a tumour."""
    folder = write_slices(tmp_path_factory.mktemp("data") / "slices", channels=("Seg", "T1CE"))
    for i in (1, 3, 5):
        empty = np.zeros((32, 32), np.uint8)
        Image.fromarray(empty).save(folder / "Seg" / f"Subject_001_slice_{i}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, name in enumerate(("cat", "dog", "cat", "ape")):
        levels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{name}_{i}.png")
    return folder


@pytest.fixture(scope="module")
def trained(script, slices, tmp_path_factory):
    """A class-conditional model of T1CE, whose labels come from masks that it never sees."""
    out = tmp_path_factory.mktemp("trained") / "run"
    argv = ["--data_dir", slices, "--channels", "T1CE", "--class_cond", "True", *NETWORK, *TRAIN]
    argv += ["--batch_size", 6, "--max_steps", 2, "--sample_interval", 2, "--out_dir", out]
    assert script("image_train", *argv)[0] == 0
    return out


def test_tumour_or_not(trained):
    path = str(trained / "ema_0.9_000002.pt")
    about = checkpoint.metadata_of(checkpoint.load_weights(path))
    assert about["classes"] == ["no-tumour", "tumour"]
    assert (about["flags"]["class_cond"], about["flags"]["num_classes"]) == (True, 2)
    assert checkpoint.load_weights(path)["label_emb.weight"].shape == (2, 128)
    rows = logger.read_progress(str(trained / "progress.csv"))
    for row in rows:
        # Three slices of either class in each batch of all six.
        mean = (row["mse_class_tumour"] + row["mse_class_no-tumour"]) / 2
        assert row["mse_T1CE"] == pytest.approx(row["mse"], rel=1e-6)
        assert row["mse"] == pytest.approx(mean, rel=1e-4)
    assert (trained / "previews" / "step000002.png").exists()


def test_classes_are_drawn_in_turn(trained, script, tmp_path):
    argv = ["--model_path", trained / "model000002.pt", "--timestep_respacing", 2]
    argv += ["--num_samples", 5, "--batch_size", 3]
    assert script("image_sample", *argv, "--sample_dir", tmp_path / "both")[0] == 0
    both = np.load(tmp_path / "both" / "samples_5x32x32x1.npz")
    assert both["arr_1"].tolist() == [0, 1, 0, 1, 0]
    record = json.loads((tmp_path / "both" / "samples.json").read_text())
    assert (record["classes"], record["channels"]) == (["no-tumour", "tumour"], ["T1CE"])
    one = ["--classes", "tumour", "--sample_dir", tmp_path / "one"]
    assert script("image_sample", *argv, *one)[0] == 0
    one = np.load(tmp_path / "one" / "samples_5x32x32x1.npz")
    assert one["arr_1"].tolist() == [1] * 5
    # The same noise, so that sample 1 is the same and sample 0 differs by its class alone.
    difference = np.abs(one["arr_0"].astype(int) - both["arr_0"]).max(axis=(1, 2, 3))
    assert difference[1] <= 1 and difference[3] <= 1
    result = script("image_sample", *argv, "--classes", "cat", "--sample_dir", tmp_path / "x")
    refused(result, "no class 'cat'", "no-tumour, tumour")
    assert not (tmp_path / "x").exists()


def test_a_continued_run_keeps_its_classes(trained, script, pictures, tmp_path):
    argv = ["--resume_checkpoint", trained / "model000002.pt", "--out_dir", tmp_path / "more"]
    assert script("image_train", *argv, "--max_steps", 3)[0] == 0
    path = str(tmp_path / "more" / "model000003.pt")
    assert checkpoint.metadata_of(checkpoint.load_weights(path))["classes"][1] == "tumour"
    argv = [*argv[:-1], tmp_path / "other", "--data_dir", pictures]
    refused(script("image_train", *argv), pictures, "--channels T1CE")
    refused(script("image_train", *argv[:-2], "--class_cond", "False"), "--class_cond True")


def test_a_flag_widens_the_number_of_classes(slices, script, tmp_path):
    """With the reference's 1000 classes its own scripts load the checkpoint."""
    argv = ["--data_dir", slices, "--class_cond", "True", *NETWORK, *TRAIN, "--max_steps", 1]
    argv += ["--num_classes", 1000, "--sample_interval", 0, "--out_dir", tmp_path / "run"]
    assert script("image_train", *argv)[0] == 0
    loaded = load_model_and_diffusion(str(tmp_path / "run" / "model000001.pt"))
    assert loaded.model.num_classes == 1000
    assert loaded.classes == ["no-tumour", "tumour"]


@pytest.fixture(scope="module")
def of_pictures(script, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("of_pictures") / "run"
    argv = ["--data_dir", pictures, "--class_cond", "True", *NETWORK, *TRAIN, "--max_steps", 2]
    assert script("image_train", *argv, "--sample_interval", 2, "--out_dir", out)[0] == 0
    return out


def test_ordinary_pictures(of_pictures, script, tmp_path):
    about = checkpoint.metadata_of(checkpoint.load_weights(str(of_pictures / "model000002.pt")))
    assert (about["channels"], about["classes"]) == ([], ["ape", "cat", "dog"])
    assert about["flags"]["in_channels"] == 3
    argv = ["--model_path", of_pictures / "model000002.pt", "--num_samples", 4]
    argv += ["--timestep_respacing", 2, "--sample_dir", tmp_path / "samples"]
    assert script("image_sample", *argv)[0] == 0
    samples = np.load(tmp_path / "samples" / "samples_4x32x32x3.npz")
    names = sorted(path.name for path in (tmp_path / "samples" / "images").iterdir())
    assert names == ["ape_000000.png", "ape_000003.png", "cat_000001.png", "dog_000002.png"]
    picture = Image.open(tmp_path / "samples" / "images" / "cat_000001.png")
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), samples["arr_0"][1])


def test_pictures_continue_as_if_never_stopped(pictures, script, of_pictures, tmp_path):
    argv = ["--data_dir", pictures, "--class_cond", "True", *NETWORK, *TRAIN, "--max_steps", 1]
    argv += ["--sample_interval", 0, "--out_dir", tmp_path / "run"]
    assert script("image_train", *argv)[0] == 0
    argv[argv.index("--max_steps") + 1] = 2
    assert script("image_train", *argv, "--resume_checkpoint", "latest")[0] == 0
    one, two = (
        checkpoint.load_weights(str(folder / "ema_0.9_000002.pt"))
        for folder in (tmp_path / "run", of_pictures)
    )
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_grey_pictures(pictures, script, tmp_path):
    argv = ["--data_dir", pictures, "--in_channels", 1, *NETWORK, *TRAIN, "--max_steps", 1]
    assert script("image_train", *argv, "--out_dir", tmp_path / "run")[0] == 0
    argv = ["--model_path", tmp_path / "run" / "model000001.pt", "--num_samples", 1]
    argv += ["--timestep_respacing", 2, "--sample_dir", tmp_path / "samples"]
    assert script("image_sample", *argv)[0] == 0
    assert Image.open(tmp_path / "samples" / "images" / "sample_000000.png").mode == "L"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--channels", "T1CE"], ["--channels T1CE", "ordinary pictures"]),
        (["--in_channels", 2], ["--in_channels 2", "3 channels"]),
        (["--split", "all"], ["--split all"]),
        (["--batch_size", 5], ["--batch_size 5", "4 pictures"]),
        (["--class_cond", "True", "--num_classes", 2], ["--num_classes 2", "ape, cat, dog"]),
        (["--preset", "upsampler"], ["--preset upsampler", "cifar10"]),
        (["--fp16_scale_growth", 0], ["--fp16_scale_growth 0"]),
    ],
)
def test_bad_flags_for_pictures(pictures, script, tmp_path, argv, parts):
    base = ["--data_dir", pictures, *NETWORK, *TRAIN, "--max_steps", 1]
    refused(script("image_train", *base, "--out_dir", tmp_path / "run", *argv), *parts)
    assert not (tmp_path / "run").exists()


def test_a_preset_is_a_default_that_flags_replace(pictures, script, tmp_path):
    argv = ["--data_dir", pictures, "--preset", "cifar10", *NETWORK, *TRAIN, "--max_steps", 1]
    argv += ["--sample_interval", 0, "--out_dir", tmp_path / "run"]
    assert script("image_train", *argv)[0] == 0
    flags = load_model_and_diffusion(str(tmp_path / "run" / "model000001.pt")).flags
    assert (flags["noise_schedule"], flags["dropout"]) == ("cosine", 0.3)
    assert (flags["diffusion_steps"], flags["num_channels"]) == (20, 32)


def test_half_precision_training(slices, script, tmp_path):
    argv = ["--data_dir", slices, *NETWORK, *TRAIN, "--max_steps", 1, "--use_fp16", "True"]
    assert script("image_train", *argv, "--out_dir", tmp_path / "run")[0] == 0
    (row,) = logger.read_progress(str(tmp_path / "run" / "progress.csv"))
    assert row["lg_loss_scale"] in (19, pytest.approx(20.001))


@pytest.fixture(scope="module")
def super_res(script, slices, tmp_path_factory):
    out = tmp_path_factory.mktemp("super_res") / "run"
    argv = ["--data_dir", slices, "--channels", "T1CE,Seg", *SUPER_RES, *TRAIN, "--max_steps", 1]
    assert script("super_res_train", *argv, "--sample_interval", 1, "--out_dir", out)[0] == 0
    return out


def write_base(folder, samples, **record):
    folder.mkdir(parents=True)
    labels = record.pop("labels", None)
    np.savez(folder / "samples.npz", samples, *([] if labels is None else [labels]))
    (folder / "samples.json").write_text(json.dumps(record))
    return folder


def test_small_samples_become_large_ones(super_res, script, tmp_path):
    assert (super_res / "previews" / "step000001.png").exists()
    loaded = load_model_and_diffusion(str(super_res / "model000001.pt"), super_res=True)
    assert (loaded.flags["large_size"], loaded.flags["small_size"]) == (32, 16)
    assert loaded.channels == ["Seg", "T1CE"]
    base = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 2), dtype=np.uint8)
    folder = write_base(tmp_path / "base", base, channels=["Seg", "T1CE"])
    argv = ["--model_path", super_res / "model000001.pt", "--base_samples", folder]
    argv += ["--timestep_respacing", 2, "--batch_size", 2]
    assert script("super_res_sample", *argv, "--sample_dir", tmp_path / "large")[0] == 0
    samples = np.load(tmp_path / "large" / "samples_3x32x32x2.npz")["arr_0"]

    # Sample 2 by hand: its own noise, and its own base sample with the mask on the codes.
    low_res = base[2:3].astype(int)
    codes = np.array([0, 51, 102, 204])
    low_res[..., 0] = codes[np.abs(low_res[..., :1] - codes).argmin(axis=-1)]
    low_res = torch.tensor(low_res / 127.5 - 1, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = respaced(loaded.diffusion, "2").p_sample_loop(
            loaded.model.eval(),
            (1, 2, 32, 32),
            model_kwargs={"low_res": low_res},
            noise_fn=SampleNoise(0, range(2, 3), "cpu"),
        )
    levels = ((expected[0] + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy()
    assert np.abs(levels - samples[2]).max() <= 1

    more = ["--num_samples", 4, "--sample_dir", tmp_path / "more"]
    assert script("super_res_sample", *argv, *more)[0] == 0
    more = np.load(tmp_path / "more" / "samples_4x32x32x2.npz")["arr_0"]
    assert np.abs(more[:3].astype(int) - samples).max() <= 1


def test_bad_base_samples(super_res, script, tmp_path):
    argv = ["--model_path", super_res / "model000001.pt", "--sample_dir", tmp_path / "out"]
    refused(script("super_res_sample", *argv), "--base_samples is missing")
    refused(script("super_res_sample", *argv, "--base_samples", "nowhere"), "nowhere")
    levels = np.zeros((2, 16, 16, 2), np.uint8)
    base = write_base(tmp_path / "a", levels, channels=["T1", "T2"])
    result = script("super_res_sample", *argv, "--base_samples", base)
    refused(result, "T1,T2", "trained on Seg,T1CE")
    base = write_base(tmp_path / "b", levels[:, :8, :8])
    refused(script("super_res_sample", *argv, "--base_samples", base), "8x8x2", "16x16x2")
    sample = ["--model_path", super_res / "model000001.pt", "--sample_dir", tmp_path / "out"]
    refused(script("image_sample", *sample), "super_res_sample.py")
    assert not (tmp_path / "out").exists()


def test_classes_of_base_samples(pictures, script, tmp_path):
    argv = ["--data_dir", pictures, "--class_cond", "True", *SUPER_RES, *TRAIN, "--max_steps", 1]
    out = tmp_path / "run"
    assert script("super_res_train", *argv, "--sample_interval", 0, "--out_dir", out)[0] == 0
    argv = ["--model_path", out / "model000001.pt", "--timestep_respacing", 2]
    levels = np.zeros((2, 16, 16, 3), np.uint8)
    base = write_base(tmp_path / "a", levels, labels=np.array([2, 0]))
    done = ["--base_samples", base, "--sample_dir", tmp_path / "large"]
    assert script("super_res_sample", *argv, *done)[0] == 0
    assert np.load(tmp_path / "large" / "samples_2x32x32x3.npz")["arr_1"].tolist() == [2, 0]
    base = write_base(tmp_path / "b", levels)
    wrong = ["--base_samples", base, "--sample_dir", tmp_path / "x"]
    refused(script("super_res_sample", *argv, *wrong), "holds no labels", "--classes")
    assert script("super_res_sample", *argv, *wrong, "--classes", "cat")[0] == 0
    assert np.load(tmp_path / "x" / "samples_2x32x32x3.npz")["arr_1"].tolist() == [1, 1]
    base = write_base(tmp_path / "c", levels, labels=np.array([0, 0]), classes=["x", "y", "z"])
    wrong = ["--base_samples", base, "--sample_dir", tmp_path / "y"]
    refused(script("super_res_sample", *argv, *wrong), "x, y, z", "ape, cat, dog")


def test_bits_per_dimension(trained, slices, script, tmp_path):
    argv = ["--model_path", trained / "model000002.pt", "--data_dir", slices, "--seed", 4]
    status, _, error = script("image_nll", *argv, "--batch_size", 4, "--out_dir", tmp_path / "a")
    assert status == 0, error
    record = json.loads((tmp_path / "a" / "nll.json").read_text())
    assert (record["images"], record["timesteps"], record["channels"]) == (6, 20, ["T1CE"])
    table = [line.split(",") for line in (tmp_path / "a" / "images.csv").read_text().splitlines()]
    assert [row[0] for row in table[1:]] == [f"Subject_001_slice_{i}.png" for i in range(1, 7)]
    bits = np.array([float(row[1]) for row in table[1:]])
    assert record["bits_per_dim"] == pytest.approx(bits.mean(), abs=1e-5)
    assert record["standard_error"] == pytest.approx(bits.std(ddof=1) / 6**0.5, abs=1e-5)

    # Image 1 by hand: bound and prior from its own noise, with its own label.
    loaded = load_model_and_diffusion(str(trained / "model000002.pt"))
    levels = np.asarray(Image.open(slices / "T1CE" / "Subject_001_slice_2.png")) / 127.5 - 1
    image = torch.tensor(levels, dtype=torch.float32)[None, None]
    out = loaded.diffusion.calc_bpd_loop(
        loaded.model.eval(),
        image,
        model_kwargs={"y": torch.tensor([1])},
        noise_fn=SampleNoise(4, range(1, 2), "cpu"),
    )
    assert bits[1] == pytest.approx(out["total_bpd"].item(), rel=1e-5)

    # The terms' means; with the prior they add up to the whole. Other batches change nothing.
    terms = np.load(tmp_path / "a" / "vb_terms.npz")["arr_0"]
    assert terms.shape == (20,) and terms.dtype == np.float32
    whole = terms.sum() + record["prior_bits_per_dim"]
    assert record["bits_per_dim"] == pytest.approx(whole, rel=1e-5)
    assert script("image_nll", *argv, "--num_samples", 3, "--out_dir", tmp_path / "b")[0] == 0
    rows = (tmp_path / "b" / "images.csv").read_text().splitlines()[1:]
    assert [float(row.split(",")[1]) for row in rows] == pytest.approx(bits[:3], abs=2e-5)


def test_resized_slices_are_on_whole_levels(trained, slices, script, tmp_path):
    """A likelihood of levels needs levels: those that area averaging left between are rounded."""
    large = tmp_path / "slices"
    for channel in ("Seg", "T1CE"):
        (large / channel).mkdir(parents=True)
        for path in (slices / channel).iterdir():
            image = Image.open(path).resize((48, 48), Image.Resampling.BILINEAR)
            image.save(large / channel / path.name)
    rounded = tmp_path / "rounded"
    data = find_training_data(str(large), channels="T1CE,Seg", in_channels=None)
    dataset = data.dataset(32)
    for i in range(len(dataset)):
        for channel, plane in zip(("Seg", "T1CE"), dataset[i][0]):
            levels = (plane.numpy() + 1) * 127.5
            assert np.abs(levels - levels.round()).max() < 1e-3
            (rounded / channel).mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(levels.round().astype(np.uint8))
            picture.save(rounded / channel / f"Subject_001_slice_{i + 1}.png")
    argv = ["--model_path", trained / "model000002.pt", "--num_samples", 2]
    results = []
    for folder in (large, rounded):
        out = tmp_path / f"nll_{folder.name}"
        assert script("image_nll", *argv, "--data_dir", folder, "--out_dir", out)[0] == 0
        results.append(json.loads((out / "nll.json").read_text())["bits_per_dim"])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_bad_likelihood_flags(trained, slices, script, tmp_path):
    argv = ["--model_path", trained / "model000002.pt", "--data_dir", slices]
    refused(script("image_nll"), "--model_path is missing")
    refused(script("image_nll", *argv, "--batch_size", 0), "--batch_size 0")
    refused(script("image_nll", *argv, "--seed", -1), "--seed -1")
    refused(script("image_nll", *argv, "--out_dir", slices), "already holds something")
    refused(script("image_nll", *argv, "--channels", "T1CE,Seg"), "trained on T1CE")
    refused(script("image_nll", *argv[:-1], tmp_path / "none"), "there is no folder")


def test_a_self_conditioned_model(slices, script, tmp_path):
    """With classes: continued as if never stopped, and sampled as by hand."""
    argv = ["--data_dir", slices, "--channels", "T1CE", "--class_cond", "True", *NETWORK, *TRAIN]
    argv += ["--self_condition", "True", "--eval_interval", 0, "--sample_interval", 1]
    argv += ["--lr", 0.05, "--predict_v", "True"]  # so that two steps teach it something
    assert script("image_train", *argv, "--dry_run", "True", "--max_steps", 2)[0] == 0
    for run, steps in (("whole", [2]), ("parts", [1, 2])):
        for step in steps:
            own = ["--max_steps", step, "--out_dir", tmp_path / run]
            own += ["--resume_checkpoint", "latest"]
            status, _, error = script("image_train", *argv, *own)
            assert status == 0, error
    for name in ("ema_0.9_000002.pt", "previews/step000002.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()

    path = tmp_path / "whole" / "model000002.pt"
    sample = ["--model_path", path, "--num_samples", 4, "--seed", 3, "--precision", "fp32"]
    sample += ["--sampler", "heun", "--sampling_steps", 3, "--sample_dir", tmp_path / "samples"]
    status, _, error = script("image_sample", *sample)
    assert status == 0, error
    loaded = load_model_and_diffusion(str(path))
    plan = choose_plan(loaded.diffusion, sampler="heun", steps=3)
    model = loaded.model.eval()
    drawn = np.load(tmp_path / "samples" / "samples_4x32x32x1.npz")["arr_0"].astype(int)

    def difference(network):
        by_hand = draw(
            *(network, loaded.diffusion, range(4), (1, 32, 32)),
            **{"seed": 3, "device": "cpu", "sampler": "heun", "timesteps": plan.timesteps},
            model_kwargs={"y": torch.tensor([0, 1, 0, 1])},
        )
        return np.abs(drawn - to_levels(by_hand)).max()

    assert difference(model) <= 1
    assert difference(lambda x, t, y, x_self: model(x, t, y)) > 10
    other = script("image_sample", *sample[:-1], tmp_path / "no", "--self_condition", "False")
    refused(other, "--self_condition False contradicts", "--self_condition True")
