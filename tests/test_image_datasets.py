"""Folders of ordinary pictures to batches."""

import contextlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from improved_diffusion.image_datasets import (
    ImageDataset,
    class_names,
    list_pictures,
    load_data,
    open_pictures,
)


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
    picture.save(path, **options)
    return str(path)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def item(path, resolution, **settings):
    return ImageDataset(resolution, [str(path)], **settings)[0][0]


def levels_of(picture):
    """[C, H, W] in [-1, 1] to integer levels, which must be whole but for float32's rounding."""
    levels = (np.asarray(picture, np.float64) + 1) * 127.5
    assert np.abs(levels - levels.round()).max() < 1e-4
    return levels.round().astype(int)


def write_numbered(root, count, size=4, name="p_{:02}.png"):
    """Pictures of one grey level each, 10 times their number."""
    for number in range(count):
        write(root / name.format(number), np.full((size, size, 3), 10 * number, np.uint8))
    return str(root)


def numbers_of(batch):
    return [level // 10 for level in levels_of(batch)[:, 0, 0, 0].tolist()]


def numbers(data, count):
    return [numbers_of(next(data)[0]) for _ in range(count)]


# ------------------------------------------------------------------------------------------- items


def test_rgb_picture_of_the_right_size_is_pixel_exact(tmp_path):
    plane = noise(5, 5, 3)
    picture, cond = ImageDataset(5, [write(tmp_path / "a.png", plane)])[0]
    assert cond == {}
    assert picture.shape == (3, 5, 5) and picture.dtype == np.float32
    for channel in range(3):
        for row in range(5):
            for column in range(5):
                level = np.float32(plane[row, column, channel])
                assert picture[channel, row, column] == level / np.float32(127.5) - np.float32(1)


def test_all_levels_lie_between_minus_one_and_one(tmp_path):
    plane = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = item(write(tmp_path / "a.png", plane), 16, channels=1)
    assert picture.shape == (1, 16, 16) and picture.dtype == np.float32
    assert picture.min() == -1 and picture.max() == 1
    assert np.abs(picture.ravel() - np.linspace(-1, 1, 256)).max() < 1e-7


def test_grey_picture_becomes_rgb(tmp_path):
    plane = noise(4, 4)
    levels = levels_of(item(write(tmp_path / "a.png", plane), 4))
    assert levels.tolist() == [plane.tolist()] * 3


def test_one_channel_is_the_luma_of_rgb(tmp_path):
    plane = noise(6, 6, 3)
    plane[0, :4] = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    levels = levels_of(item(write(tmp_path / "a.png", plane), 6, channels=1))
    red, green, blue = plane.astype(int).transpose(2, 0, 1)
    # ITU-R 601-2 in units of 2 ** -16, rounded, as Pillow has it.
    luma = (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16
    assert levels.tolist() == [luma.tolist()]
    assert luma[0, :4].tolist() == [76, 150, 29, 255]


def palette_picture():
    """Columns 0 and 2 black, columns 1 and 3 dark red; between these numbers lies white."""
    picture = Image.fromarray(np.tile(np.array([0, 2], np.uint8), (4, 2))).convert("P")
    picture.putpalette([0, 0, 0, 255, 255, 255, 200, 0, 0])
    return picture


def test_palette_is_converted_before_scaling(tmp_path):
    path = write(tmp_path / "a.png", palette_picture())
    assert Image.open(path).mode == "P"
    assert levels_of(item(path, 2)).tolist() == [[[100, 100]] * 2, [[0, 0]] * 2, [[0, 0]] * 2]
    # 200 * 19595 / 65536 = 59.8 is a column's grey, 30 the mean of it and black.
    assert levels_of(item(path, 2, channels=1)).tolist() == [[[30, 30]] * 2]


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("RGBA", (10, 20, 30, 0), [10, 20, 30]),
        ("LA", (40, 7), [40, 40, 40]),
        ("1", 1, [255, 255, 255]),
    ],
)
def test_other_modes_become_rgb(tmp_path, mode, pixel, expected):
    path = write(tmp_path / "a.png", Image.new(mode, (2, 2), pixel))
    assert Image.open(path).mode == mode
    assert levels_of(item(path, 2))[:, 1, 1].tolist() == expected


