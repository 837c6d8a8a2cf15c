"""What ``--data_dir`` names: slices or pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import brats_dataset
from improved_diffusion import brats
from improved_diffusion.training_data import find_training_data, whole_levels


def write_png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_slices(root, channels=("Seg", "T1CE"), numbers=(1, 2, 3, 10), size=4, subject=1):
    """Constant images of level 10 * number; the mask of every even number is all 102."""
    for channel in channels:
        for number in numbers:
            level = 10 * number
            if channel == "Seg":
                level = 0 if number % 2 else 102
            name = brats.slice_name(f"Subject_{subject:03}_slice_{number}", channel)
            write_png(Path(root) / channel / name, np.full((size, size), level, np.uint8))
    return str(root)


def write_dataset_json(root, splits):
    """``splits``: subject -> (split, slice numbers)."""
    cases = [
        {"subject": f"Subject_{subject:03}", "case": "x", "split": split, "slices": list(slices)}
        for subject, (split, slices) in splits.items()
    ]
    content = {"format": "brats-slices", "version": 1, "cases": cases}
    (Path(root) / "dataset.json").write_text(json.dumps(content))


def write_pictures(root):
    """Four pictures in two classes, of the levels 0, 10, 20, 30 in sorted order."""
    for number, name in enumerate(["1/dog_1.png", "1/dog_2.png", "2/cat_1.png", "2/dog_3.png"]):
        write_png(Path(root) / name, np.full((4, 4, 3), 10 * number, np.uint8))
    return str(root)


def find(data_dir, channels=None, in_channels=None, **settings):
    return find_training_data(data_dir, channels=channels, in_channels=in_channels, **settings)


def levels_of(images):
    return ((images.double() + 1) * 127.5).round().int()


def items_of(dataset):
    return [dataset[place] for place in range(len(dataset))]


# ---------------------------------------------------------------------------------------- slices


@pytest.mark.parametrize("channel", brats.CHANNELS)
def test_one_channel_folder_makes_a_slice_folder(tmp_path, channel):
    (tmp_path / channel).mkdir()
    data = find(str(tmp_path), channels="T2,FLAIR", split="all")
    assert data.channels == ["FLAIR", "T2"] and data.in_channels == 2
    assert (data.data_dir, data.classes, data.split) == (str(tmp_path), [], "all")


def test_dataset_json_makes_a_slice_folder(tmp_path):
    write_pictures(tmp_path)
    assert find(str(tmp_path)).channels == []
    write_dataset_json(tmp_path, {1: ("train", [1])})
    assert find(str(tmp_path)).channels == ["Seg", "T1CE"]


def test_a_file_named_as_a_channel_makes_none(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "T1").write_text("x")
    assert find(str(tmp_path)).channels == []


@pytest.mark.parametrize(
    ("channels", "in_channels", "expected"),
    [
        (None, None, ["Seg", "T1CE"]),
        ("", 1, ["T1CE"]),
        ("T2", None, ["T2"]),
        (["T2", "T1"], 2, ["T1", "T2"]),
        ([], 5, ["FLAIR", "Seg", "T1", "T1CE", "T2"]),
    ],
)
def test_flags_name_the_channels_of_slices(tmp_path, channels, in_channels, expected):
    (tmp_path / "T1").mkdir()
    data = find(str(tmp_path), channels, in_channels)
    assert data.channels == expected and data.in_channels == len(expected)
    assert data.split == "train"


def test_empty_data_dir_is_the_root(tmp_path, monkeypatch):
    monkeypatch.setattr(brats_dataset, "ROOT", write_slices(tmp_path))
    data = find("", "T1CE", class_cond=True)
    assert (data.channels, data.in_channels) == (["T1CE"], 1)
    images, cond = next(data.batches(4, 4, seed=0, num_workers=0))
    assert sorted(levels_of(images)[:, 0, 0, 0].tolist()) == [10, 20, 30, 100]
    assert sorted(cond["y"].tolist()) == [0, 0, 1, 1]
    assert len(data.dataset(4)) == 4


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*/none: "):
        find(str(tmp_path / "none"))


def test_slices_have_two_classes(tmp_path):
    write_slices(tmp_path)
    assert find(str(tmp_path), class_cond=True).classes == ["no-tumour", "tumour"]
    assert find(str(tmp_path), class_cond=False).classes == []
    dataset = find(str(tmp_path), "T1CE", class_cond=True).dataset(4)
    labels = {int(levels_of(image)[0, 0, 0]) // 10: cond["y"] for image, cond in items_of(dataset)}
    assert labels == {1: 0, 2: 1, 3: 0, 10: 1}
    assert find(str(tmp_path), "T1CE").dataset(4)[0][1] == {}


def test_labels_need_the_masks(tmp_path):
    write_slices(tmp_path, channels=["T1CE"])
    data = find(str(tmp_path), "T1CE", class_cond=True)
    for use in (lambda: data.dataset(4), lambda: data.batches(1, 4, seed=0)):
        with pytest.raises(ValueError, match=r"--class_cond True: .* has no folder Seg"):
            use()


def test_slices_of_a_split_come_in_their_natural_order(tmp_path):
    write_slices(tmp_path, numbers=[10, 1, 9])
    write_slices(tmp_path, numbers=[2, 11], subject=2)
    write_dataset_json(tmp_path, {1: ("train", [1, 9, 10]), 2: ("test", [2, 11])})
    expected = {"train": [10, 90, 100], "test": [20, 110], "all": [10, 90, 100, 20, 110]}
    for split, levels in expected.items():
        data = find(str(tmp_path), split=split)
        images = [image for image, _ in items_of(data.dataset(4))]
        assert [int(levels_of(image)[1, 0, 0]) for image in images] == levels
        batch, _ = next(data.batches(len(levels), 4, seed=0, num_workers=0))
        assert sorted(levels_of(batch)[:, 1, 0, 0].tolist()) == sorted(levels)


def write_means(root):
    image = np.array([[0, 1, 10, 20], [2, 4, 30, 41], [5, 5, 0, 0], [5, 6, 0, 255]], np.uint8)
    mask = np.tile(np.array([0, 51, 102, 204], np.uint8), (4, 1))
    write_png(root / "T1CE" / "a.png", image)
    write_png(root / "Seg" / "a.png", mask)
    return find(str(root)), image


def test_dataset_rounds_resized_slices_to_whole_levels(tmp_path):
    data, image = write_means(tmp_path)
    item, cond = data.dataset(2)[0]
    assert item.shape == (2, 2, 2) and item.dtype == torch.float32 and cond == {}
    # The means are 1.75, 25.25, 5.25, 63.75.
    levels = np.array([[[51, 204], [51, 204]], [[2, 25], [5, 64]]])
    assert np.abs(item.double().numpy() - (levels / 127.5 - 1)).max() < 2e-7
    # Nothing changes at the stored size.
    item, _ = data.dataset(4)[0]
    assert np.abs(item[1].double().numpy() - (image / 127.5 - 1)).max() < 2e-7


def test_batches_keep_the_fractions(tmp_path):
    data, _ = write_means(tmp_path)
    images, cond = next(data.batches(1, 2, seed=0, num_workers=0))
    means = np.array([[1.75, 25.25], [5.25, 63.75]])
    assert np.abs(images[0, 1].double().numpy() - (means / 127.5 - 1)).max() < 2e-7
    assert cond == {}


def test_whole_levels():
    levels = torch.arange(256, dtype=torch.float64)
    nudges = torch.tensor([-0.49, -0.1, 0, 0.3, 0.49], dtype=torch.float64)[:, None]
    image = ((levels + nudges).clamp(0, 255) / 127.5 - 1).float()
    whole = whole_levels(image)
    assert whole.dtype == torch.float32
    assert (whole.double() - (levels / 127.5 - 1)).abs().max() < 2e-7
    assert whole[:, 0].eq(-1).all() and whole[:, -1].eq(1).all()


def test_low_res_of_slices(tmp_path):
    data, _ = write_means(tmp_path)
    means = np.array([[1.75, 25.25], [5.25, 63.75]]) / 127.5 - 1
    _, batch_cond = next(data.batches(1, 4, seed=0, num_workers=0, low_res_size=2))
    _, item_cond = data.dataset(4, low_res_size=2)[0]
    for low_res in (batch_cond["low_res"][0], item_cond["low_res"]):
        assert low_res.shape == (2, 2, 2)
        assert levels_of(low_res[0]).tolist() == [[51, 204]] * 2
        assert np.abs(low_res[1].double().numpy() - means).max() < 2e-7


# -------------------------------------------------------------------------------------- pictures


def test_any_other_folder_holds_pictures(tmp_path):
    data = find(write_pictures(tmp_path))
    assert (data.channels, data.in_channels, data.classes) == ([], 3, [])
    assert (data.data_dir, data.split) == (str(tmp_path), "train")
    images = [image for image, _ in items_of(data.dataset(4))]
    assert [tuple(image.shape) for image in images] == [(3, 4, 4)] * 4
    assert [int(levels_of(torch.tensor(image))[2, 3, 3]) for image in images] == [0, 10, 20, 30]


def test_pictures_with_one_channel_are_grey(tmp_path):
    data = find(write_pictures(tmp_path), "", 1)
    assert (data.channels, data.in_channels) == ([], 1)
    assert data.dataset(4)[3][0].shape == (1, 4, 4)
    images, cond = next(data.batches(4, 2, seed=0, num_workers=0))
    assert images.shape == (4, 1, 2, 2) and cond == {}
    assert sorted(levels_of(images)[:, 0, 0, 0].tolist()) == [0, 10, 20, 30]


def test_classes_of_pictures_are_their_sorted_names(tmp_path):
    data = find(write_pictures(tmp_path), in_channels=3, class_cond=True)
    assert data.classes == ["cat", "dog"]
    assert [int(cond["y"]) for _, cond in items_of(data.dataset(4))] == [1, 1, 0, 1]
    images, cond = next(data.batches(4, 4, seed=0, num_workers=0, low_res_size=2))
    assert cond["y"].dtype == torch.int64
    pairs = zip(levels_of(images)[:, 0, 0, 0].tolist(), cond["y"].tolist(), strict=True)
    assert dict(pairs) == {0: 1, 10: 1, 20: 0, 30: 1}
    assert torch.equal(levels_of(cond["low_res"]), levels_of(images)[:, :, :2, :2])
    assert data.dataset(4, low_res_size=1)[1][1]["low_res"].shape == (3, 1, 1)


# ------------------------------------------------------------------------------ order of batches


@pytest.mark.parametrize("write", [write_slices, write_pictures])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_seed_and_start_decide_the_order(tmp_path, write, num_workers):
    data = find(write(tmp_path))
    own_order = [10, 20, 30, 100] if data.channels else [0, 10, 20, 30]
    batches = data.batches(2, 4, seed=5, start=2, num_workers=num_workers)
    got = [levels_of(next(batches)[0])[:, -1, 0, 0].tolist() for _ in range(3)]
    orders = [np.random.default_rng((5, epoch)).permutation(4).tolist() for epoch in (0, 1)]
    expected = [orders[0][2:], orders[1][:2], orders[1][2:]]
    assert got == [[own_order[place] for place in places] for places in expected]


# ---------------------------------------------------------------------------------------- errors


def refuse(message, *args, **settings):
    with pytest.raises(ValueError, match=message) as caught:
        find(*args, **settings)
    assert "\n" not in str(caught.value)


def test_flags_that_contradict_pictures_are_refused(tmp_path):
    root = write_pictures(tmp_path)
    refuse(r"--channels T1CE: .* folder of ordinary pictures.*leave --channels out", root, "T1CE")
    refuse(r"--channels T1,T2: .* holds none of the folders FLAIR, Seg", root, ["T1", "T2"])
    for split in ("test", "all"):
        refuse(rf"--split {split}: .* ordinary pictures.*leave --split out", root, split=split)


def test_pictures_do_not_have_two_channels(tmp_path):
    data = find(write_pictures(tmp_path), in_channels=2)
    for use in (lambda: data.dataset(4), lambda: data.batches(1, 4, seed=0)):
        with pytest.raises(ValueError, match=r"--in_channels 2: ordinary pictures have 3"):
            use()


def test_flags_that_contradict_slices_are_refused(tmp_path):
    root = write_slices(tmp_path)
    refuse("--in_channels 2 contradicts --channels T1CE", root, "T1CE", 2)
    refuse("--in_channels 3 does not say which", root, None, 3)
    refuse("'Foo'", root, ["T1CE", "Foo"])
    with pytest.raises(ValueError, match="--split val"):
        find(root, split="val").dataset(4)


def test_a_folder_without_any_picture_is_refused(tmp_path):
    refuse("holds no picture", str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    refuse("holds no picture", str(tmp_path), class_cond=True)
