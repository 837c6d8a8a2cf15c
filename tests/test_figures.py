import argparse
import builtins
import csv
import glob
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from improved_diffusion import cli, figures, plots
from improved_diffusion.brats import MASK_CODES, PALETTE
from improved_diffusion.samples import write_sample_folder

REPO = Path(__file__).parents[1]
SEED_LOGS = REPO.parent / "shared" / "seed_logs"


@pytest.fixture
def module():
    """``scripts/figures.py`` as a module."""
    spec = importlib.util.spec_from_file_location("figures_script", REPO / "scripts/figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(module, monkeypatch):
    """Runs ``scripts/figures.py`` with the given arguments."""

    def run(*args):
        monkeypatch.setattr("sys.argv", ["figures.py", *map(str, args)])
        module.main()

    return run


@pytest.fixture
def refused(script, capsys):
    """Runs the script, which must end with status 2; its one error line."""

    def run(*args):
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: script(*args))
        assert ended.value.code == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ")
        assert text.count("\n") == 1
        return text.removeprefix("error: ")

    return run


def numbered(n, channels, size=64):
    """Samples whose panels are flat and all different: 20 * sample + channel + 1."""
    level = 20 * np.arange(n)[:, None] + np.arange(channels)[None, :] + 1
    return np.broadcast_to(level[:, None, None, :], (n, size, size, channels)).astype(np.uint8)


def write_csv(path, rows):
    keys = sorted({key for row in rows for key in row})
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, keys, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


# ---------------------------------------------------------------------------------------- panels


@pytest.mark.parametrize("level", [0, 10, 128, 255])
def test_grey_is_absolute(level):
    panel = figures.colour_panel(np.full((4, 6), level, np.uint8), "T1CE")
    assert panel.dtype == np.uint8
    assert panel.shape == (4, 6, 3)
    assert (panel == level).all()


def test_a_faint_residue_stays_invisible():
    image = np.zeros((8, 8), np.uint8)
    image[::2] = 2
    assert figures.colour_panel(image, "FLAIR").max() == 2
    assert (figures.colour_panel(image, "Seg") == PALETTE[0]).all()


def test_masks_go_through_the_palette():
    image = np.array([[0, 51, 102, 204], [25, 60, 100, 255]], np.uint8)
    panel = figures.colour_panel(image, "Seg")
    expected = [[PALETTE[code] for code in MASK_CODES]] * 2
    assert panel.tolist() == [[list(colour) for colour in row] for row in expected]


def test_a_panel_of_another_type_is_refused():
    with pytest.raises(ValueError, match=r"uint8 array of shape \[H, W\], found float32 \[4, 4\]"):
        figures.colour_panel(np.zeros((4, 4), np.float32), "T1")


# ----------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("columns", [1, 2, 3, None])
def test_the_channels_of_a_sample_stand_side_by_side(columns):
    samples = numbered(7, 3)
    picture = np.asarray(figures.sample_grid(samples, ["FLAIR", "T1", "T2"], columns=columns))
    layout = figures.grid_layout(samples.shape, columns=columns)
    for sample in range(7):
        lefts = []
        for channel in range(3):
            left, top = layout.corner(sample, channel)
            panel = picture[top : top + 128, left : left + 128]
            assert (panel == 20 * sample + channel + 1).all()
            lefts.append(left)
        assert np.diff(lefts).tolist() == [128 + figures.PANEL_GAP] * 2
        block = picture[top : top + 128, lefts[0] : lefts[2] + 128]
        gaps = (block == 255).all(axis=(0, 2))
        assert gaps.sum() == 2 * figures.PANEL_GAP, "nothing but the gaps between the panels"
    # Every panel is drawn once: below the names no other pixels have its level.
    for level in (1, 20 * 6 + 3):
        assert (picture[layout.corner(0, 0)[1] :] == level).all(axis=2).sum() == 128 * 128


def test_the_first_panel_lies_below_margin_and_header():
    layout = figures.grid_layout((2, 64, 64, 2), columns=2)
    assert layout.corner(0, 0) == (12, 12 + layout.header)
    assert layout.corner(0, 1) == (12 + 128 + 2, 12 + layout.header)
    assert layout.corner(1, 0) == (12 + 2 * 128 + 2 + 12, 12 + layout.header)
    assert layout.size == (12 + 2 * (258 + 12), 12 + layout.header + 128 + 12)


def test_pixels_are_enlarged_whole():
    samples = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1) * 16
    picture = np.asarray(figures.sample_grid(samples, ["T1"], scale=3))
    left, top = figures.grid_layout(samples.shape, scale=3).corner(0, 0)
    expected = samples[0, :, :, 0].repeat(3, axis=0).repeat(3, axis=1)
    assert (picture[top : top + 12, left : left + 12] == expected[:, :, None]).all()


@pytest.mark.parametrize(("size", "panel"), [(32, 128), (64, 128), (100, 200), (256, 256)])
def test_panels_are_at_least_128_pixels(size, panel):
    layout = figures.grid_layout((1, size, size, 2))
    assert (layout.panel_height, layout.panel_width) == (panel, panel)


@pytest.mark.parametrize(("n", "channels"), [(16, 2), (42, 2), (84, 5), (64, 1)])
def test_many_samples_make_a_near_square(n, channels):
    width, height = figures.grid_layout((n, 64, 64, channels)).size
    assert 0.65 < width / height < 1.55


def test_a_legend_only_where_there_is_a_mask():
    samples = np.zeros((4, 64, 64, 2), np.uint8)
    with_mask = np.asarray(figures.sample_grid(samples, ["Seg", "T1CE"]))
    without = np.asarray(figures.sample_grid(samples, ["FLAIR", "T1CE"]))
    assert with_mask.shape[0] > without.shape[0]
    for code in MASK_CODES[1:]:
        assert (with_mask == PALETTE[code]).all(axis=2).sum() > 100
        assert not (without == PALETTE[code]).all(axis=2).any()


