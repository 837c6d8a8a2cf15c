"""The comparison of recipes, and of how far off the level of a channel is predicted."""

import json

import numpy as np
import pytest
import torch
import untrained
from PIL import Image
from test_image_eval import CHANNELS, slices_of, write_slices

from benchmarks import level_errors, recipe, recipe_cost
from improved_diffusion import checkpoint
from improved_diffusion.evaluation import validity
from improved_diffusion.script_util import create_model_and_diffusion, load_model_and_diffusion

MASK = CHANNELS.index("Seg")


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe") / "slices"
    return write_slices(folder, {"train": (0, 1), "test": (4,)})


@pytest.fixture(scope="module")
def real():
    return slices_of((0, 1))


@pytest.fixture(scope="module")
def limits(real):
    return validity.calibrate(validity.measure(real, CHANNELS))


def measured(levels, limits):
    return recipe.measures(levels, np.zeros(len(levels)), CHANNELS, limits)


def test_real_slices_have_every_good_value(real, limits):
    row = measured(real, limits)
    assert row["valid"]["value"] == 1 and row["black"]["value"] == 1
    for name in ("broken_image", "broken_mask", "background", "off_code", "drawn_noise"):
        assert row[name]["value"] == 0, name
    for name, code in (("core", 51), ("oedema", 102), ("enhancing", 204)):
        assert row[name]["value"] == pytest.approx((real[..., MASK] == code).mean()), name


def test_a_quarter_of_broken_channels(real, limits):
    rng = np.random.default_rng(0)
    levels = real.copy()
    levels[::4, ..., CHANNELS.index("T1CE")] = 90  # constant
    levels[1::4, ..., MASK] = rng.integers(0, 256, levels[1::4, ..., MASK].shape)
    row = measured(levels, limits)
    assert row["broken_image"]["value"] == row["broken_mask"]["value"] == 0.25
    assert row["valid"]["value"] == 0.5
    drifted = real.copy()
    drifted[::2] = np.maximum(drifted[::2], 2)
    assert measured(drifted, limits)["black"]["value"] == 0.5
    assert measured(drifted, limits)["background"]["value"] == 1


def test_an_empty_mask_with_residue_looks_like_noise_only_when_stretched(real, limits):
    levels = real.copy()
    residue = np.random.default_rng(0).integers(0, 2, levels[:5, ..., MASK].shape)
    levels[:5, ..., MASK] = residue
    drawn = recipe.looks_like_noise(levels, CHANNELS, limits)
    assert drawn[:5].all() and not drawn[5:].any()
    row = measured(levels, limits)
    assert row["broken_mask"]["value"] == 0
    assert row["drawn_noise"]["value"] == 5 / len(levels)
    assert row["snapped_noise"]["value"] == 0


def test_noise_between_all_levels_stays_noise_when_snapped(real, limits):
    levels = real.copy()
    noise = np.random.default_rng(0).integers(0, 256, levels[:4, ..., MASK].shape)
    levels[:4, ..., MASK] = noise
    row = measured(levels, limits)
    for name in ("broken_mask", "drawn_noise", "snapped_noise"):
        assert row[name]["value"] == 4 / len(levels)


def test_the_flags_of_an_arm():
    """Written out from docs/recipe.md; a one-hot mask has a channel for each of 3 labels."""
    brats = recipe_cost.model_flags("brats", 2)
    assert brats["predict_v"] and not brats["learn_sigma"] and brats["sigma_small"]
    assert (brats["noise_schedule"], brats["loss_weighting"]) == ("cosine", "debiased")
    assert brats["mask_encoding"] == "labels"
    assert (brats["image_size"], brats["num_channels"], brats["in_channels"]) == (64, 32, 2)
    assert recipe_cost.model_flags("cosine, one-hot", 2)["in_channels"] == 4
    assert recipe_cost.model_flags("report", 5)["learn_sigma"]


def test_the_cost_of_arms(monkeypatch, capsys):
    network = "--image_size 32 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1"
    monkeypatch.setattr(recipe, "NETWORK", f"{network} --attention_resolutions 8 --num_heads 1")
    argv = "--batch_size 2 --rounds 1 --steps 1 --threads 1".split()
    arms = ["cosine, self-conditioned", "brats"]
    monkeypatch.setattr("sys.argv", ["recipe_cost", "--arms", ";".join(arms), *argv])
    recipe_cost.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line][2:]
    assert [row[0] for row in rows] == [f"| {name}" for name in arms]
    assert float(rows[0][3].strip(" |")) == 1 and all(float(row[1]) > 0 for row in rows)
    monkeypatch.setattr("sys.argv", ["recipe_cost", "--arms", "report, 250 steps"])
    with pytest.raises(ValueError, match="--arms report, 250 steps: choose from report; noise"):
        recipe_cost.main()