# ----------------------------------------------------------------------------------------- scaling

# 4 rows of 8; the means of 2 x 2 pixels are 1.75, 25.25, 63.75, 8 and 5.25, 100, 200.5, 7. Pillow
# takes the mean of a row's pairs, rounds a half up, and so again down the columns: (15 + 36) / 2
# gives 26 for 25.25, (0 + 128) / 2 gives 64, and (201 + 201) / 2 gives 201.
WIDE = np.array(
    [
        [0, 1, 10, 20, 0, 0, 8, 8],
        [2, 4, 30, 41, 0, 255, 8, 8],
        [5, 5, 100, 100, 200, 201, 7, 7],
        [5, 6, 100, 100, 201, 200, 7, 7],
    ],
    np.uint8,
)


def test_wide_picture_is_halved_by_means_and_cut_in_the_middle(tmp_path):
    levels = levels_of(item(write(tmp_path / "a.png", WIDE), 2, channels=1))
    assert levels.tolist() == [[[26, 64], [100, 201]]]


def test_high_picture_is_halved_by_means_and_cut_in_the_middle(tmp_path):
    levels = levels_of(item(write(tmp_path / "a.png", WIDE.T.copy()), 2, channels=1))
    assert levels.tolist() == [[[26, 100], [64, 201]]]


@pytest.mark.parametrize(("length", "left"), [(2, 0), (3, 0), (4, 1), (5, 1), (6, 2)])
def test_cut_of_an_odd_rest_lies_to_the_upper_left(tmp_path, length, left):
    plane = noise(2, length)
    wide = levels_of(item(write(tmp_path / "a.png", plane), 2, channels=1))
    high = levels_of(item(write(tmp_path / "b.png", plane.T.copy()), 2, channels=1))
    assert wide[0].tolist() == plane[:, left : left + 2].tolist()
    assert high[0].tolist() == plane[:, left : left + 2].T.tolist()


def test_a_quarter_is_two_halvings_with_rounding_between(tmp_path):
    plane = np.zeros((4, 4), np.uint8)
    plane[0] = 1  # means 0.5, 0.5, 0, 0 become 1, 1, 0, 0, and their mean 0.5 becomes 1
    assert levels_of(item(write(tmp_path / "a.png", plane), 1, channels=1)).tolist() == [[[1]]]
    # At once, the mean would be 4 / 16 and round to 0.


def test_halved_as_often_as_possible(tmp_path):
    plane = np.kron(noise(2, 2), np.ones((8, 8), np.uint8))
    levels = levels_of(item(write(tmp_path / "a.png", plane), 2, channels=1))
    assert levels.tolist() == [noise(2, 2).tolist()]  # a bicubic filter would mix the corners


def bicubic_matrix(old, new):
    """[new, old]: Keys's cubic kernel with a = -1/2, widened where the picture shrinks."""
    widening = max(old / new, 1)
    centres = (np.arange(new)[:, None] + 0.5) * (old / new) - 0.5
    x = np.abs(np.arange(old)[None] - centres) / widening
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("old", "new"), [(6, 4), (7, 4), (3, 4), (2, 5)])
def test_the_rest_of_the_way_is_bicubic(tmp_path, old, new):
    plane = noise(old, old) // 2 + 64  # stays within 0..255
    levels = levels_of(item(write(tmp_path / "a.png", plane), new, channels=1))[0]
    matrix = bicubic_matrix(old, new)
    # Pillow rounds twice: after the rows and after the columns.
    assert np.abs(levels - matrix @ plane @ matrix.T).max() < 1.2


def test_halved_first_and_bicubic_after(tmp_path):
    plane = np.kron(noise(6, 6), np.ones((2, 2), np.uint8))  # its halves are exact
    levels = levels_of(item(write(tmp_path / "a.png", plane), 4, channels=1))[0]
    matrix = bicubic_matrix(6, 4)
    expected = np.clip(matrix @ noise(6, 6) @ matrix.T, 0, 255)
    assert np.abs(levels - expected).max() < 1.2