def test_narrow_pictures_hold_the_whole_legend():
    samples = np.zeros((1, 64, 64, 1), np.uint8)
    picture = np.asarray(figures.sample_grid(samples, ["Seg"]))
    for code in MASK_CODES[1:]:
        assert (picture == PALETTE[code]).all(axis=2).sum() > 100
    assert (picture[:, -4:] == 255).all(), "no text runs into the edge"


def test_headers_are_the_channel_names():
    samples = np.zeros((1, 128, 128, 2), np.uint8)
    top = figures.grid_layout(samples.shape).corner(0, 0)[1]
    named, other, unnamed, numbers = (
        np.asarray(figures.sample_grid(samples, names))[:top]
        for names in (["T1", "T2"], ["T1", "FLAIR"], None, ["0", "1"])
    )
    assert (named == 0).any(), "the names are written in black"
    assert (named[:, :141] == other[:, :141]).all()
    assert (named[:, 141:] != other[:, 141:]).any()
    assert (unnamed == numbers).all()


def test_wrong_samples_are_refused():
    with pytest.raises(ValueError, match="2 channels, but 3 are named"):
        figures.sample_grid(numbered(1, 2), ["FLAIR", "Seg", "T1"])
    with pytest.raises(ValueError, match=r"found uint8 \[0, 64, 64, 2\]"):
        figures.sample_grid(numbered(0, 2), ["Seg", "T1"])
    with pytest.raises(ValueError, match="found float64"):
        figures.sample_grid(np.zeros((1, 8, 8, 1)), ["T1"])


def pixels(picture):
    return np.asarray(picture).astype(int)


def test_pictures_of_three_unnamed_channels_are_rgb_in_a_dense_grid():
    samples = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    picture = pixels(figures.sample_grid(samples))
    assert picture.shape == (4 * 66 + 2, 4 * 66 + 2, 3), "64 pixels and 2 between, no header"
    for number, sample in enumerate(samples):
        top, left = (2 + 66 * place for place in divmod(number, 4))
        shown = picture[top : top + 64, left : left + 64]
        assert (shown == sample.repeat(2, axis=0).repeat(2, axis=1)).all()
    named = pixels(figures.sample_grid(samples, ["T1", "T1CE", "T2"]))
    top = figures.grid_layout(samples.shape).header + 12
    assert (named[top : top + 128, 12:140] == samples[0, :, :, :1].repeat(4, 0).repeat(4, 1)).all()


def test_a_picture_of_one_unnamed_channel_is_grey():
    samples = numbered(2, 1)
    picture = pixels(figures.sample_grid(samples, columns=2))
    assert picture.shape == (68, 134, 3)
    assert (picture[2:66, 2:66] == 1).all()
    assert (picture[2:66, 68:132] == 21).all()


def test_columns_are_counted_in_samples():
    samples = numbered(5, 2)
    layout = figures.grid_layout(samples.shape, columns=5)
    picture = pixels(figures.sample_grid(samples, ["T1", "T2"], columns=5))
    assert picture.shape[:2] == (12 + layout.header + 128 + 12, 12 + 5 * (258 + 12))
    left, top = layout.corner(4, 1)
    assert (picture[top : top + 128, left : left + 128] == 82).all()
    with pytest.raises(ValueError, match=r"0 columns .* give 1 or more"):
        figures.sample_grid(samples, columns=0)


def test_a_picture_that_nothing_opens_is_refused():
    samples = np.broadcast_to(np.uint8(0), (20_000, 64, 64, 2))
    with pytest.raises(ValueError, match=r"\d+ x \d+ pixels, .* fewer samples with --num"):
        figures.sample_grid(samples, ["Seg", "T1"])


# ---------------------------------------------------------------------------------------- outlines


def test_an_outline_is_the_rim_of_its_own_region():
    panel = np.full((9, 9, 3), 77, np.uint8)
    mask = np.zeros((9, 9), np.uint8)
    mask[2:7, 1:7] = 102
    mask[4, 4] = 204
    drawn = figures.outlined(panel, mask)
    rim = np.zeros((9, 9), bool)
    rim[2:7, 1:7] = True
    rim[3:6, 2:6] = False
    rim[[3, 5, 4, 4], [4, 4, 3, 5]] = True  # where oedema touches the enhancing pixel
    assert (drawn[rim] == PALETTE[102]).all()
    assert (drawn[4, 4] == PALETTE[204]).all()
    rim[4, 4] = True
    assert (drawn[~rim] == 77).all()
    assert (panel == 77).all(), "the panel itself stays as it is"


def test_outlines_close_at_the_edge_and_can_be_wider():
    panel = np.full((8, 8, 3), 77, np.uint8)
    drawn = figures.outlined(panel, np.full((8, 8), 60, np.uint8), width=2)
    assert (drawn[2:6, 2:6] == 77).all()
    drawn[2:6, 2:6] = PALETTE[51]
    assert (drawn == PALETTE[51]).all(), "level 60 is nearest to code 51"


def masked(n=1, size=64):
    """Samples FLAIR, Seg, T1CE with a square of oedema at rows 16 to 31, columns 32 to 47."""
    samples = numbered(n, 3, size).copy()
    samples[..., 1] = 0
    samples[:, 16:32, 32:48, 1] = 100
    return samples


