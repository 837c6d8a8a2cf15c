import json

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion import sampling
from improved_diffusion.samples import write_sample_folder
from improved_diffusion.sampling import SampleNoise
from improved_diffusion.script_util import create_gaussian_diffusion
from improved_diffusion.seeds import derive_seed

SHAPE = (2, 4, 4)


def model(x, t):
    """Every sample by itself, so that batches cannot differ by rounding."""
    return torch.tanh(x) + 0.001 * t.reshape(-1, 1, 1, 1)


def draw_all(batch_size, use_ddim=False, seed=3, num_samples=7):
    process = create_gaussian_diffusion(steps=20)
    return np.concatenate(
        list(
            sampling.draw_batches(
                model,
                process,
                num_samples,
                batch_size,
                SHAPE,
                seed=seed,
                device="cpu",
                use_ddim=use_ddim,
            )
        )
    )


@pytest.mark.parametrize("use_ddim", [False, True])
def test_a_sample_depends_on_seed_and_number_alone(use_ddim):
    whole = draw_all(7, use_ddim)
    assert whole.shape == (7, 4, 4, 2)
    for batch_size in (1, 3, 100):
        np.testing.assert_array_equal(draw_all(batch_size, use_ddim), whole)
    np.testing.assert_array_equal(draw_all(2, use_ddim, num_samples=3), whole[:3])
    assert (draw_all(7, use_ddim, seed=4) != whole).any(axis=(1, 2, 3)).all()
    assert len(np.unique(whole.reshape(7, -1), axis=0)) == 7


def test_noise_is_standard_normal_and_new_at_every_step():
    noise = SampleNoise(0, range(500), "cpu")
    first, second = (noise(torch.empty(500, 2, 8, 8)) for _ in range(2))
    for draw in (first, second):
        assert draw.mean().abs() < 0.02
        assert draw.std().item() == pytest.approx(1, abs=0.02)
    correlation = np.corrcoef(first.flatten(), second.flatten())[0, 1]
    assert abs(correlation) < 0.02
    neighbours = np.corrcoef(first[:-1].flatten(), first[1:].flatten())[0, 1]
    assert abs(neighbours) < 0.02


def test_seeds_of_a_stream_are_distinct_in_the_32_bits_that_count():
    seeds = {derive_seed(7, "sample", i) for i in range(100_000)}
    assert len(seeds) == 100_000
    assert max(seeds) < 2**32
    assert derive_seed(7, "sample", 0) != derive_seed(7, "train", 0) != derive_seed(8, "train", 0)


def test_levels_are_the_inverse_of_the_data_scaling():
    levels = torch.arange(256)
    scaled = (levels / 127.5 - 1).reshape(1, 1, 16, 16)
    assert sampling.to_levels(scaled).flatten().tolist() == list(range(256))
    assert sampling.to_levels(torch.tensor([[[[-3.0, 3.0]]]])).flatten().tolist() == [0, 255]


def test_sample_folder(tmp_path):
    levels = np.zeros((3, 8, 8, 2), np.uint8)
    levels[..., 0] = [[[20]], [[90]], [[250]]]  # mask
    levels[..., 1] = [[[7]], [[8]], [[9]]]
    out = tmp_path / "out"
    write_sample_folder(str(out), ["Seg", "T1CE"], [levels[:2], levels[2:]], {"seed": 5})
    np.testing.assert_array_equal(np.load(out / "samples_3x8x8x2.npz")["arr_0"], levels)
    masks = [np.asarray(Image.open(out / f"Seg/sample_{i:06d}_seg.png")) for i in range(3)]
    assert [np.unique(mask).tolist() for mask in masks] == [[0], [102], [204]]
    image = Image.open(out / "T1CE/sample_000002_T1ce.png")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("L", (8, 8), 9)
    record = json.loads((out / "samples.json").read_text())
    assert record.pop("seconds_per_sample") > 0
    assert record == {
        "channels": ["Seg", "T1CE"],
        "shape": [3, 8, 8, 2],
        "seed": 5,
    }
    assert Image.open(out / "grid.png").mode == "RGB"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_sample_folder_is_not_there_before_it_is_complete(tmp_path):
    def broken():
        yield np.zeros((1, 8, 8, 1), np.uint8)
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_sample_folder(str(out), ["T1"], broken(), {})
    assert not out.exists()
    write_sample_folder(str(out), ["T1"], [np.zeros((1, 8, 8, 1), np.uint8)], {})
    assert [p.name for p in (out / "T1").iterdir()] == ["sample_000000_T1.png"]
    with pytest.raises(ValueError, match="already holds something"):
        write_sample_folder(str(out), ["T1"], [], {})


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L"), (4, None)])
def test_samples_without_channel_names(tmp_path, channels, mode):
    """Three channels make colour pictures, one makes grey ones, other numbers make none."""
    out = tmp_path / "out"
    levels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, channels), dtype=np.uint8)
    write_sample_folder(str(out), [], [levels], {}, labels=[1, 0], classes=["ape", "cat"])
    names = sorted(p.name for p in out.iterdir() if p.name != "images")
    assert names == ["grid.png", "samples.json", f"samples_2x8x8x{channels}.npz"]
    assert np.load(out / names[2])["arr_1"].tolist() == [1, 0]
    if mode is None:
        assert not (out / "images").exists()
        return
    pictures = sorted(p.name for p in (out / "images").iterdir())
    assert pictures == ["ape_000001.png", "cat_000000.png"]
    picture = Image.open(out / "images" / "cat_000000.png")
    assert picture.mode == mode
    np.testing.assert_array_equal(np.asarray(picture).reshape(8, 8, channels), levels[0])