def test_the_longer_side_is_rounded(tmp_path):
    # 3 x 8 to 2: the longer side becomes 5.33, so 5, and columns 1 and 2 of these are kept.
    plane = noise(3, 8) // 2 + 64
    levels = levels_of(item(write(tmp_path / "a.png", plane), 2, channels=1))[0]
    expected = bicubic_matrix(3, 2) @ plane @ bicubic_matrix(8, 5).T
    assert np.abs(levels - expected[:, 1:3]).max() < 1.2


# ----------------------------------------------------------------------------------- low resolution


def test_low_res_is_the_area_mean(tmp_path):
    plane = np.array([[0, 1, 10, 20], [2, 4, 30, 41], [5, 5, 0, 0], [5, 6, 0, 255]], np.uint8)
    path = write(tmp_path / "a.png", np.stack([plane, 255 - plane, plane.T], axis=-1))
    picture, cond = ImageDataset(4, [path], low_res_size=2)[0]
    assert set(cond) == {"low_res"}
    assert cond["low_res"].shape == (3, 2, 2) and cond["low_res"].dtype == np.float32
    means = np.array([[1.75, 25.25], [5.25, 63.75]])  # with their fractions
    expected = np.stack([means, 255 - means, means.T]) / 127.5 - 1
    assert np.abs(cond["low_res"] - expected).max() < 1e-6
    assert levels_of(picture)[0].tolist() == plane.tolist()


def test_low_res_shows_what_the_large_picture_shows(tmp_path):
    path = write(tmp_path / "a.png", WIDE)
    dataset = ImageDataset(2, [path], classes=[3], channels=1, low_res_size=1)
    _, cond = dataset[0]
    mean = (26 + 64 + 100 + 201) / 4
    assert cond["low_res"].shape == (1, 1, 1)
    assert cond["low_res"].item() == pytest.approx(mean / 127.5 - 1, abs=1e-6)
    assert cond["y"] == 3


def test_low_res_windows_overlap_where_sizes_do_not_divide(tmp_path):
    plane = np.array([[0, 60, 120], [0, 60, 120], [6, 66, 126]], np.uint8)
    _, cond = ImageDataset(3, [write(tmp_path / "a.png", plane)], channels=1, low_res_size=2)[0]
    # Rows 0, 1 and rows 1, 2; columns alike.
    expected = np.array([[30.0, 90], [33, 93]]) / 127.5 - 1
    assert np.abs(cond["low_res"][0] - expected).max() < 1e-6


# ------------------------------------------------------------------------------------------- files


def test_pictures_are_found_in_all_folders_in_sorted_order(tmp_path):
    plane = np.zeros((2, 2), np.uint8)
    names = [
        "b.png",
        "c.png",
        "b/z.jpg",
        "b/a/x.JPEG",
        "b/Y.PNG",
        "a.gif",
        "d.jpeg",
        "10.png",
        "9.png",
    ]
    for name in names:
        write(tmp_path / name, plane)
    found = [str(Path(path).relative_to(tmp_path)) for path in list_pictures(str(tmp_path))]
    # By the characters of the names, in every folder; a folder's files come in its place.
    assert found == [
        "10.png",
        "9.png",
        "a.gif",
        "b/Y.PNG",
        "b/a/x.JPEG",
        "b/z.jpg",
        "b.png",
        "c.png",
        "d.jpeg",
    ]


def test_other_files_and_hidden_ones_are_passed_over(tmp_path):
    plane = np.zeros((2, 2), np.uint8)
    write(tmp_path / "a.png", plane)
    for name in ("b.bmp", "c.tiff", ".d.png", ".thumbnails/e.png"):
        write(tmp_path / name, plane)
    for name in ("f.txt", "png", "g.png.txt", "h.npy", "jpg.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty").mkdir()
    assert [Path(path).name for path in list_pictures(str(tmp_path))] == ["a.png"]


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.gif", "a.PNG"])
def test_every_kind_of_file_is_decoded(tmp_path, name):
    path = write(tmp_path / name, np.full((8, 8), 128, np.uint8))
    (found,) = list_pictures(str(tmp_path))
    assert found == path
    levels = levels_of(item(path, 8))
    assert levels.shape == (3, 8, 8) and np.abs(levels - 128).max() <= 1