def test_outlines_lie_over_every_image_and_replace_the_mask():
    picture = pixels(figures.sample_grid(masked(), ["FLAIR", "Seg", "T1CE"], masks="outlines"))
    top = figures.grid_layout((1, 64, 64, 2), min_panel=256).corner(0, 0)[1]
    assert (picture[top : top + 256, 12 + 256 : 12 + 258] == 255).all(), "the second panel follows"
    for left, level in ((12, 1), (12 + 258, 3)):
        panel = picture[top : top + 256, left : left + 256]
        assert (panel[64, 128:192] == PALETTE[102]).all()
        assert (panel[127, 128:192] == PALETTE[102]).all()
        assert (panel[64:128, [128, 191]] == PALETTE[102]).all()
        assert (panel == level).all(axis=2).sum() == 256 * 256 - (64 * 64 - 62 * 62)
    assert picture.shape[1] == 12 + 256 + 2 + 256 + 12, "two panels, not three"
    legend = picture[top + 256 :]
    for code in MASK_CODES[1:]:
        assert (legend == PALETTE[code]).all(axis=2).sum() > 100
    swatches = [(legend == PALETTE[102]).all(axis=2).sum()]
    labels = pixels(figures.sample_grid(masked(), ["FLAIR", "Seg", "T1CE"], scale=4))[top + 256 :]
    assert swatches == [(labels == PALETTE[102]).all(axis=2).sum()]
    assert (labels == 0).all(axis=2).sum() > (legend == 0).all(axis=2).sum() + 200, (
        "only the legend of labels has the background's swatch"
    )


@pytest.mark.parametrize("channels", [["Seg"], ["T1"], None])
def test_outlines_need_a_mask_and_an_image(channels):
    named = ", ".join(channels or ["unnamed"])
    with pytest.raises(ValueError, match=f"channels are {named}: use --masks labels"):
        figures.sample_grid(numbered(1, 1), channels, masks="outlines")


# ------------------------------------------------------------------------ sets beside each other


def test_real_is_left_of_synthetic(tmp_path):
    real, synthetic = numbered(4, 2), numbered(4, 2) + 100
    path = tmp_path / "new" / "compare.png"
    figures.compare_grid(real, synthetic, ["T1", "T1CE"], str(path))
    picture = np.asarray(Image.open(path))
    left, right = np.split(picture, 2, axis=1)
    few = 100  # pixels of grey at the edges of letters
    for level in (1, 2, 61, 62):
        for half, other, shown in ((left, right, level), (right, left, level + 100)):
            assert 0 <= (half == shown).all(axis=2).sum() - 128 * 128 < few
            assert (other == shown).all(axis=2).sum() < few
    assert os.listdir(path.parent) == ["compare.png"]


def test_unequal_numbers_are_not_compared(tmp_path):
    with pytest.raises(ValueError, match="equal numbers"):
        figures.compare_grid(numbered(4, 2), numbered(3, 2), ["T1", "T2"], str(tmp_path / "a.png"))
    assert os.listdir(tmp_path) == []


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    image = Image.new("RGB", (3, 2), (9, 8, 7))
    figures.save_grid(image, str(path))
    assert np.asarray(Image.open(path)).tolist() == [[[9, 8, 7]] * 3] * 2
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match=r"cannot write .*a\.png: disk full"):
            figures.save_grid(Image.new("RGB", (3, 2)), str(path))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]
    with pytest.raises(ValueError, match=r"a\.jpg ends in jpg: expected \.png"):
        figures.save_grid(image, str(tmp_path / "a.jpg"))


# ----------------------------------------------------------------------------------- sample files


def write_samples(folder, samples, channels=None, **record):
    folder.mkdir(parents=True, exist_ok=True)
    n, height, width, count = samples.shape
    path = folder / f"samples_{n}x{height}x{width}x{count}.npz"
    np.savez(path, samples)
    if channels or record:
        text = json.dumps({"channels": channels or [], **record})
        (folder / "samples.json").write_text(text)
    return path


def test_samples_are_read_from_file_or_folder(tmp_path):
    path = write_samples(tmp_path / "a", numbered(3, 2), ["Seg", "T1CE"])
    for place in (path, path.parent):
        samples, channels = figures.read_samples(str(place))
        assert (samples == numbered(3, 2)).all()
        assert channels == ["Seg", "T1CE"]
    assert figures.read_samples(str(write_samples(tmp_path / "b", numbered(3, 2))))[1] is None


def test_bad_sample_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*none\.npz"):
        figures.read_samples(str(tmp_path / "none.npz"))
    with pytest.raises(ValueError, match=r"holds no \.npz file"):
        figures.read_samples(str(tmp_path))
    path = write_samples(tmp_path, numbered(3, 2))
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(ValueError, match=r"samples\.json is not the JSON object"):
        figures.read_samples(str(path))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="is not a sample file"):
        figures.read_samples(str(path))
    np.savez(path, np.zeros((3, 8, 8, 2)))
    with pytest.raises(ValueError, match=r"float64 \[3, 8, 8, 2\], expected uint8"):
        figures.read_samples(str(path))


def test_a_sample_set_knows_how_it_was_made(tmp_path):
    checkpoint = "run/ema_0.9999_060000.pt"
    path = write_samples(tmp_path / "a", numbered(3, 1), step=60000, checkpoint=checkpoint)
    for place in (path, path.parent):
        found = figures.read_sample_set(str(place))
        assert (found.step, found.checkpoint_name) == (60000, "ema_0.9999_060000")
        assert (found.channels, found.folder_name) == (None, "a")
    bare = figures.read_sample_set(str(write_samples(tmp_path / "b", numbered(3, 1))))
    assert (bare.step, bare.checkpoint_name, bare.record) == (None, "b", {})
    assert found.chosen(1, 2)[:, 0, 0, 0].tolist() == [21, 41]
    assert found.chosen(1).shape == (2, 64, 64, 1)
    for start, num in ((2, 2), (3, 0), (-1, 1), (0, -1)):
        with pytest.raises(ValueError, match=f"--start {start} --num {num} of 3 samples in .*a: "):
            found.chosen(start, num)
    write_samples(tmp_path / "c", numbered(3, 1), step="60K")
    with pytest.raises(ValueError, match=r"samples\.json is not the JSON object"):
        figures.read_sample_set(str(tmp_path / "c"))


