"""Slice folders to batches."""

import gc
import json
import os
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import brats_dataset
from brats_dataset import get_BRATS_paths, load_channels_from_dir, load_data, resolve_channels
from improved_diffusion import brats

REPOSITORY = Path(__file__).resolve().parents[1]


def write_png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def level(channel, number):
    return 20 * number + brats.CHANNELS.index(channel)


def write_slices(root, channels=("Seg", "T1CE"), numbers=range(1, 9), size=8, suffixed=True):
    """Constant slices: the level tells channel and slice number. Written in a shuffled order."""
    for channel in channels:
        for number in np.random.default_rng(0).permutation(list(numbers)).tolist():
            stem = f"Subject_001_slice_{number}"
            name = brats.slice_name(stem, channel) if suffixed else f"{stem}.png"
            plane = np.full((size, size), level(channel, number), dtype=np.uint8)
            write_png(Path(root) / channel / name, plane)
    return root


def write_dataset_json(root, splits):
    """``splits``: subject -> (split, slice numbers)."""
    cases = [
        {"subject": subject, "case": subject, "split": split, "slices": list(slices)}
        for subject, (split, slices) in splits.items()
    ]
    content = {"format": "brats-slices", "version": 1, "cases": cases}
    (Path(root) / "dataset.json").write_text(json.dumps(content))