def test_what_has_no_codes_has_no_share_off_them(real, limits):
    row = recipe.measures(real, np.full(len(real), np.nan), CHANNELS, limits)
    assert "off_code" not in row


@pytest.mark.parametrize("predict_v", [False, True])
def test_level_errors_of_a_model_that_predicts_zero(slices, tmp_path, predict_v):
    flags = {**untrained.FLAGS, "in_channels": 3, "predict_v": predict_v, "learn_sigma": False}
    model, _ = create_model_and_diffusion(**flags)  # whose last layer starts at zero
    path = str(tmp_path / "model.pt")
    about = {"flags": flags, "channels": CHANNELS, "step": 0}
    checkpoint.save(checkpoint.with_metadata(model.state_dict(), about), path)
    found = level_errors.level_errors(path, str(slices), timesteps=3, num_slices=5)
    assert [t for t, *_ in found] == [0, 24, 49]

    loaded = load_model_and_diffusion(path)
    data = recipe.find_training_data(str(slices), channels=CHANNELS, in_channels=None, split="test")
    dataset = data.dataset(16)
    images = torch.stack([dataset[i][0] for i in np.linspace(0, 15, 5).astype(int)])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for t, snr, error in found:
        bar = loaded.diffusion.alphas_cumprod[t]
        assert snr == pytest.approx(bar / (1 - bar))
        x_t = bar**0.5 * images + (1 - bar) ** 0.5 * noise
        predicted = bar**0.5 * x_t if predict_v else x_t / bar**0.5
        levels = (predicted - images).mean(dim=(2, 3))
        assert error == pytest.approx(127.5 * levels.square().mean().sqrt().item(), rel=1e-3)


def test_a_study_is_made_once_and_measured(slices, tmp_path, monkeypatch, capsys):
    network = "--image_size 64 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1"
    monkeypatch.setattr(recipe, "NETWORK", f"{network} --attention_resolutions 8 --num_heads 1")
    training = "--batch_size 8 --num_workers 0 --sample_interval 0 --eval_interval 0"
    monkeypatch.setattr(recipe, "TRAINING", training)
    arms = {
        "bits": recipe.Arm(f"{recipe.VELOCITY} --mask_encoding bits"),
        "bits, 2 steps": recipe.Arm(sampling="ddim:2", trained_as="bits"),
        "wrong": recipe.Arm("--lr -1"),
    }
    monkeypatch.setattr(recipe, "ARMS", arms)
    out = tmp_path / "study"
    argv = ["recipe", "--data_dir", str(slices), "--out_dir", str(out), "--images", "8"]
    argv += ["--channels", ",".join(CHANNELS), "--samples", "3", "--at", "1", "--workers", "1"]
    argv += ["--flags", "--batch_size 4 --image_size 32", "--seed", "3", "--split", "all"]
    monkeypatch.setattr("sys.argv", [*argv, "--arms", "bits;bits, 2 steps"])
    recipe.main()
    files = [path for path in out.rglob("*") if path.is_file()]
    assert sum(path.name.startswith("samples") for path in files) == 2
    model = out / "bits" / "seed3" / "run" / "model000002.pt"
    assert load_model_and_diffusion(str(model)).flags["image_size"] == 32
    state = checkpoint.load(str(model.with_name("opt000002.pt")))
    assert state["training"]["flags"]["split"] == "all"
    before = {path: path.stat().st_mtime_ns for path in files if path.suffix in (".npz", ".pt")}
    recipe.main()
    assert {path: path.stat().st_mtime_ns for path in before} == before

    rows = json.loads((out / "recipe.json").read_text())
    assert [(row["arm"], row.get("images"), row.get("seed")) for row in rows] == [
        ("real test slices", None, None),
        ("bits", 8, 3),
        ("bits, 2 steps", 8, 3),
    ]
    with np.load(out / "bits" / "seed3" / "samples8.npz") as arrays:
        assert arrays["levels"].shape == (3, 32, 32, 3) and arrays["off_code"].min() > 0
        assert set(np.unique(arrays["levels"][..., MASK])) <= {0, 51, 102, 204}
        assert rows[1]["off_code"]["value"] == pytest.approx(arrays["off_code"].mean())
    assert Image.open(out / "recipe.png").width > 100
    assert "| bits, 2 steps | 8 | 3 |" in capsys.readouterr().out

    monkeypatch.setattr("sys.argv", [*argv, "--arms", "wrong"])
    with pytest.raises(ValueError, match=r"image_train\.py .* failed; .*train\.txt tells why"):
        recipe.main()
    monkeypatch.setattr("sys.argv", [*argv, "--arms", "none"])
    with pytest.raises(ValueError, match="--arms none: choose from bits; bits, 2 steps; wrong"):
        recipe.main()