def test_samples_stay_in_their_file(tmp_path):
    """Mapped they are those that are loaded; what cannot be mapped is loaded all the same."""
    samples = np.random.default_rng(0).integers(0, 256, (5, 16, 12, 3)).astype(np.uint8)
    labels = np.arange(5)
    stored, packed = tmp_path / "stored.npz", tmp_path / "packed.npz"
    np.savez(stored, labels=labels, arr_0=samples, arr_1=labels)
    np.savez_compressed(packed, arr_0=samples)
    turned = tmp_path / "turned.npz"
    np.savez(turned, np.asfortranarray(samples))
    for path in (stored, packed, turned):
        found = figures.read_sample_set(str(path), mapped=True)
        assert isinstance(found.samples, np.memmap) == (path == stored)
        np.testing.assert_array_equal(found.samples, samples)
        assert found.samples.dtype == np.uint8
        loaded = figures.read_sample_set(str(path))
        assert not isinstance(loaded.samples, np.memmap)
        np.testing.assert_array_equal(loaded.samples, samples)
    found = figures.read_sample_set(str(stored), mapped=True)
    assert found.labels.tolist() == [0, 1, 2, 3, 4] and not found.samples.flags.writeable


def test_samples_of_image_sample_stay_in_their_file(tmp_path):
    """Its members are written in one go, with sizes of 64 bits behind their local headers."""
    samples = np.random.default_rng(0).integers(0, 256, (5, 16, 12, 2)).astype(np.uint8)
    write_sample_folder(
        str(tmp_path / "s"),
        ["T1", "Seg"],
        lambda own: samples[own.start : own.stop],
        {},
        num_samples=5,
        batch_size=2,
        shape=(16, 12, 2),
        labels=np.array([0, 1, 0, 1, 1]),
        classes=["no-tumour", "tumour"],
    )
    found = figures.read_sample_set(str(tmp_path / "s"), mapped=True)
    assert isinstance(found.samples, np.memmap)
    np.testing.assert_array_equal(found.samples, samples)
    assert found.labels.tolist() == [0, 1, 0, 1, 1]