def numbers_of(batch):
    """Slice numbers in a batch of ``write_slices`` (by the last channel, T1CE)."""
    levels = torch.round((batch[:, -1, 0, 0] + 1) * 127.5).int()
    return [(value - brats.CHANNELS.index("T1CE")) // 20 for value in levels.tolist()]


def take(data, count):
    return [next(data)[0] for _ in range(count)]


# ------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("suffixed", [True, False])
def test_paths_are_paired_by_stem_in_fixed_order(tmp_path, suffixed):
    write_slices(tmp_path, channels=brats.CHANNELS, numbers=[10, 9, 1, 2], suffixed=suffixed)
    paths = get_BRATS_paths(["T2", "T1CE", "Seg", "FLAIR", "T1"], str(tmp_path))
    for files, number in zip(paths, [1, 2, 9, 10], strict=True):
        names = [Path(path).parent.name for path in files]
        assert names == list(brats.CHANNELS)
        for path, channel in zip(files, brats.CHANNELS):
            stem = f"Subject_001_slice_{number}"
            assert brats.split_slice_name(Path(path).name, channel) == stem
            assert np.asarray(Image.open(path))[0, 0] == level(channel, number)


def test_paths_pair_mixed_names(tmp_path):
    write_slices(tmp_path, channels=["Seg"], suffixed=False)
    write_slices(tmp_path, channels=["T1CE"])
    paths = get_BRATS_paths(["T1CE", "Seg"], str(tmp_path))
    assert Path(paths[0][0]).name == "Subject_001_slice_1.png"
    assert Path(paths[0][1]).name == "Subject_001_slice_1_T1ce.png"


def test_split_follows_dataset_json(tmp_path):
    write_slices(tmp_path)
    for number in (1, 2):
        for channel in ("Seg", "T1CE"):
            name = brats.slice_name(f"Subject_002_slice_{number}", channel)
            write_png(tmp_path / channel / name, np.zeros((8, 8), dtype=np.uint8))
    write_dataset_json(
        tmp_path, {"Subject_001": ("train", range(1, 9)), "Subject_002": ("test", [1, 2])}
    )
    lengths = {
        split: len(get_BRATS_paths(["T1CE"], str(tmp_path), split))
        for split in ("train", "test", "all")
    }
    assert lengths == {"train": 8, "test": 2, "all": 10}
    assert all("Subject_002" in path for (path,) in get_BRATS_paths(["Seg"], str(tmp_path), "test"))
    with pytest.raises(ValueError, match="--split val"):
        get_BRATS_paths(["T1CE"], str(tmp_path), "val")


def test_folder_without_dataset_json_is_all_training(tmp_path):
    write_slices(tmp_path)
    assert len(get_BRATS_paths(["T1CE"], str(tmp_path), "train")) == 8
    assert len(get_BRATS_paths(["T1CE"], str(tmp_path), "all")) == 8
    with pytest.raises(ValueError, match="there is no test split"):
        get_BRATS_paths(["T1CE"], str(tmp_path), "test")


def test_default_root_and_channels(tmp_path, monkeypatch):
    write_slices(tmp_path / "slices")
    monkeypatch.setattr(brats_dataset, "ROOT", str(tmp_path / "slices"))
    assert len(get_BRATS_paths(["T1CE", "Seg"])) == 8
    batch, cond = next(load_data(batch_size=4, image_size=8))
    assert batch.shape == (4, 2, 8, 8) and batch.dtype == torch.float32 and cond == {}
    assert brats_dataset.CHANNELS == ["T1CE", "Seg"]


# -------------------------------------------------------------------------------------- bad folders


def missing_file(root):
    (root / "Seg" / "Subject_001_slice_5_seg.png").unlink()
    return r"Seg has no file for the slice Subject_001_slice_5, which .*slice_5_T1ce.png"


def missing_listed_file(root):
    write_dataset_json(root, {"Subject_001": ("train", range(1, 10))})
    return r"Seg/Subject_001_slice_9_seg.png is missing: dataset.json lists"


def extra_unlisted_file(root):
    write_dataset_json(root, {"Subject_001": ("train", range(1, 8))})
    return r"Seg/Subject_001_slice_8_seg.png is not listed in dataset.json"


def two_names(root):
    write_png(root / "Seg" / "Subject_001_slice_5.png", np.zeros((8, 8), dtype=np.uint8))
    return "two files for the slice Subject_001_slice_5"


def not_png(root):
    (root / "Seg" / "notes.txt").write_text("x")
    return "Seg/notes.txt is not a PNG file"


def missing_folder(root):
    for path in (root / "Seg").iterdir():
        path.unlink()
    (root / "Seg").rmdir()
    return "has no folder Seg"


def replace(root, array):
    write_png(root / "T1CE" / "Subject_001_slice_3_T1ce.png", array)


def rgb(root):
    replace(root, np.zeros((8, 8, 3), dtype=np.uint8))
    return r"Subject_001_slice_3_T1ce.png is a 8-bit RGB PNG: expected 8-bit grey"


def sixteen_bits(root):
    replace(root, np.zeros((8, 8), dtype=np.uint16))
    return r"Subject_001_slice_3_T1ce.png is a 16-bit grey PNG"


def one_bit(root):
    replace(root, np.zeros((8, 8), dtype=bool))
    return r"Subject_001_slice_3_T1ce.png is a 1-bit grey PNG"


def other_size(root):
    replace(root, np.zeros((16, 16), dtype=np.uint8))
    return r"Subject_001_slice_3_T1ce.png has 16x16 pixels but .* has 8x8"


def truncated_header(root):
    path = root / "T1CE" / "Subject_001_slice_3_T1ce.png"
    path.write_bytes(path.read_bytes()[:20])
    return r"Subject_001_slice_3_T1ce.png is not a PNG file, or is truncated"


def renamed_jpeg(root):
    path = root / "T1CE" / "Subject_001_slice_3_T1ce.png"
    Image.new("L", (8, 8)).save(path, format="JPEG")
    return r"Subject_001_slice_3_T1ce.png is not a PNG file"


def third(root):
    return root / "T1CE" / "Subject_001_slice_3_T1ce.png"


def palette(root):
    Image.new("P", (8, 8)).save(third(root))
    return r"slice_3_T1ce.png is a 1-bit palette PNG"


def with_alpha(root):
    Image.new("LA", (8, 8)).save(third(root))
    return r"slice_3_T1ce.png is a 8-bit grey with alpha PNG"


def promises_too_much(root):
    start = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + struct.pack(">IIBB", 100_000, 100_000, 8, 0)
    for path in root.glob("*/*.png"):
        path.write_bytes(start)
    return r"has 100000x100000 pixels: slices have at most 4096x4096"


def no_bytes(root):
    third(root).write_bytes(b"")
    return r"slice_3_T1ce.png is not a PNG file, or is truncated"


def folder_named_like_a_slice(root):
    third(root).unlink()
    third(root).mkdir()
    return r"slice_3_T1ce.png is not a PNG file: remove it"


def pipe_named_like_a_slice(root):
    third(root).unlink()
    os.mkfifo(third(root))
    return r"slice_3_T1ce.png is no file but a folder, a pipe or a device"


def broken_link(root):
    third(root).unlink()
    third(root).symlink_to(root / "nowhere.png")
    return r"slice_3_T1ce.png is a link that leads nowhere"


def link_to_itself(root):
    third(root).unlink()
    third(root).symlink_to(third(root).name)
    return r"slice_3_T1ce.png is a link that leads nowhere"


def other_case(root):
    third(root).rename(root / "T1CE" / "subject_001_slice_3_T1ce.png")
    return r"has no file for the slice [Ss]ubject_001_slice_3"


def composed_and_decomposed(root):
    write_png(root / "Seg" / "caf\u00e9.png", np.zeros((8, 8), dtype=np.uint8))
    write_png(root / "Seg" / "cafe\u0301.png", np.zeros((8, 8), dtype=np.uint8))
    return "two files for the slice caf\u00e9"


@pytest.mark.parametrize(
    "spoil",
    [
        palette,
        with_alpha,
        promises_too_much,
        no_bytes,
        folder_named_like_a_slice,
        pipe_named_like_a_slice,
        broken_link,
        link_to_itself,
        other_case,
        composed_and_decomposed,
        missing_file,
        missing_listed_file,
        extra_unlisted_file,
        two_names,
        not_png,
        missing_folder,
        rgb,
        sixteen_bits,
        one_bit,
        other_size,
        truncated_header,
        renamed_jpeg,
    ],
)
def test_bad_folder_is_refused_when_load_data_is_called(tmp_path, spoil):
    write_slices(tmp_path)
    message = spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_data(batch_size=2, image_size=8, data_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_hidden_files_are_passed_over(tmp_path):
    write_slices(tmp_path)
    (tmp_path / "Seg" / ".DS_Store").write_bytes(b"x")
    assert len(get_BRATS_paths(["Seg", "T1CE"], str(tmp_path))) == 8


def test_bad_settings_are_refused_when_load_data_is_called(tmp_path):
    write_slices(tmp_path)
    root = str(tmp_path)
    with pytest.raises(ValueError, match=r"--batch_size 9: .* has 8 slices .* hold 1 to 8"):
        load_data(batch_size=9, image_size=8, data_dir=root)
    with pytest.raises(ValueError, match=r"--batch_size 5 on each of 2 processes.* 1 to 4"):
        load_data(batch_size=5, image_size=8, data_dir=root, world_size=2)
    with pytest.raises(ValueError, match="'Foo'"):
        load_data(batch_size=2, image_size=8, data_dir=root, brats_channels=["Foo"])
    with pytest.raises(ValueError, match="--seed -1"):
        load_data(batch_size=2, image_size=8, data_dir=root, seed=-1)
    with pytest.raises(ValueError, match="there is no slice folder"):
        load_data(batch_size=2, image_size=8, data_dir=root + "/none")


def test_names_pair_however_their_accents_are_written(tmp_path):
    """macOS writes an accented letter as two characters, Linux mostly as one."""
    write_png(tmp_path / "Seg" / "caf\u00e9_1_seg.png", np.zeros((8, 8), dtype=np.uint8))
    write_png(tmp_path / "T1CE" / "cafe\u0301_1_T1ce.png", np.zeros((8, 8), dtype=np.uint8))
    ((seg, t1ce),) = get_BRATS_paths(["Seg", "T1CE"], str(tmp_path))
    assert (Path(seg).exists(), Path(t1ce).exists()) == (True, True)
    for subject in ("caf\u00e9", "cafe\u0301"):
        cases = [{"subject": subject, "case": subject, "split": "train", "slices": [1]}]
        content = {"format": "brats-slices", "version": 1, "cases": cases}
        for parent, old, new in (("Seg", "_1_seg", "_slice_1_seg"), ("T1CE", "_1_", "_slice_1_")):
            for path in (tmp_path / parent).glob("caf*"):
                if "_slice_" not in path.name:
                    path.rename(path.with_name(path.name.replace(old, new)))
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        assert len(get_BRATS_paths(["Seg", "T1CE"], str(tmp_path))) == 1


@pytest.mark.parametrize(
    "name", ["my slices", "-slices", "Schichten \u00fc\u4e2d", "a%20b#c", "x\udce9y"]
)
def test_folders_may_have_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_slices(Path(name))
    data = load_data(batch_size=2, image_size=8, data_dir=name, num_workers=0)
    assert next(data)[0].shape == (2, 2, 8, 8)


def test_slices_may_be_links_out_of_the_folder(tmp_path):
    write_slices(tmp_path / "store")
    (tmp_path / "slices").mkdir()
    for channel in ("Seg", "T1CE"):
        (tmp_path / "slices" / channel).symlink_to(tmp_path / "store" / channel)
    data = load_data(
        batch_size=8, image_size=8, data_dir=str(tmp_path / "slices"), deterministic=True
    )
    assert numbers_of(next(data)[0]) == list(range(1, 9))


# Adam7: every eighth pixel first, then what lies between, in seven passes (column, row, steps).
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)]
ADAM7 += [(0, 1, 1, 2)]


