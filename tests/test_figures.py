import builtins
import csv
import glob
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from improved_diffusion import figures
from improved_diffusion.brats import MASK_CODES, PALETTE

REPO = Path(__file__).parents[1]
SEED_LOGS = REPO.parent / "shared" / "seed_logs"


@pytest.fixture
def script(monkeypatch):
    """Runs ``scripts/figures.py`` with the given arguments."""
    spec = importlib.util.spec_from_file_location("figures_script", REPO / "scripts/figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*args):
        monkeypatch.setattr("sys.argv", ["figures.py", *map(str, args)])
        module.main()

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


def write_samples(folder, samples, channels=None):
    folder.mkdir(parents=True, exist_ok=True)
    n, height, width, count = samples.shape
    path = folder / f"samples_{n}x{height}x{width}x{count}.npz"
    np.savez(path, samples)
    if channels:
        (folder / "samples.json").write_text(json.dumps({"channels": channels}))
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
    with pytest.raises(ValueError, match=r"0 \.npz files instead of one"):
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


# ----------------------------------------------------------------------------------------- plots


def test_the_later_part_wins_where_parts_overlap(tmp_path):
    early = write_csv(tmp_path / "z.csv", [{"step": s, "loss": 1.0} for s in range(0, 60, 10)])
    late = write_csv(tmp_path / "a.csv", [{"step": s, "loss": 2.0} for s in range(30, 90, 10)])
    last = write_csv(tmp_path / "m.csv", [{"step": s, "loss": 3.0} for s in range(80, 100, 10)])
    for order in ([early, late, last], [last, late, early]):
        rows = figures.join_progress(order)
        assert [row["step"] for row in rows] == list(range(0, 100, 10))
        assert [row["loss"] for row in rows] == [1.0] * 3 + [2.0] * 5 + [3.0] * 2


def test_lost_work_inside_one_file_is_replaced_too(tmp_path):
    steps = [0, 10, 20, 30, 20, 30, 40]
    path = write_csv(tmp_path / "p.csv", [{"step": s, "loss": i} for i, s in enumerate(steps)])
    rows = figures.join_progress([path])
    assert [(row["step"], row["loss"]) for row in rows] == [
        (0, 0), (10, 1), (20, 4), (30, 5), (40, 6),
    ]  # fmt: skip


def test_smoothing_is_an_average_that_follows_a_steep_start():
    assert figures.smoothed(np.full(50, 3.0), 0.99).tolist() == pytest.approx([3.0] * 50)
    values = np.array([1.0, 4.0, 2.0])
    assert figures.smoothed(values, 0.0).tolist() == [1.0, 4.0, 2.0]
    # By hand: the past weighs 2/11 at the second value and 0.2 (3/12 is more) at the third.
    second = 1 * 2 / 11 + 4 * 9 / 11
    assert figures.smoothed(values, 0.2).tolist() == pytest.approx(
        [1, second, 0.2 * second + 0.8 * 2]
    )
    steep = np.concatenate([np.ones(5), np.full(95, 0.001)])
    assert figures.smoothed(steep, 0.99)[60] < 0.0011


def curves_of(monkeypatch, *args, **kwargs):
    """The figure's strong curves by label, as arrays [2, rows] of x and y."""
    kept = []
    make = figures._figure
    monkeypatch.setattr(figures, "_figure", lambda: kept.append(make()) or kept[-1])
    figures.loss_plot(*args, **kwargs)
    (axes,) = kept[0].axes
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


def test_plots_that_cannot_be_drawn_say_why(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "progress.csv", [{"step": 1, "accuracy": 2}])
    with pytest.raises(ValueError, match="nothing to plot"):
        figures.loss_plot([path], str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match=r"a\.gif ends in gif: expected \.png or \.pdf"):
        figures.loss_plot([path], str(tmp_path / "a.gif"))
    with pytest.raises(ValueError, match=r"smooth is 1\.5"):
        figures.loss_plot([path], str(tmp_path / "a.png"), smooth=1.5)
    bare = write_csv(tmp_path / "bare.csv", [{"loss": 1}])
    with pytest.raises(ValueError, match=r"bare\.csv is not a training log"):
        figures.loss_plot([bare], str(tmp_path / "a.png"))
    load = builtins.__import__

    def without_matplotlib(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ValueError, match=r"pip install 'improved-diffusion\[plots\]'"):
        figures.loss_plot([path], str(tmp_path / "a.png"))
    assert not (tmp_path / "a.png").exists()


@pytest.mark.skipif(not SEED_LOGS.is_dir(), reason=f"the report's logs are not at {SEED_LOGS}")
def test_the_reports_own_logs_show_what_it_describes(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    parts = sorted(glob.glob(str(SEED_LOGS / "two_channel_exp4_part*.csv")))
    rows = figures.join_progress(parts)
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


# ---------------------------------------------------------------------------------------- script


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