def test_damaged_samples_are_not_mapped(tmp_path):
    """A byte of the array, which only the checksum tells; and an end that is missing."""
    path = write_samples(tmp_path, np.zeros((3, 32, 32, 2), np.uint8))
    content = path.read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    for damaged in (changed, content[:-700]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a sample file"):
            figures.read_sample_set(str(path), mapped=True)


def flat_set(folder, level, **record):
    """A sample folder whose sample n has the levels level + n (T1) and level + n + 100 (T2)."""
    level = level + np.arange(4)[:, None] + np.array([0, 100])
    samples = np.broadcast_to(level[:, None, None, :], (4, 64, 64, 2)).astype(np.uint8)
    write_samples(folder, samples, ["T1", "T2"], **record)
    return str(folder)


def blocks(path, sets, columns, gap):
    """Where each set's grid begins in a picture, [left of each], and the top of the panels."""
    picture = pixels(Image.open(path))
    layout = figures.grid_layout((4, 64, 64, 2), columns=columns)
    width = (picture.shape[1] + gap) // sets
    assert layout.size[0] == width - gap
    return picture, [index * width for index in range(sets)], layout


def test_an_evolution_has_a_row_per_sample_and_a_block_per_step(tmp_path):
    folders = [
        flat_set(tmp_path / name, level, step=step)
        for name, level, step in (("x", 10, 20000), ("y", 30, 5000), ("z", 50, 10000))
    ]
    path = str(tmp_path / "new" / "evolution.png")
    figures.write_evolution(folders, path, num=3, start=1)
    picture, lefts, layout = blocks(path, sets=3, columns=1, gap=0)
    heading = picture.shape[0] - (12 + layout.header + 3 * 140)
    assert heading == figures.text_height(18) + 12, "one line above the channels' names"
    for left, level in zip(lefts, (30, 50, 10)):  # 5K, 10K, 20K
        assert (picture[:heading, left : left + layout.size[0]] == 0).any(), "the step is written"
        for row in range(3):
            for channel in range(2):
                x, y = layout.corner(row, channel)
                y += heading
                shown = picture[y : y + 128, left + x : left + x + 128]
                assert (shown == level + 1 + row + 100 * channel).all()


def test_an_evolutions_headers_are_the_steps_or_the_folders(tmp_path, monkeypatch):
    drawn = []
    make = figures.evolution_grid

    def keep(sets, titles, channels, **options):
        drawn.append(titles)
        return make(sets, titles, channels, **options)

    monkeypatch.setattr(figures, "evolution_grid", keep)
    names = ("samples10", "samples9", "b", "a")
    steps = (None, None, 10000, 2500)
    folders = [flat_set(tmp_path / name, 9, step=step) for name, step in zip(names, steps)]
    figures.write_evolution(folders, str(tmp_path / "a.png"), num=1)
    assert drawn == [["2.5K", "10K", "samples9", "samples10"]]
    with pytest.raises(ValueError, match=r"both hold samples of step 10000: .* figures\.py beside"):
        figures.write_evolution([folders[2]] * 2, str(tmp_path / "b.png"))


def test_sets_beside_each_other_keep_order_and_sample_numbers(tmp_path):
    folders = [flat_set(tmp_path / name, level) for name, level in (("raw", 50), ("ema", 10))]
    path = str(tmp_path / "beside.png")
    figures.write_beside(folders, path, num=4)
    picture, lefts, layout = blocks(path, sets=2, columns=1, gap=36)
    heading = picture.shape[0] - layout.size[1]
    for left, level in zip(lefts, (50, 10)):
        for number in range(4):
            x, y = layout.corner(number, 1)
            shown = picture[y + heading : y + heading + 128, left + x : left + x + 128]
            assert (shown == level + number + 100).all()
    assert (picture[12:-12, lefts[1] - 18] == 0).all(), "a line between the sets"


def test_titles_are_checkpoints_then_folders_then_asked_for(tmp_path, monkeypatch):
    drawn = []

    def keep(sets, titles, channels, **options):
        drawn.append(list(titles))
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(figures, "beside_grid", keep)
    out = str(tmp_path / "a.png")
    ema = flat_set(tmp_path / "ema", 1, checkpoint="run/ema_0.9999_060000.pt")
    raw = flat_set(tmp_path / "raw", 1, checkpoint="run/model060000.pt")
    respaced = flat_set(tmp_path / "respaced", 1, checkpoint="run/ema_0.9999_060000.pt")
    figures.write_beside([ema, raw], out, num=4)
    figures.write_beside([ema, respaced], out, num=0)
    figures.write_beside([ema, raw], out, num=1, titles=["EMA", "raw model"])
    assert drawn == [
        ["ema_0.9999_060000", "model060000"],
        ["ema", "respaced"],
        ["EMA", "raw model"],
    ]
    with pytest.raises(ValueError, match=r"3 titles .* for 2 sample folders"):
        figures.write_beside([ema, raw], out, titles=["a", "b", "c"])
    with pytest.raises(ValueError, match="name them with --titles"):
        figures.write_beside([ema, ema], out)
    with pytest.raises(ValueError, match="names 1 folder: give two or more"):
        figures.write_beside([ema], out)


def test_a_long_title_makes_room_for_itself():
    sets = [numbered(1, 1)] * 2
    narrow = pixels(figures.beside_grid(sets, ["a", "b"], ["T1"]))
    wide = pixels(figures.beside_grid(sets, ["a", "a checkpoint with a long name"], ["T1"]))
    assert narrow.shape[1] == 2 * 152 + 36
    width = (wide.shape[1] - 36) // 2
    assert width > 200
    assert (wide[:, -12:] == 255).all(), "no letter in the margin"
    left = (width - 152) // 2 + 12
    top = wide.shape[0] - 12 - 128
    for start in (left, left + width + 36):
        assert (wide[top : top + 128, start : start + 128] == 1).all(), "in the middle"


def test_outlines_go_into_sets_beside_each_other(tmp_path):
    for name, step in (("a", 1), ("b", 2)):
        write_samples(tmp_path / name, masked(2), ["FLAIR", "Seg", "T1CE"], step=step)
    folders = [str(tmp_path / name) for name in "ab"]
    figures.write_beside(folders, str(tmp_path / "beside.png"), num=2, masks="outlines")
    figures.write_evolution(folders, str(tmp_path / "evolution.png"), num=2, masks="outlines")
    figures.compare_grid(
        masked(2),
        masked(2),
        ["FLAIR", "Seg", "T1CE"],
        str(tmp_path / "compare.png"),
        masks="outlines",
    )
    for name in ("beside", "evolution", "compare"):
        picture = pixels(Image.open(tmp_path / f"{name}.png"))
        rims = (picture[:-50] == PALETTE[102]).all(axis=2).sum()
        assert rims == 2 * 2 * 2 * (64 * 64 - 62 * 62), "2 sets of 2 samples with 2 images each"


def test_sets_of_different_kinds_are_not_shown_together(tmp_path):
    first = flat_set(tmp_path / "a", 1, step=1)
    other = str(tmp_path / "b")
    write_samples(tmp_path / "b", numbered(4, 2), ["Seg", "T1"], step=2)
    for write in (figures.write_beside, figures.write_evolution):
        with pytest.raises(ValueError, match=r"a holds .*channels T1, T2, but .*b of .* Seg, T1: "):
            write([first, other], str(tmp_path / "x.png"), num=1)
        with pytest.raises(ValueError, match="--start 0 --num 5 of 4 samples"):
            write([first, flat_set(tmp_path / "c", 1, step=3)], str(tmp_path / "x.png"), num=5)
    assert not (tmp_path / "x.png").exists()


# ----------------------------------------------------------------------------------------- plots


def test_the_later_part_wins_where_parts_overlap(tmp_path):
    early = write_csv(tmp_path / "z.csv", [{"step": s, "loss": 1.0} for s in range(0, 60, 10)])
    late = write_csv(tmp_path / "a.csv", [{"step": s, "loss": 2.0} for s in range(30, 90, 10)])
    last = write_csv(tmp_path / "m.csv", [{"step": s, "loss": 3.0} for s in range(80, 100, 10)])
    for order in ([early, late, last], [last, late, early]):
        rows = plots.join_progress(order)
        assert [row["step"] for row in rows] == list(range(0, 100, 10))
        assert [row["loss"] for row in rows] == [1.0] * 3 + [2.0] * 5 + [3.0] * 2


def test_lost_work_inside_one_file_is_replaced_too(tmp_path):
    steps = [0, 10, 20, 30, 20, 30, 40]
    path = write_csv(tmp_path / "p.csv", [{"step": s, "loss": i} for i, s in enumerate(steps)])
    rows = plots.join_progress([path])
    assert [(row["step"], row["loss"]) for row in rows] == [
        (0, 0), (10, 1), (20, 4), (30, 5), (40, 6),
    ]  # fmt: skip


def test_smoothing_is_an_average_that_follows_a_steep_start():
    assert plots.smoothed(np.full(50, 3.0), 0.99).tolist() == pytest.approx([3.0] * 50)
    values = np.array([1.0, 4.0, 2.0])
    assert plots.smoothed(values, 0.0).tolist() == [1.0, 4.0, 2.0]
    # By hand: the past weighs 2/11 at the second value and 0.2 (3/12 is more) at the third.
    second = 1 * 2 / 11 + 4 * 9 / 11
    assert plots.smoothed(values, 0.2).tolist() == pytest.approx(
        [1, second, 0.2 * second + 0.8 * 2]
    )
    steep = np.concatenate([np.ones(5), np.full(95, 0.001)])
    assert plots.smoothed(steep, 0.99)[60] < 0.0011


def test_smoothing_over_a_width_does_not_depend_on_the_number_of_rows():
    x = np.arange(0, 1001, 10.0)
    assert plots.smoothed_over(x, np.full(101, 3.0), 50) == pytest.approx(np.full(101, 3.0))
    values = np.sin(x)
    assert (plots.smoothed_over(x, values, 0) == values).all()
    # By hand: at x = 10 the width is 1, at x = 20 it is 2, as much as is asked for.
    second = 1 * np.exp(-10) + 4 * (1 - np.exp(-10))
    third = second * np.exp(-5) + 2 * (1 - np.exp(-5))
    smooth = plots.smoothed_over(np.array([0, 10, 20.0]), np.array([1, 4, 2.0]), 2)
    assert smooth.tolist() == pytest.approx([1, second, third])
    # A step from 1 to 0 is forgotten at the same place by logs with many and with few rows.
    for spacing in (1, 50):
        x = np.arange(0, 4001, spacing)
        smooth = plots.smoothed_over(x, (x <= 2000).astype(float), 100)
        assert smooth[x == 2100] == pytest.approx(np.exp(-1))


def axes_of(monkeypatch, plot, *args, **kwargs):
    """The axes that a plot function draws."""
    kept = []
    make = plots.new_figure
    monkeypatch.setattr(plots, "new_figure", lambda: kept.append(make()) or kept[-1])
    plot(*args, **kwargs)
    (axes,) = kept[0].axes
    return axes


def curves_of(monkeypatch, *args, **kwargs):
    """A loss plot's strong curves by label, as arrays [2, rows] of x and y."""
    axes = axes_of(monkeypatch, plots.loss_plot, *args, **kwargs)
    assert axes.get_yscale() == "log"
    lines = {line.get_label(): line for line in axes.lines}
    return {name: np.array(line.get_data()) for name, line in lines.items() if name[0] != "_"}


def test_a_loss_plot_has_a_labelled_curve_per_quartile(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = [
        {"step": s, "samples": 7 * s, "loss": 0.5, **{f"loss_q{q}": 10.0**-q for q in range(4)}}
        for s in range(10, 60, 10)
    ]
    del rows[2]["loss_q1"]
    path = write_csv(tmp_path / "progress.csv", rows)
    curves = curves_of(monkeypatch, [path], str(tmp_path / "a.png"))
    assert list(curves) == [
        "all t",
        "q0: t in the first quarter (least noise)",
        "q1: t in the second quarter",
        "q2: t in the third quarter",
        "q3: t in the last quarter (most noise)",
    ]
    assert [curve[1][-1] for curve in curves.values()] == pytest.approx([0.5, 1, 0.1, 0.01, 0.001])
    assert curves["all t"][0].tolist() == [10, 20, 30, 40, 50]
    assert curves["q1: t in the second quarter"][0].tolist() == [10, 20, 40, 50]
    curves = curves_of(monkeypatch, [path], str(tmp_path / "a.pdf"), x="samples")
    assert curves["all t"][0].tolist() == [70, 140, 210, 280, 350]
    assert sorted(os.listdir(tmp_path)) == ["a.pdf", "a.png", "progress.csv"]
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    width, height = Image.open(tmp_path / "a.png").size
    assert (width, height) == (1400, pytest.approx(920, abs=1))  # releases round differently


def ramp(path, step, batch, values):
    rows = [
        {"step": step * n, "samples": batch * step * n, "loss_q1": value, "vb": -value}
        for n, value in enumerate(values)
    ]
    return write_csv(path, rows)


def test_terms_and_logarithmic_axes_are_chosen(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = ramp(tmp_path / "p.csv", 10, 4, [3.0, 2.0, float("nan"), 1.0])
    out = str(tmp_path / "a.png")
    options = {"terms": ["vb", "loss_q1"], "smooth": 0.0}
    axes = axes_of(monkeypatch, plots.loss_plot, [path], out, log_y=False, **options)
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")
    faint, strong = axes.lines[:2]
    for line in (faint, strong):
        assert np.array(line.get_data()).tolist() == [[0, 10, 30], [-3, -2, -1]]
    assert [line.get_label() for line in axes.lines[1::2]] == [
        "vb",
        "loss_q1: t in the second quarter",
    ]
    assert len({line.get_color() for line in axes.lines}) == 2
    axes = axes_of(monkeypatch, plots.loss_plot, [path], out, log_x=True, x="samples", **options)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.lines[2].get_xdata().tolist() == [40, 120], "nothing at x = 0"
    with pytest.raises(
        ValueError, match=r"no row has step and mse_T1CE, .* loss_q1, samples, step"
    ):
        plots.loss_plot([path], out, terms=["vb", "mse_T1CE"])


def test_curves_compare_one_column_across_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    runs = {
        "small": [
            ramp(tmp_path / "s1.csv", 10, 1, [9.0, 8.0]),
            write_csv(tmp_path / "s2.csv", [{"step": 10, "samples": 10, "loss_q1": 7}]),
        ],
        "large": [ramp(tmp_path / "l.csv", 10, 5, [6.0, 5.0, 4.0])],
    }
    out = str(tmp_path / "a.pdf")
    axes = axes_of(monkeypatch, plots.curve_plot, runs, out, smooth=0, log_y=False)
    assert [line.get_label() for line in axes.lines[1::2]] == ["small", "large"]
    drawn = [np.array(line.get_data()).tolist() for line in axes.lines[1::2]]
    assert drawn == [[[0, 10], [9, 7]], [[0, 50, 100], [6, 5, 4]]]
    assert axes.get_xlabel() == "images seen"
    assert axes.get_ylabel() == "loss_q1: t in the second quarter (faint: as logged)"
    curves = plots.run_curves(runs, x="step", x_max=10, log_x=True)
    assert [curve.x.tolist() for curve in curves] == [[10], [10]]
    x = np.array([0, 50, 100.0])
    expected = plots.smoothed_over(x, np.array([6, 5, 4.0]), 1.0)  # a hundredth of 100 images
    assert plots.run_curves(runs)[1].smoothed.tolist() == expected.tolist()
    with pytest.raises(ValueError, match=r"run small \(.*s1\.csv, .*s2\.csv\): no row has .* mse"):
        plots.run_curves(runs, term="mse")
    with pytest.raises(ValueError, match=r"run small .* at samples up to -1 that can be drawn"):
        plots.run_curves(runs, x_max=-1)
    with pytest.raises(ValueError, match="smooth is -1"):
        plots.run_curves(runs, smooth=-1)
    late = write_csv(tmp_path / "late.csv", [{"step": 20, "samples": 20, "loss_q1": 1}])
    with pytest.raises(ValueError, match=r"samples does not increase .* choose --x step"):
        plots.run_curves({"large": [*runs["large"][:1], late]})


def test_many_curves_stay_apart(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = ramp(tmp_path / "p.csv", 10, 1, [2.0, 1.0])
    runs = {f"run {n}": [path] for n in range(16)}
    axes = axes_of(monkeypatch, plots.curve_plot, runs, str(tmp_path / "a.png"))
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines[1::2]}
    assert len(looks) == 16


def test_plots_that_cannot_be_drawn_say_why(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "progress.csv", [{"step": 1, "accuracy": 2}])
    with pytest.raises(ValueError, match="nothing to plot"):
        plots.loss_plot([path], str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match=r"a\.gif ends in gif: expected \.png or \.pdf"):
        plots.loss_plot([path], str(tmp_path / "a.gif"))
    with pytest.raises(ValueError, match=r"smooth is 1\.5"):
        plots.loss_plot([path], str(tmp_path / "a.png"), smooth=1.5)
    bare = write_csv(tmp_path / "bare.csv", [{"loss": 1}])
    with pytest.raises(ValueError, match=r"bare\.csv is not a training log"):
        plots.loss_plot([bare], str(tmp_path / "a.png"))
    load = builtins.__import__

    def without_matplotlib(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    sound = write_csv(tmp_path / "sound.csv", [{"step": 1, "loss": 2}])
    with pytest.raises(ValueError, match=r"pip install 'improved-diffusion\[plots\]'"):
        plots.loss_plot([sound], str(tmp_path / "a.png"))
    assert not (tmp_path / "a.png").exists()


@pytest.mark.skipif(not SEED_LOGS.is_dir(), reason=f"the report's logs are not at {SEED_LOGS}")
def test_the_reports_own_logs_show_what_it_describes(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    parts = sorted(glob.glob(str(SEED_LOGS / "two_channel_exp4_part*.csv")))
    rows = plots.join_progress(parts)
    steps = np.array([row["step"] for row in rows])
    assert (np.diff(steps) > 0).all()
    assert (steps[0], steps[-1]) == (0, 62870)
    # At a resumed step the later part's row stands: batch 128, so samples = 128 (step + 1).
    at_10000 = next(row for row in rows if row["step"] == 10000)
    assert at_10000["loss"] == 0.0009884449153967005
    curves = list(curves_of(monkeypatch, parts, str(tmp_path / "figure8.png")).values())
    ends = [curve[1][-1] for curve in curves[1:]]
    assert ends == sorted(ends, reverse=True), "the least noisy quarter has the largest loss"
    assert ends[0] > 100 * ends[3]
    assert all(curve[1][-1] < curve[1][0] / 50 for curve in curves), "every curve falls"


@pytest.mark.skipif(not SEED_LOGS.is_dir(), reason=f"the report's logs are not at {SEED_LOGS}")
def test_the_reports_runs_compare_as_it_describes():
    runs = {
        name: sorted(glob.glob(str(SEED_LOGS / f"{name}_part*.csv")))
        for name in ("two_channel_exp3", "two_channel_exp4", "five_channel_exp1")
    }
    ends = {"two_channel_exp3": 223430, "two_channel_exp4": 62870, "five_channel_exp1": 45470}
    for name, paths in runs.items():
        steps = [row["step"] for row in plots.join_progress(paths)]
        assert steps == list(range(0, ends[name] + 1, 10)), "no step is missing or there twice"
    small, large, _ = plots.run_curves(runs, x="step", x_max=60000)
    late_small, late_large = small.x > 40000, large.x > 40000
    spread = [
        np.std(np.log(curve.logged[late] / curve.smoothed[late]))
        for curve, late in ((small, late_small), (large, late_large))
    ]
    assert spread[0] > 2 * spread[1], "batch 128 is more stable than batch 7 (figure 7)"
    assert large.smoothed[-1] < small.smoothed[-1]


# ---------------------------------------------------------------------------------------- script


def test_help_explains_every_flag(module):
    parser = module.create_argparser()
    (commands,) = (
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    expected = {
        "loss": "out progress terms smooth x log_x log_y",
        "curve": "out run term smooth x_max x log_x log_y",
        "grid": "out samples columns num start masks",
        "evolution": "out samples num start masks",
        "beside": "out samples titles num start masks",
        "compare": "out real samples num seed masks",
    }
    assert list(commands.choices) == list(expected)
    for name, flags in expected.items():
        actions = [action for action in commands.choices[name]._actions if action.dest != "help"]
        assert [action.dest for action in actions] == flags.split()
        for action in actions:
            assert len(action.help or "") > 10, f"{name} --{action.dest}"
            tells = f"(default: {action.default})" in " ".join(
                commands.choices[name].format_help().split()
            )
            assert tells or action.default is None
    assert "same number begin with the same noise" in commands.choices["evolution"].description


def test_script_curve_names_runs(tmp_path, module, script, refused):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for name in ("a", "b", "lr=1e-4"):
        (tmp_path / name).mkdir()
        ramp(tmp_path / name / "progress.csv", 10, 1, [2.0, 1.0, 0.5])
    a, b, odd = (str(tmp_path / name / "progress.csv") for name in ("a", "b", "lr=1e-4"))
    assert module.named_runs([f"Run 1={a},{b}", b, odd]) == {
        "Run 1": [a, b],
        "b": [b],
        "lr=1e-4": [odd],
    }
    out = tmp_path / "x.png"
    script("curve", "--run", a, "--run", b, "--log_x", "True", "--log_y", "false", "--out", out)
    assert Image.open(out).size[0] == 1400
    out.unlink()
    assert "another run is called 'a' too; give each its own label" in refused(
        "curve", "--run", a, "--run", a, "--out", out
    )
    assert "no row has samples and foo" in refused(
        "curve", "--run", a, "--term", "foo", "--out", out
    )
    assert "the log has loss_q1, samples, step, vb" in refused(
        "loss", "--progress", a, "--terms", "vb,foo", "--out", out
    )
    assert not out.exists()


def test_script_evolution_and_beside(tmp_path, script, refused, capsys):
    a = flat_set(tmp_path / "a", 10, step=20000)
    b = flat_set(tmp_path / "b", 30, step=10000)
    sets = [figures.read_samples(folder)[0] for folder in (a, b)]
    out = tmp_path / "x.png"
    script("evolution", "--samples", a, b, "--num", 2, "--start", 1, "--out", out)
    assert capsys.readouterr().out == f"wrote {out}\n"
    expected = figures.evolution_grid([sets[1][1:3], sets[0][1:3]], ["10K", "20K"], ["T1", "T2"])
    assert (pixels(Image.open(out)) == pixels(expected)).all()
    script("beside", "--samples", a, b, "--num", 3, "--titles", "EMA, raw model", "--out", out)
    expected = figures.beside_grid(
        [samples[:3] for samples in sets], ["EMA", "raw model"], ["T1", "T2"]
    )
    assert (pixels(Image.open(out)) == pixels(expected)).all()
    assert "of 4 samples" in refused("beside", "--samples", a, b, "--out", out)
    assert "need the channel Seg" in refused(
        "evolution", "--samples", a, b, "--masks", "outlines", "--out", out
    )


def test_script_grid_chooses_samples_columns_and_masks(tmp_path, script, refused):
    samples = masked(5)
    folder = write_samples(tmp_path / "s", samples, ["FLAIR", "Seg", "T1CE"]).parent
    out = tmp_path / "x.png"
    arguments = ["--start", 2, "--num", 3, "--columns", 3, "--masks", "outlines"]
    script("grid", "--samples", folder, *arguments, "--out", out)
    expected = figures.sample_grid(
        samples[2:5], ["FLAIR", "Seg", "T1CE"], columns=3, masks="outlines"
    )
    assert (pixels(Image.open(out)) == pixels(expected)).all()
    assert "numbers are 0 to 4" in refused("grid", "--samples", folder, "--start", 5, "--out", out)


def test_pictures_need_neither_torch_nor_matplotlib():
    code = (
        "import sys; import improved_diffusion.figures, improved_diffusion.plots;"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


def test_script_loss_and_grid(tmp_path, script, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    log = write_csv(tmp_path / "progress.csv", [{"step": 1, "loss": 2}, {"step": 2, "loss": 1}])
    script("loss", "--progress", log, log, "--out", tmp_path / "loss.png")
    samples = write_samples(tmp_path / "samples", numbered(5, 2), ["Seg", "T1CE"])
    script("grid", "--samples", samples, "--out", tmp_path / "grid.png", "--num", 3)
    assert capsys.readouterr().out == f"wrote {tmp_path}/loss.png\nwrote {tmp_path}/grid.png\n"
    expected = figures.sample_grid(numbered(3, 2), ["Seg", "T1CE"])
    assert (np.asarray(Image.open(tmp_path / "grid.png")) == np.asarray(expected)).all()
    assert (tmp_path / "loss.png").exists()
    with pytest.raises(ValueError, match="--num 6 of 5 samples"):
        script("grid", "--samples", samples, "--out", tmp_path / "no.png", "--num", 6)


def test_script_compare_takes_slices_by_seed(tmp_path, script):
    real = numbered(6, 2)
    for index, name in enumerate(["Seg", "T1CE"]):
        (tmp_path / "slices" / name).mkdir(parents=True)
        for n, slices in enumerate(real):
            image = np.zeros((64, 64), np.uint8) if name == "Seg" else slices[:, :, index]
            Image.fromarray(image).save(tmp_path / "slices" / name / f"Subject_001_slice_{n}.png")
    synthetic = write_samples(tmp_path / "samples", numbered(4, 2) + 100, ["Seg", "T1CE"])
    arguments = ["--real", tmp_path / "slices", "--samples", synthetic.parent, "--num", 3]
    pictures = []
    for seed in (0, 0, 1):
        script("compare", *arguments, "--seed", seed, "--out", tmp_path / "c.png")
        pictures.append(np.asarray(Image.open(tmp_path / "c.png")))
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()
    middle = pictures[0].shape[1] // 2
    real_levels = set(np.unique(pictures[0][:, :middle]))
    assert len(real_levels & {20 * n + 2 for n in range(6)}) >= 3, "grey levels come back exactly"
    with pytest.raises(ValueError, match=r"--num 5 of 6 real and 4 synthetic slices: .* 1 to 4"):
        script("compare", *arguments[:-1], 5, "--out", tmp_path / "d.png")
    (synthetic.parent / "samples.json").unlink()
    with pytest.raises(ValueError, match=r"no samples\.json"):
        script("compare", *arguments, "--out", tmp_path / "d.png")
    assert not (tmp_path / "d.png").exists()