def png(plane, chunks=(), interlaced=False):
    """An 8-bit grey PNG of [H, W], byte by byte."""

    def chunk(name, content):
        size, check = struct.pack(">I", len(content)), struct.pack(">I", zlib.crc32(name + content))
        return size + name + content + check

    header = struct.pack(">IIBBBBB", plane.shape[1], plane.shape[0], 8, 0, 0, 0, interlaced)
    passes = [plane[y::h, x::w] for x, y, w, h in ADAM7] if interlaced else [plane]
    rows = b"".join(b"\0" + row.tobytes() for part in passes for row in part)
    chunks = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


@pytest.mark.parametrize(
    ("settings", "behind"),
    [
        ({"interlaced": True}, b""),
        ({}, b"what another program appended"),
        ({"chunks": [(b"tRNS", b"\0\7"), (b"gAMA", struct.pack(">I", 45455))]}, b""),
        ({"chunks": [(b"acTL", struct.pack(">II", 1, 0))]}, b""),  # an animation of one picture
    ],
)
def test_unusual_slices_are_read(tmp_path, settings, behind):
    plane = np.arange(81, dtype=np.uint8).reshape(9, 9) * 3
    path = tmp_path / "T1" / "a.png"
    path.parent.mkdir()
    path.write_bytes(png(plane, **settings) + behind)
    brats_dataset._check_headers([str(path)])
    item, _ = load_channels_from_dir([[str(path)]])[0]
    assert torch.equal(item[0], torch.tensor(plane / 127.5 - 1, dtype=torch.float32))


