"""Pictures of an evaluation: where the panels lie, what they show, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.evaluation import memorisation, pictures
from improved_diffusion.figures import BLOCK_GAP, PANEL_GAP, colour_panel

CHANNELS = ["FLAIR", "Seg"]


@pytest.fixture
def slices():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 130, 140, 2), dtype=np.uint8)
    images[..., 1] = rng.choice([0, 51, 102, 204], (6, 130, 140))
    return images


def find(picture, panel):
    """Left and top of a panel in a picture; there must be one."""
    pixels = np.asarray(picture)
    height, width = panel.shape[:2]
    rows, columns = np.nonzero((pixels[:-height, :-width] == panel[0, 0]).all(axis=2))
    places = [
        (column, row)
        for row, column in zip(rows.tolist(), columns.tolist())
        if (pixels[row, column : column + width] == panel[0]).all()
        and (pixels[row : row + height, column : column + width] == panel).all()
    ]
    assert len(places) == 1
    return places[0]


def test_pairs_stand_side_by_side(slices):
    pairs = [
        {"index": 2, "train_index": 4, "flip": "horizontal", "correlation": 0.98},
        {"index": 0, "train_index": 1, "flip": "none", "correlation": 0.9},
    ]
    picture = pictures.pairs_sheet(slices[:3], slices, CHANNELS, pairs)
    left, top = find(picture, colour_panel(slices[2, ..., 0], "FLAIR"))
    assert left == BLOCK_GAP
    mask = find(picture, colour_panel(slices[2, ..., 1], "Seg"))
    assert mask == (left + 140 + PANEL_GAP, top)
    turned = np.ascontiguousarray(slices[4, :, ::-1, 0])
    other = find(picture, colour_panel(turned, "FLAIR"))
    assert other == (left + 2 * (140 + PANEL_GAP) - PANEL_GAP + BLOCK_GAP, top)
    below = find(picture, colour_panel(slices[1, ..., 0], "FLAIR"))
    assert below[0] == other[0] and below[1] > top + 130
    with pytest.raises(ValueError, match="nothing to draw"):
        pictures.pairs_sheet(slices, slices, CHANNELS, [])


def test_flagged_samples_are_shown_once(slices):
    reasons = [
        {"index": 3, "channel": "FLAIR", "reason": "noise only"},
        {"index": 3, "channel": "Seg", "reason": "off code"},
        {"index": 5, "channel": "images", "reason": "channels disagree"},
    ]
    picture = pictures.flagged_sheet(slices, CHANNELS, reasons)
    _, first = find(picture, colour_panel(slices[3, ..., 0], "FLAIR"))
    _, second = find(picture, colour_panel(slices[5, ..., 0], "FLAIR"))
    assert second > first + 130
    long = [{**reasons[0], "reason": "x" * 90}]
    assert pictures.flagged_sheet(slices, CHANNELS, long).width > picture.width
    many = [{**reasons[0], "index": i} for i in range(30)]
    tall = pictures.flagged_sheet(np.repeat(slices[:1], 30, axis=0), CHANNELS, many)
    assert tall.height < 21 * (second - first) + 200


def test_small_slices_are_enlarged():
    black = np.zeros((1, 16, 32, 2), np.uint8)
    reasons = [{"index": 0, "channel": "FLAIR", "reason": "constant"}]
    picture = pictures.flagged_sheet(black, CHANNELS, reasons)
    assert picture.width >= 2 * 8 * 32 + PANEL_GAP + 2 * BLOCK_GAP


@pytest.mark.parametrize("count", [1, 5])
def test_the_figure_of_both_distributions(slices, tmp_path, count):
    pytest.importorskip("matplotlib")
    samples = slices[:count].copy()
    samples[0, ..., 1] = 0  # without correlation
    own, others = (memorisation.nearest(part, slices[3:], CHANNELS) for part in (samples, slices))
    features = np.random.default_rng(0).normal(size=(6, 4))
    near = tuple(memorisation.nearest_features(features[:n], features[3:]) for n in (count, 6))
    found = memorisation.report(own, others, features=near)
    path = tmp_path / "near.png"
    pictures.similarity_figure(own, others, found, str(path), features=near)
    with Image.open(path) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    assert {(153, 153, 153), (213, 94, 0), (0, 114, 178)} <= colours  # both sets and the threshold
    with pytest.raises(ValueError, match=r"near\.jpg ends in jpg"):
        pictures.similarity_figure(own, others, found, str(tmp_path / "near.jpg"))
