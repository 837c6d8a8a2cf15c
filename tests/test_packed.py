import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion.packed import PackedImages, make_pack, to_unit_range
from improved_diffusion.training_data import find_training_data


def write_slices(folder, count=5, size=16):
    rng = np.random.default_rng(0)
    for channel in ("Seg", "T1CE"):
        (folder / channel).mkdir(parents=True)
        for i in range(count):
            levels = rng.integers(0, 256, (size, size), dtype=np.uint8)
            Image.fromarray(levels).save(folder / channel / f"Subject_001_slice_{i}.png")
    return folder


def data_of(folder, **changes):
    settings = {"channels": "T1CE,Seg", "in_channels": None, **changes}
    return find_training_data(str(folder), **settings)


def pack(data, folder, size=16, low_res=None, workers=0):
    dataset = data.dataset(size, low_res)
    make_pack(dataset, data.files(dataset), str(folder), workers)
    return PackedImages(str(folder))


def test_levels_are_scaled_as_by_the_data_sets():
    levels = torch.arange(256, dtype=torch.uint8)
    expected = torch.from_numpy((np.arange(256) / 127.5 - 1).astype(np.float32))
    assert torch.equal(to_unit_range(levels), expected)
    labels = torch.tensor([3, 200])
    assert to_unit_range(labels) is labels


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pack_holds_the_files_levels(tmp_path, workers):
    slices = write_slices(tmp_path / "slices")
    packed = pack(data_of(slices, class_cond=True), tmp_path / "pack", low_res=8, workers=workers)
    assert len(packed) == 5
    images, conds = packed[[4, 0, 2, 1, 3]]
    assert images.dtype == torch.uint8 and images.shape == (5, 2, 16, 16)
    for image, y, low_res, i in zip(images, conds["y"], conds["low_res"], (4, 0, 2, 1, 3)):
        for channel, plane in zip(("Seg", "T1CE"), image):
            file = slices / channel / f"Subject_001_slice_{i}.png"
            np.testing.assert_array_equal(plane.numpy(), np.asarray(Image.open(file)))
        assert y.item() == 1
        means = image[1].double().reshape(8, 2, 8, 2).mean(dim=(1, 3))
        assert (low_res[1] - means).abs().max() <= 0.5
    assert sorted(os.listdir(tmp_path / "pack")) == [
        *("images.npy", "low_res.npy", "pack.json", "y.npy")
    ]


def test_batches_equal_those_of_decoded_files(tmp_path):
    data = data_of(write_slices(tmp_path / "slices"), class_cond=True)
    settings = {"batch_size": 2, "image_size": 16, "seed": 3, "num_workers": 0, "low_res_size": 16}
    decoded = data.batches(**settings, start=2)
    packed = data.batches(**settings, start=2, pack_dir=str(tmp_path / "pack"))
    for _ in range(4):
        (images, cond), (levels, packed_cond) = next(decoded), next(packed)
        assert torch.equal(to_unit_range(levels), images)
        assert torch.equal(packed_cond["y"], cond["y"])
        assert torch.equal(to_unit_range(packed_cond["low_res"]), cond["low_res"])


def test_a_pack_is_made_once(tmp_path):
    data = data_of(write_slices(tmp_path / "slices"))
    pack(data, tmp_path / "pack")
    before = (tmp_path / "pack" / "images.npy").stat().st_mtime_ns
    pack(data, tmp_path / "pack")
    assert (tmp_path / "pack" / "images.npy").stat().st_mtime_ns == before


def test_other_packs_are_refused(tmp_path):
    slices = write_slices(tmp_path / "slices")
    pack(data_of(slices), tmp_path / "pack")
    for data, size in ((data_of(slices), 8), (data_of(slices, channels="T1CE"), 16)):
        with pytest.raises(ValueError, match=r"--pack_dir .*other files, or for another size"):
            pack(data, tmp_path / "pack", size)
    path = slices / "T1CE" / "Subject_001_slice_2.png"
    Image.new("L", (16, 16)).save(path)
    with pytest.raises(ValueError, match="other files"):
        pack(data_of(slices), tmp_path / "pack")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("important")
    with pytest.raises(ValueError, match="no pack of images"):
        pack(data_of(slices), tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_leaves_nothing(tmp_path, workers):
    slices = write_slices(tmp_path / "slices", size=64)
    path = slices / "T1CE" / "Subject_001_slice_3.png"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="slice_3"):
        pack(data_of(slices), tmp_path / "pack", 64, workers=workers)
    assert sorted(os.listdir(tmp_path)) == ["slices"]


def test_the_record_tells_what_is_inside(tmp_path):
    pack(data_of(write_slices(tmp_path / "slices")), tmp_path / "pack")
    record = json.loads((tmp_path / "pack" / "pack.json").read_text())
    assert (record["count"], record["shape"], record["with"]) == (5, [2, 16, 16], {})