def test_of_an_animated_slice_the_first_picture_counts(tmp_path):
    first, second = (Image.new("L", (4, 4), level) for level in (51, 204))
    path = tmp_path / "a.png"
    first.save(path, save_all=True, append_images=[second])
    with Image.open(path) as animation:
        assert animation.n_frames == 2
    item, _ = load_channels_from_dir([[str(path)]])[0]
    assert torch.equal(item, torch.full((1, 4, 4), 51 / 127.5 - 1))


def loses_a_file(path):
    path.unlink()
    return r"slice_3_T1ce.png cannot be opened \(No such file or directory\): restore"


def gets_another_size(path):
    Image.new("L", (16, 16)).save(path)
    return r"slice_3_T1ce.png has 16x16 pixels but had 64x64 when the folder was checked"


def gets_another_kind(path):
    Image.new("RGB", (64, 64)).save(path)
    return r"slice_3_T1ce.png has Pillow mode RGB: expected 8-bit grey"


def gets_a_wrong_bit(path):
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    return r"slice_3_T1ce.png cannot be decoded \(the checksum of a chunk 'IDAT' is wrong\)"


def gets_a_pipe(path):
    path.unlink()
    os.mkfifo(path)
    return r"slice_3_T1ce.png is no file but"


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "change", [loses_a_file, gets_another_size, gets_another_kind, gets_a_wrong_bit, gets_a_pipe]
)
def test_folder_that_changes_after_the_check_is_one_sentence(tmp_path, change, num_workers):
    write_slices(tmp_path, channels=["T1CE"], size=64)
    path = tmp_path / "T1CE" / "Subject_001_slice_3_T1ce.png"
    write_png(path, np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8))
    data = load_data(
        batch_size=8,
        image_size=32,
        data_dir=str(tmp_path),
        brats_channels=["T1CE"],
        num_workers=num_workers,
    )
    message = change(path)
    with pytest.raises(ValueError, match=message) as caught:
        next(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_file_unreadable_in_a_worker_is_one_sentence(tmp_path, num_workers):
    write_slices(tmp_path, size=64)
    path = tmp_path / "T1CE" / "Subject_001_slice_3_T1ce.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    data = load_data(batch_size=8, image_size=64, data_dir=str(tmp_path), num_workers=num_workers)
    with pytest.raises(ValueError, match=r"slice_3_T1ce.png cannot be decoded") as caught:
        next(data)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


# ------------------------------------------------------------------------------------------- items


def test_item_is_scaled_to_plus_minus_one(tmp_path):
    plane = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write_png(tmp_path / "T1CE" / "a.png", plane)
    dataset = load_channels_from_dir([[str(tmp_path / "T1CE" / "a.png")]])
    item, cond = dataset[torch.tensor(0)]
    assert item.shape == (1, 16, 16) and item.dtype == torch.float32 and cond == {}
    assert torch.equal(item[0], torch.tensor(plane / 127.5 - 1, dtype=torch.float32))
    assert item.min() == -1 and item.max() == 1
    assert len(dataset) == 1 and dataset.num_channel == 1


def test_transform_is_called_with_the_slice(tmp_path):
    write_png(tmp_path / "T1CE" / "a.png", np.zeros((4, 4), dtype=np.uint8))
    paths = [[str(tmp_path / "T1CE" / "a.png")]]
    assert torch.equal(load_channels_from_dir(paths, torch.neg)[0][0], torch.ones(1, 4, 4))
    _, cond = load_channels_from_dir(paths, torch.neg, low_res_size=2)[0]
    assert torch.equal(cond["low_res"], -torch.ones(1, 2, 2))  # the stored slice's
    with pytest.raises(ValueError, match="no slices"):
        load_channels_from_dir([])


def test_without_image_size_the_stored_size_is_kept(tmp_path):
    plane = np.arange(24, dtype=np.uint8).reshape(4, 6)
    write_png(tmp_path / "T1" / "a.png", plane)
    item, _ = load_channels_from_dir([[str(tmp_path / "T1" / "a.png")]])[0]
    assert item.shape == (1, 4, 6)
    assert torch.equal(item[0], torch.tensor(plane / 127.5 - 1, dtype=torch.float32))


def test_resize_averages_images_and_samples_masks(tmp_path):
    image = np.array([[0, 1, 10, 20], [2, 4, 30, 41], [5, 5, 0, 0], [5, 6, 0, 255]], np.uint8)
    mask = np.array([[0, 51, 102, 204]] * 4, np.uint8)
    write_png(tmp_path / "T1CE" / "a.png", image)
    write_png(tmp_path / "Seg" / "a.png", mask)
    paths = [[str(tmp_path / "Seg" / "a.png"), str(tmp_path / "T1CE" / "a.png")]]
    item, _ = load_channels_from_dir(paths, image_size=2)[0]
    levels = (item.double() + 1) * 127.5
    # Means of 2 x 2 pixels, with their fractions.
    assert torch.allclose(
        levels[1], torch.tensor([[1.75, 25.25], [5.25, 63.75]]).double(), atol=1e-4
    )
    assert torch.allclose(levels[0], torch.tensor([[51.0, 204.0]] * 2).double(), atol=1e-4)
    # Named channels win over folder names: now the first is an image and the second the mask.
    item, _ = load_channels_from_dir(paths, image_size=2, channels=["T1", "Seg"])[0]
    levels = (item.double() + 1) * 127.5
    assert torch.allclose(levels[0], torch.tensor([[25.5, 153.0]] * 2).double(), atol=1e-4)
    assert torch.allclose(levels[1], torch.tensor([[4.0, 41], [6, 255]]).double(), atol=1e-4)


def test_resize_to_a_size_that_does_not_divide_weights_areas(tmp_path):
    write_png(
        tmp_path / "T1" / "a.png", np.array([[0, 60, 120], [0, 60, 120], [6, 66, 126]], np.uint8)
    )
    item, _ = load_channels_from_dir([[str(tmp_path / "T1" / "a.png")]], image_size=2)[0]
    levels = (item.double() + 1) * 127.5
    # A new pixel is 1.5 old ones wide: (0 + 60 / 2) / 1.5 = 20 and (60 / 2 + 120) / 1.5 = 100; the
    # lower row adds 6 * 2 / 3.
    assert torch.allclose(levels[0], torch.tensor([[20.0, 100], [24, 104]]).double(), atol=1e-4)


def test_resize_to_a_larger_size_repeats_pixels(tmp_path):
    write_png(tmp_path / "T1" / "a.png", np.array([[0, 60], [120, 255]], np.uint8))
    item, _ = load_channels_from_dir([[str(tmp_path / "T1" / "a.png")]], image_size=4)[0]
    levels = torch.round((item[0] + 1) * 127.5)
    assert levels[:, 0].tolist() == [0, 0, 120, 120] and levels[3].tolist() == [120, 120, 255, 255]


# ---------------------------------------------------------------------------- labels and low_res


def one_pixel(size, row, column, level):
    mask = np.zeros((size, size), dtype=np.uint8)
    mask[row, column] = level
    return mask


@pytest.mark.parametrize(
    ("level", "expected"),
    [(0, 0), (1, 0), (25, 0), (26, 1), (51, 1), (77, 1), (102, 1), (204, 1), (255, 1)],
)
def test_label_says_whether_the_mask_shows_a_tumour(tmp_path, level, expected):
    # Half-way between the codes 0 and 51 is 25.5.
    write_png(tmp_path / "Seg" / "a.png", one_pixel(4, 3, 0, level))
    write_png(tmp_path / "T1" / "a.png", np.full((4, 4), 255, dtype=np.uint8))
    seg, t1 = str(tmp_path / "Seg" / "a.png"), str(tmp_path / "T1" / "a.png")
    for dataset in (
        load_channels_from_dir([[seg, t1]], None, True),
        load_channels_from_dir([[t1, seg]], None, True),
        load_channels_from_dir([[t1]], None, True, mask_paths=[seg]),
    ):
        item, cond = dataset[torch.tensor(0)]
        assert cond == {"y": expected} and type(cond["y"]) is int
        assert item.shape[0] == dataset.num_channel
    # Without being asked there is none.
    assert load_channels_from_dir([[seg, t1]])[0][1] == {}


@pytest.mark.parametrize(
    ("row", "column", "expected"), [(0, 0, 0), (1, 2, 0), (2, 1, 0), (1, 3, 1)]
)
def test_label_is_that_of_the_resized_mask(tmp_path, row, column, expected):
    # From 4 to 2, nearest neighbour keeps rows and columns 1 and 3.
    write_png(tmp_path / "Seg" / "a.png", one_pixel(4, row, column, 204))
    write_png(tmp_path / "T1" / "a.png", np.zeros((4, 4), dtype=np.uint8))
    seg, t1 = str(tmp_path / "Seg" / "a.png"), str(tmp_path / "T1" / "a.png")
    for paths, mask_paths in (([seg, t1], None), ([t1], [seg])):
        labels = [
            load_channels_from_dir(
                [paths], None, True, image_size=size, low_res_size=low, mask_paths=mask_paths
            )[0][1]["y"]
            for size, low in ((2, None), (2, 4), (4, None), (4, 2), (None, 2))
        ]
        assert labels == [expected, expected, 1, 1, 1]


def test_a_faint_image_is_no_mask(tmp_path):
    """The label comes from the channel that is named Seg, not from the first."""
    write_png(tmp_path / "a.png", one_pixel(4, 1, 1, 204))
    write_png(tmp_path / "b.png", np.zeros((4, 4), dtype=np.uint8))
    paths = [[str(tmp_path / "a.png"), str(tmp_path / "b.png")]]
    for channels, expected in ((["T1", "Seg"], 0), (["Seg", "T1"], 1)):
        dataset = load_channels_from_dir(paths, None, True, channels=channels)
        assert dataset[0][1] == {"y": expected}


def test_label_without_a_mask_is_refused(tmp_path):
    write_png(tmp_path / "T1CE" / "a.png", np.zeros((4, 4), dtype=np.uint8))
    paths = [[str(tmp_path / "T1CE" / "a.png")]]
    with pytest.raises(ValueError, match=r"return_class=True: .* T1CE hold no mask.* add Seg"):
        load_channels_from_dir(paths, None, True)
    write_slices(tmp_path / "slices", channels=["T1CE", "T2"])
    for channels in (["T1CE"], ["T2", "T1CE"]):
        with pytest.raises(ValueError, match=r"--class_cond True: .*slices has no folder Seg"):
            load_data(
                batch_size=2,
                image_size=8,
                data_dir=str(tmp_path / "slices"),
                brats_channels=channels,
                class_cond=True,
            )
    with pytest.raises(ValueError, match="there is no slice folder"):
        load_data(
            batch_size=2,
            image_size=8,
            data_dir=str(tmp_path / "none"),
            brats_channels=["T1CE"],
            class_cond=True,
        )


def test_low_res_averages_images_and_samples_masks(tmp_path):
    image = np.array([[0, 1, 10, 20], [2, 4, 30, 41], [5, 5, 0, 0], [5, 6, 0, 255]], np.uint8)
    write_png(tmp_path / "T1CE" / "a.png", image)
    write_png(tmp_path / "Seg" / "a.png", np.array([[0, 51, 102, 204]] * 4, np.uint8))
    paths = [[str(tmp_path / "Seg" / "a.png"), str(tmp_path / "T1CE" / "a.png")]]
    means = torch.tensor([[1.75, 25.25], [5.25, 63.75]]).double()
    # It is made of the stored slice, so the other size doesn't matter: means of 3 x 3 would differ.
    for image_size in (None, 4, 3, 1):
        item, cond = load_channels_from_dir(paths, image_size=image_size, low_res_size=2)[0]
        assert set(cond) == {"low_res"}
        assert item.shape == (2, image_size or 4, image_size or 4)
        low_res = cond["low_res"]
        assert low_res.shape == (2, 2, 2) and low_res.dtype == torch.float32
        levels = (low_res.double() + 1) * 127.5
        assert torch.allclose(levels[0], torch.tensor([[51.0, 204.0]] * 2).double(), atol=1e-4)
        assert torch.allclose(levels[1], means, atol=1e-4)


def write_labelled(root, channels):
    """Slices 1 to 4; 2 and 3 show a tumour. A slice's number is 20 times in all its images."""
    for number in (1, 2, 3, 4):
        for channel in channels:
            plane = np.full((8, 8), 20 * number, dtype=np.uint8)
            if channel == "Seg":
                plane = one_pixel(8, 1, 1, 102 if number in (2, 3) else 20)
            stem = f"Subject_001_slice_{number}"
            write_png(Path(root) / channel / brats.slice_name(stem, channel), plane)
    return str(root)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("channels", "names"),
    [
        (["T1CE", "Seg"], ["Seg", "T1CE"]),
        (["T2", "FLAIR"], ["FLAIR", "T2"]),
        (["T2"], ["T2"]),
        (["FLAIR"], ["FLAIR"]),
    ],
)
def test_batches_hold_labels_and_low_res(tmp_path, channels, names, num_workers):
    data = load_data(
        batch_size=4,
        image_size=4,
        data_dir=write_labelled(tmp_path, brats.CHANNELS),
        brats_channels=channels,
        class_cond=True,
        seed=3,
        low_res_size=2,
        num_workers=num_workers,
    )
    order = np.random.default_rng((3, 0)).permutation(4) + 1
    images, cond = next(data)
    assert images.shape == (4, len(names), 4, 4)  # the mask is read, but not returned
    last = torch.round((images[:, -1, 0, 0] + 1) * 127.5)
    assert last.tolist() == (20 * order).tolist()
    assert set(cond) == {"y", "low_res"}
    assert cond["y"].shape == (4,) and cond["y"].dtype == torch.int64
    # From 8 to 4, rows and columns 1, 3, 5 and 7 are kept.
    assert cond["y"].tolist() == [int(number in (2, 3)) for number in order]
    assert cond["low_res"].shape == (4, len(names), 2, 2)
    assert cond["low_res"].dtype == torch.float32
    low = torch.round((cond["low_res"][:, -1, 1, 1] + 1) * 127.5)
    assert low.tolist() == (20 * order).tolist()