def test_a_jpeg_of_noise_is_what_pillow_decodes(tmp_path):
    path = write(tmp_path / "a.jpg", noise(8, 8, 3), quality=90)
    expected = np.asarray(Image.open(path)).transpose(2, 0, 1)
    assert levels_of(item(path, 8)).tolist() == expected.tolist()


def test_shards_take_every_nth_file(tmp_path):
    paths = list_pictures(write_numbered(tmp_path, 5))
    for shard, expected in ((0, [0, 2, 4]), (1, [1, 3])):
        dataset = ImageDataset(4, paths, [5, 6, 7, 8, 9], shard=shard, num_shards=2)
        assert len(dataset) == len(expected)
        items = [dataset[place] for place in range(len(dataset))]
        assert [int(levels_of(picture)[0, 0, 0]) // 10 for picture, _ in items] == expected
        assert [int(cond["y"]) for _, cond in items] == [5 + number for number in expected]


# ----------------------------------------------------------------------------------------- classes


def test_classes_are_numbered_by_sorted_names(tmp_path):
    # Sorted paths and sorted class names differ: dog, ant, cat are met in this order.
    names = ["1/dog_1.png", "2/ant_b_2.png", "2/dog_0.png", "3/cat_.png"]
    for name in names:
        write(tmp_path / name, np.zeros((2, 2), np.uint8))
    paths = list_pictures(str(tmp_path))
    assert class_names(paths) == ["ant", "cat", "dog"]
    dataset = open_pictures(str(tmp_path), image_size=2, class_cond=True)
    labels = [dataset[place][1]["y"] for place in range(4)]
    assert [int(label) for label in labels] == [2, 0, 2, 1]
    assert all(label.dtype == np.int64 and label.shape == () for label in labels)
    assert open_pictures(str(tmp_path), image_size=2)[0][1] == {}


def test_folder_names_do_not_make_classes():
    assert class_names(["/x_y/b_1.png", "/z_/a_1.png", "/z_/b_2.png"]) == ["a", "b"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_hold_labels_and_low_res(tmp_path, num_workers):
    for number, name in enumerate(["cat_0.png", "dog_0.png", "cat_1.png"]):
        write(tmp_path / str(number) / name, np.full((4, 4), 10 * number, np.uint8))
    data = load_data(
        data_dir=str(tmp_path),
        batch_size=3,
        image_size=4,
        class_cond=True,
        deterministic=True,
        channels=1,
        low_res_size=2,
        num_workers=num_workers,
    )
    images, cond = next(data)
    assert images.shape == (3, 1, 4, 4) and images.dtype == torch.float32
    assert numbers_of(images) == [0, 1, 2]
    assert set(cond) == {"y", "low_res"}
    assert cond["y"].dtype == torch.int64 and cond["y"].tolist() == [0, 1, 0]
    assert cond["low_res"].shape == (3, 1, 2, 2) and cond["low_res"].dtype == torch.float32
    assert levels_of(cond["low_res"])[:, 0, 1, 1].tolist() == [0, 10, 20]


# ------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("seed", [None, 3])
def test_deterministic_keeps_the_sorted_order_and_starts_over(tmp_path, seed):
    root = write_numbered(tmp_path, 5)
    data = load_data(
        data_dir=root, batch_size=2, image_size=4, deterministic=True, seed=seed, num_workers=0
    )
    # Without a seed as in openai/improved-diffusion, which drops what is left over.
    expected = [[0, 1], [2, 3], [0, 1]] if seed is None else [[0, 1], [2, 3], [4, 0]]
    assert numbers(data, 3) == expected


def test_seed_and_epoch_decide_the_order(tmp_path):
    data = load_data(
        data_dir=write_numbered(tmp_path, 7), batch_size=3, image_size=4, seed=11, num_workers=1
    )
    orders = [np.random.default_rng((11, epoch)).permutation(7) for epoch in range(3)]
    assert np.concatenate(numbers(data, 7)).tolist() == np.concatenate(orders).tolist()


@pytest.mark.parametrize("start", [0, 1, 2, 5])
def test_start_goes_on_where_an_earlier_run_stopped(tmp_path, start):
    settings = {
        "data_dir": write_numbered(tmp_path, 7),
        "batch_size": 3,
        "image_size": 4,
        "seed": 2,
        "num_workers": 0,
    }
    whole = numbers(load_data(**settings), 8)
    assert numbers(load_data(**settings, start=3 * start), 8 - start) == whole[start:]
    assert len({tuple(batch) for batch in whole}) > 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_without_a_seed_the_order_is_that_of_a_plain_loader(tmp_path, num_workers):
    root = write_numbered(tmp_path, 7)

    def reference():
        loader = DataLoader(
            list(range(7)), batch_size=3, shuffle=True, num_workers=num_workers, drop_last=True
        )
        while True:
            yield from loader

    torch.manual_seed(8)
    begin = torch.get_rng_state()
    plain = reference()
    expected = [next(plain).tolist() for _ in range(5)]
    after = torch.get_rng_state()
    torch.manual_seed(8)
    data = load_data(data_dir=root, batch_size=3, image_size=4, num_workers=num_workers)
    assert numbers(data, 5) == expected
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(begin, after)
    assert expected[0] + expected[1] != expected[2] + expected[3]


# ------------------------------------------------------------------------------------------ errors


def refuse(message, **settings):
    """``load_data`` itself refuses, not its first batch, and in one sentence."""
    settings = {"batch_size": 1, "image_size": 4} | settings
    with pytest.raises(ValueError, match=message) as caught:
        load_data(**settings)
    assert "\n" not in str(caught.value)


def test_bad_folders_are_refused(tmp_path):
    refuse(r"--data_dir is missing: name a folder", data_dir="")
    refuse(r"there is no folder .*/none: .*--data_dir", data_dir=str(tmp_path / "none"))
    refuse(r"holds no picture \(\.jpg, \.jpeg, \.png, \.gif\)", data_dir=str(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b").mkdir()
    refuse(r"holds no picture", data_dir=str(tmp_path))
    refuse(r"there is no folder .*a\.txt", data_dir=str(tmp_path / "a.txt"))


def test_bad_settings_are_refused(tmp_path):
    root = write_numbered(tmp_path, 3)
    refuse(r"--batch_size 4: .* has 3 pictures.* 1 to 3", data_dir=root, batch_size=4)
    refuse(r"--batch_size 0: .* 1 to 3", data_dir=root, batch_size=0)
    refuse(r"--in_channels 2: .*3 channels \(RGB\) or 1 \(grey\)", data_dir=root, channels=2)
    refuse(r"--seed -1", data_dir=root, seed=-1)
    images, _ = next(load_data(data_dir=root, batch_size=3, image_size=4, num_workers=0))
    assert len(images) == 3  # as many as there are is fine
    with pytest.raises(ValueError, match="image_paths is empty"):
        ImageDataset(4, [])
    with pytest.raises(ValueError, match="--in_channels 4"):
        ImageDataset(4, ["a.png"], channels=4)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("name", ["p_01.png", "p_01.jpg", "p_01.gif"])
def test_truncated_file_is_one_sentence(tmp_path, name, num_workers):
    write_numbered(tmp_path, 1, size=32)
    path = Path(write(tmp_path / name, noise(32, 32)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data = load_data(
        data_dir=str(tmp_path),
        batch_size=1,
        image_size=32,
        deterministic=True,
        num_workers=num_workers,
    )
    assert numbers(data, 1) == [[0]]
    with pytest.raises(ValueError, match=rf"/{name} cannot be decoded \(.*replace") as caught:
        next(data)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_file_that_is_no_picture_or_gone_is_refused(tmp_path):
    path = tmp_path / "a.png"
    for content in (b"", b"text", b"\x89PNG\r\n\x1a\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.png cannot be decoded"):
            item(path, 4)
    path.unlink()
    with pytest.raises(ValueError, match=r"a\.png cannot be opened \(No such file"):
        item(path, 4)


def test_pipe_named_like_a_picture_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (path,) = list_pictures(str(tmp_path))
    with pytest.raises(ValueError, match=r"a\.png is no file but a folder, a pipe or a device"):
        item(path, 4)


def test_folder_named_like_a_picture_is_a_folder(tmp_path):
    write(tmp_path / "a.png" / "b.png", noise(4, 4))
    assert [Path(path).name for path in list_pictures(str(tmp_path))] == ["b.png"]


def test_links_are_followed_into_no_folder_twice(tmp_path):
    write(tmp_path / "store" / "a.png", noise(4, 4))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b.png").symlink_to(tmp_path / "store" / "a.png")
    found = [
        str(Path(path).relative_to(tmp_path)) for path in list_pictures(str(tmp_path / "data"))
    ]
    assert found == ["data/again/a.png", "data/b.png"]
    (tmp_path / "data" / "lost").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"data/lost is a link that leads nowhere"):
        list_pictures(str(tmp_path / "data"))


def test_pictures_are_told_by_content_and_start_no_program(tmp_path, monkeypatch):
    """PostScript would be given to Ghostscript, whatever the file is called."""
    trap = tmp_path / "trap"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {trap}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded \(no PNG or JPEG or GIF"):
        item(path, 4)
    assert not trap.exists()
    plane = noise(4, 4, 3)
    for form in ("GIF", "WEBP", "JPEG"):
        Image.fromarray(plane).save(path, format=form)
        assert item(path, 4).shape == (3, 4, 4)
    Image.fromarray(plane).save(path, format="TIFF")
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded"):
        item(path, 4)


def test_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Permissions don't bind a superuser, so the system's answer is made up."""
    write_numbered(tmp_path / "a", 2)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"the folder .*/a cannot be read \(Permission denied\)"):
        list_pictures(str(tmp_path))


def test_changed_pixels_are_found_by_the_checksum(tmp_path):
    """Pillow decodes many a PNG with wrong bits into other pixels without a word."""
    plane = np.zeros((32, 32), np.uint8)
    plane[8:24, 4:20] = 100
    path = Path(write(tmp_path / "a.png", plane))
    content = path.read_bytes()
    begin = content.index(b"IDAT") + 4
    end = content.index(b"IEND") - 8
    silent = 0
    for place in range(begin, end):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with contextlib.suppress(Exception), Image.open(path) as picture:
            silent += not np.array_equal(np.asarray(picture), plane)
        with pytest.raises(ValueError, match=r"a\.png .*checksum of a chunk 'IDAT' is wrong"):
            item(path, 32)
    assert silent > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_grey_is_refused(tmp_path, channels):
    path = write(tmp_path / "a.png", np.full((4, 4), 300, np.uint16))
    with pytest.raises(ValueError, match=r"a\.png has 16 or more bits.*expected 8 bits"):
        item(path, 4, channels=channels)


def test_huge_picture_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.png", np.zeros((8, 8), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"a\.png"):
        item(path, 4)


def png(width, height, bits, colour, rows):
    """A PNG with a header and rows that Pillow itself would not write."""

    def chunk(name, content):
        size, check = struct.pack(">I", len(content)), struct.pack(">I", zlib.crc32(name + content))
        return size + name + content + check

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


@pytest.mark.parametrize(("width", "height"), [(1, 80_000_000), (9000, 9000), (8_000_000, 8)])
def test_more_pixels_than_the_file_can_hold_are_refused(tmp_path, width, height):
    """Pillow would allocate hundreds of MiB for the rows of a file of 100 bytes."""
    path = tmp_path / "a.png"
    path.write_bytes(png(width, height, 8, 0, bytes(100)))
    with pytest.raises(ValueError, match=rf"a\.png .*{width}x{height} pixels do not come out of"):
        item(path, 4)


@pytest.mark.parametrize(("width", "height"), [(2048, 2048), (1, 100_000), (100_000, 1)])
def test_empty_pictures_that_compress_best_are_read(tmp_path, width, height):
    path = tmp_path / "a.png"
    path.write_bytes(png(width, height, 1, 0, bytes((1 + (width + 7) // 8) * height)))
    assert levels_of(item(path, 1)).ravel().tolist() == [0, 0, 0]


def test_sixteen_bit_colour_is_refused(tmp_path):
    path = tmp_path / "a.png"
    rows = b"".join(b"\0" + bytes(range(24)) for _ in range(4))
    path.write_bytes(png(4, 4, 16, 2, rows))
    with pytest.raises(ValueError, match=r"a\.png .*expected 8 bits"):
        item(path, 4)
