"""The sample folder: its files, and that nothing is lost or changed by an interruption."""

import json
import multiprocessing
import os
import signal
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from improved_diffusion import samples
from improved_diffusion.nifti_export import BRATS_GEOMETRY
from improved_diffusion.samples import write_sample_folder

SHAPE = (8, 8, 2)
CHANNELS = ["Seg", "T1CE"]


def levels_of(index, shape=SHAPE):
    return np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)


def draw(indices):
    return np.stack([levels_of(i) for i in indices])


def write(folder, drawing=draw, num_samples=7, batch_size=2, **options):
    options = {
        "shape": SHAPE,
        "formats": ("npz", "png", "nifti"),
        "geometry": BRATS_GEOMETRY,
        "settings": {"--seed": 5},
        **options,
    }
    channels = options.pop("channels", CHANNELS)
    record = {"seed": 5}
    write_sample_folder(
        str(folder),
        channels,
        drawing,
        record,
        num_samples=num_samples,
        batch_size=batch_size,
        **options,
    )


def contents(folder):
    """Every file's bytes; of samples.json what does not tell the time."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    found = {name: data for name, data in found.items() if (folder / name).is_file()}
    record = json.loads(found["samples.json"])
    record.pop("seconds_per_sample", None)
    return {**found, "samples.json": record}


def test_sample_folder(tmp_path):
    levels = np.zeros((3, 8, 8, 2), np.uint8)
    levels[..., 0] = [[[20]], [[90]], [[250]]]  # mask
    levels[..., 1] = [[[7]], [[8]], [[9]]]
    out = tmp_path / "out"
    write(out, lambda own: levels[own], num_samples=3, formats=("npz", "png"))
    np.testing.assert_array_equal(np.load(out / "samples_3x8x8x2.npz")["arr_0"], levels)
    masks = [np.asarray(Image.open(out / f"Seg/sample_{i:06d}_seg.png")) for i in range(3)]
    assert [np.unique(mask).tolist() for mask in masks] == [[0], [102], [204]]
    image = Image.open(out / "T1CE/sample_000002_T1ce.png")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("L", (8, 8), 9)
    record = json.loads((out / "samples.json").read_text())
    assert record.pop("seconds_per_sample") > 0
    assert record == {"channels": CHANNELS, "shape": [3, 8, 8, 2], "seed": 5}
    assert Image.open(out / "grid.png").mode == "RGB"
    names = ["Seg", "T1CE", "grid.png", "samples.json", "samples_3x8x8x2.npz"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L"), (4, None)])
def test_samples_without_channel_names(tmp_path, channels, mode):
    """Three channels make colour pictures, one makes grey ones, other numbers make none."""
    out = tmp_path / "out"
    levels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, channels), dtype=np.uint8)
    write(
        out,
        lambda own: levels[own],
        num_samples=2,
        channels=[],
        shape=(8, 8, channels),
        formats=("npz", "png"),
        labels=np.array([1, 0]),
        classes=["ape", "cat"],
    )
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


def test_only_the_formats_that_are_asked_for(tmp_path):
    expected = {
        ("npz",): {"samples_2x8x8x2.npz"},
        ("png",): {"Seg", "T1CE"},
        ("nifti",): {"nifti"},
    }
    for formats, names in expected.items():
        out = tmp_path / formats[0]
        write(out, num_samples=2, formats=formats)
        assert {p.name for p in out.iterdir()} == {"grid.png", "samples.json", *names}
    assert samples.parse_formats("png,npz") == ("npz", "png")
    for text in ("jpg", "", "npz,"):
        with pytest.raises(ValueError, match=f"--format {text}: choose one or more of npz,png,"):
            samples.parse_formats(text)


def die(folder, moment):
    """Write samples and be killed as by ``kill -9`` at a moment."""

    def killed():
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "drawing":

        def drawing(indices):
            if indices.start == 4:
                killed()
            return draw(indices)

        write(folder, drawing)
    original = getattr(samples, moment)
    calls = [0]

    def replacement(*args):
        calls[0] += 1
        # In the third batch; of the raw levels and the marks written there, before the mark.
        if moment == "_write_pictures" and calls[0] == 6:
            args[0].joinpath("Seg", "sample_000005_seg.png").write_bytes(b"half a pic")
            killed()
        if moment == "_write_at" and calls[0] == 6:
            killed()
        if moment in ("_finish", "_give_name", "_remove_work"):
            killed()
        if moment == "atomic_write" and calls[0] == 2:  # after the settings, the npz
            with open(f"{args[0]}.partial", "wb") as file:
                file.write(b"half an npz")
            killed()
        return original(*args)

    setattr(samples, moment, replacement)
    write(folder)


@pytest.mark.parametrize(
    "moment", ["drawing", "_write_pictures", "_write_at", "_finish", "atomic_write", "_give_name"]
)
def test_killed_at_any_moment_and_continued(tmp_path, moment, capsys):
    write(tmp_path / "whole")
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=die, args=(out, moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()

    kept = samples.count_complete(str(out))
    assert kept == (7 if moment in ("_finish", "atomic_write", "_give_name") else 4)
    drawn = []

    def counting(indices):
        drawn.extend(indices)
        return draw(indices)

    write(out, counting)
    assert drawn == list(range(kept, 7))  # nothing a second time
    assert f"continuing: {kept} of 7 samples are there" in capsys.readouterr().out
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_killed_while_tidying_up(tmp_path):
    """The folder has its name already; the same start finds nothing left to draw."""
    write(tmp_path / "whole")
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=die, args=(out, "_remove_work"))
    process.start()
    process.join()
    assert (out / ".work").is_dir()
    with pytest.raises(ValueError, match="already holds something"):
        write(out, settings={"--seed": 6})
    write(out, lambda indices: pytest.fail("drawn again"))
    assert contents(out) == contents(tmp_path / "whole")
    assert not (out / ".work").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def broken(indices):
    if indices.start == 2:
        raise KeyboardInterrupt
    return draw(indices)


def test_other_settings_are_refused(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write(out, broken)
    before = contents_of_partial(tmp_path)
    for options, message in [
        ({"settings": {"--seed": 6}}, "were begun with --seed 5, not 6; give the same flags"),
        ({"num_samples": 8}, "were begun with --num_samples 7, not 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            write(out, **options)
    assert contents_of_partial(tmp_path) == before
    write(out)
    with pytest.raises(ValueError, match="already holds something, and nothing is overwritten"):
        write(out)


def contents_of_partial(tmp_path):
    return {p: p.read_bytes() for p in (tmp_path / "out.partial").rglob("*") if p.is_file()}


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out\.partial is in the way"):
        write(tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"
    (tmp_path / "other.partial").write_text("a file")
    with pytest.raises(ValueError, match=r"other\.partial is in the way"):
        write(tmp_path / "other")
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OSError, match="cannot be made"):
        write(tmp_path / "file" / "out")


def test_two_at_once_are_refused(tmp_path):
    def second(indices):
        with pytest.raises(ValueError, match="another program is writing samples to"):
            write(tmp_path / "out")
        return draw(indices)

    write(tmp_path / "out", second)
    assert np.load(tmp_path / "out" / "samples_7x8x8x2.npz")["arr_0"].shape == (7, *SHAPE)


def test_a_full_disk_is_one_sentence_and_can_be_continued(tmp_path, monkeypatch):
    write(tmp_path / "whole")
    original = samples._write_at

    def full(file, offset, content):
        if offset >= 4:
            raise OSError(28, "No space left on device")
        original(file, offset, content)

    with monkeypatch.context() as patch:
        patch.setattr(samples, "_write_at", full)
        with pytest.raises(OSError, match=r"cannot write to .*out\.partial: No space left on dev"):
            write(tmp_path / "out")
    write(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    shape = (32, 32, 2)
    batch = np.zeros((50, *shape), np.uint8)
    peaks = []
    for num_samples in (1000, 20_000):
        tracemalloc.start()
        write(
            tmp_path / str(num_samples),
            lambda own: batch[: len(own)],
            num_samples=num_samples,
            batch_size=50,
            shape=shape,
            formats=("npz",),
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    bytes_of_samples = 19_000 * 32 * 32 * 2
    assert peaks[1] - peaks[0] < 0.1 * bytes_of_samples
    path = tmp_path / "20000" / "samples_20000x32x32x2.npz"
    assert path.stat().st_size > 20_000 * 32 * 32 * 2


def test_the_streamed_npz_is_what_numpy_writes(tmp_path):
    labels = np.arange(7) % 2
    write(tmp_path / "out", formats=("npz",), labels=labels, classes=["a", "b"])
    path = tmp_path / "out" / "samples_7x8x8x2.npz"
    np.savez(tmp_path / "numpy.npz", arr_0=draw(range(7)), arr_1=labels)
    with zipfile.ZipFile(path) as own, zipfile.ZipFile(tmp_path / "numpy.npz") as other:
        assert own.testzip() is None
        assert own.namelist() == other.namelist() == ["arr_0.npy", "arr_1.npy"]
        for name in own.namelist():
            assert own.read(name) == other.read(name)