def test_label_only_masks_are_checked_like_a_channel(tmp_path):
    root = write_labelled(tmp_path, ["Seg", "T1CE"])
    settings = {"batch_size": 2, "image_size": 8, "data_dir": root, "brats_channels": ["T1CE"]}
    path = tmp_path / "Seg" / "Subject_001_slice_3_seg.png"
    write_png(path, np.zeros((8, 8, 3), dtype=np.uint8))
    load_data(**settings)  # without labels nobody looks
    with pytest.raises(ValueError, match=r"slice_3_seg.png is a 8-bit RGB PNG"):
        load_data(**settings, class_cond=True)
    path.unlink()
    with pytest.raises(ValueError, match=r"Seg has no file for the slice Subject_001_slice_3"):
        load_data(**settings, class_cond=True)


def test_classes_are_named_by_label():
    assert brats_dataset.CLASSES == ["no-tumour", "tumour"]


# ----------------------------------------------------------------------------------------- batches


def test_epochs_shuffle_without_replacement(tmp_path):
    write_slices(tmp_path)
    data = load_data(batch_size=3, image_size=8, data_dir=str(tmp_path), seed=1)
    epochs = [[n for batch in take(data, 2) for n in numbers_of(batch)] for _ in range(6)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)  # 8 // 3 batches, 2 slices dropped
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert {n for epoch in epochs for n in epoch} == set(range(1, 9))


def test_deterministic_keeps_the_sorted_order(tmp_path):
    write_slices(tmp_path, numbers=range(1, 12))
    data = load_data(batch_size=4, image_size=8, data_dir=str(tmp_path), deterministic=True)
    order = [numbers_of(batch) for batch in take(data, 4)]
    assert order == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 1], [2, 3, 4, 5]]


@pytest.mark.parametrize("start", [0, 1, 2, 5])
def test_start_goes_on_where_an_earlier_run_stopped(tmp_path, start):
    write_slices(tmp_path)
    settings = {"batch_size": 3, "image_size": 8, "data_dir": str(tmp_path), "seed": 7}
    whole = take(load_data(**settings), 8)
    rest = take(load_data(**settings, start=3 * start), 8 - start)
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))
    assert not torch.equal(
        torch.stack(whole), torch.stack(take(load_data(**settings | {"seed": 8}), 8))
    )


def test_ranks_share_a_global_batch(tmp_path):
    write_slices(tmp_path)
    settings = {"image_size": 8, "data_dir": str(tmp_path), "seed": 3, "num_workers": 0}
    whole = take(load_data(batch_size=4, **settings), 5)
    parts = [
        take(load_data(batch_size=2, rank=rank, world_size=2, **settings), 5) for rank in (0, 1)
    ]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(batch, torch.cat([first, second]))


def test_loading_leaves_the_global_random_state_alone(tmp_path):
    write_slices(tmp_path)
    before = torch.get_rng_state()
    take(load_data(batch_size=2, image_size=8, data_dir=str(tmp_path)), 3)
    assert torch.equal(before, torch.get_rng_state())


def test_workers_outlive_signals_and_end_with_the_main_process(tmp_path):
    write_slices(tmp_path)
    program = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path.insert(0, {str(REPOSITORY)!r})
        from brats_dataset import load_data

        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: None)
        data = load_data(batch_size=2, image_size=8, data_dir={str(tmp_path)!r})
        next(data)
        os.killpg(0, signal.SIGTERM)
        os.killpg(0, signal.SIGINT)
        for _ in range(50):
            next(data)
        print("went on", flush=True)
        """
    )
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "went on\n"
    assert time.monotonic() - start < 30


def test_closing_the_generator_ends_its_worker(tmp_path):
    write_slices(tmp_path)
    others = set(torch.multiprocessing.active_children())
    data = load_data(batch_size=2, image_size=8, data_dir=str(tmp_path))
    next(data)
    children = set(torch.multiprocessing.active_children()) - others
    assert children
    data.close()
    gc.collect()
    assert not children & set(torch.multiprocessing.active_children())


# ------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("channels", "in_channels", "expected"),
    [
        ("", None, ["Seg", "T1CE"]),
        (None, None, ["Seg", "T1CE"]),
        ("T2,FLAIR", None, ["FLAIR", "T2"]),
        ("T1CE,Seg", 2, ["Seg", "T1CE"]),
        ("", 5, list(brats.CHANNELS)),
        ("", 2, ["Seg", "T1CE"]),
        ("", 1, ["T1CE"]),
    ],
)
def test_resolve_channels(channels, in_channels, expected):
    assert resolve_channels(channels, in_channels) == expected


def test_resolve_channels_follows_the_edited_default(monkeypatch):
    monkeypatch.setattr(brats_dataset, "CHANNELS", ["T2", "FLAIR", "Seg"])
    assert resolve_channels("", None) == ["FLAIR", "Seg", "T2"]
    assert resolve_channels("", 3) == ["FLAIR", "Seg", "T2"]
    assert resolve_channels("", 2) == ["Seg", "T1CE"]


@pytest.mark.parametrize(
    ("channels", "in_channels", "message"),
    [
        ("T1CE,Seg", 3, r"--in_channels 3 contradicts --channels T1CE,Seg \(2 channels\)"),
        ("T1CE", 2, r"\(1 channel\)"),
        ("", 3, "--in_channels 3 does not say which"),
        ("", 4, "--channels"),
        ("T1CE,Foo", None, "'Foo'"),
    ],
)
def test_resolve_channels_refuses(channels, in_channels, message):
    with pytest.raises(ValueError, match=message):
        resolve_channels(channels, in_channels)
