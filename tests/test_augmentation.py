"""Slices changed at random, image and mask together."""

import numpy as np
import pytest
import torch

from improved_diffusion.augmentation import Augmentation, inverse_maps, resample
from improved_diffusion.brats import MASK_CODES

CHANNELS = ["FLAIR", "Seg"]
CODES = torch.from_numpy((np.array(MASK_CODES) / 127.5 - 1).astype(np.float32))
STILL = {"rotate": 0.0, "scale": 0.0, "shift": 0.0, "intensity": 0.0}


def drawn_by(augmentation, count, seed=0):
    return augmentation.draw(count, torch.Generator().manual_seed(seed))


def apply(augmentation, images, cond=None, seed=0):
    drawn = drawn_by(augmentation, len(images), seed)
    return augmentation.apply(images, cond or {}, drawn)


def blobs(count=8, size=32, seed=0):
    """An image of random values beside a mask of random labels, both on black: [N, 2, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.full((count, 2, size, size), -1.0)
    inner = slice(size // 4, -size // 4)
    shape = images[:, 0, inner, inner].shape
    images[:, 0, inner, inner] = torch.rand(shape, generator=generator) * 2 - 1
    images[:, 1, inner, inner] = CODES[torch.randint(4, shape, generator=generator)]
    return images


def maps(degrees=0.0, zoom=1.0, mirrored=False):
    values = (torch.tensor([value], dtype=torch.float64) for value in (degrees, zoom))
    return inverse_maps(*values, torch.tensor([mirrored])).float()


def moved(images, shift=(0.0, 0.0), is_mask=(False, True), **how):
    return resample(images, maps(**how), torch.tensor([shift]), is_mask)


def test_nothing_is_nothing():
    images = blobs()
    changed, _ = apply(Augmentation(CHANNELS, 1.0, **STILL), images)
    assert torch.equal(changed, images)
    untouched, cond = apply(Augmentation(CHANNELS, 0.0), images, {"y": torch.ones(8)})
    assert untouched is images and cond["y"].tolist() == [1] * 8


@pytest.mark.parametrize("size", [8, 9, 32])
def test_quarter_turns_flips_and_whole_shifts_are_exact(size):
    """Anticlockwise as displayed; the flip changes rows; what comes from outside is black."""
    images = torch.rand(1, 2, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for turns in range(4):
        expected = torch.rot90(images, turns, dims=(2, 3))
        torch.testing.assert_close(moved(images, degrees=90.0 * turns), expected, rtol=0, atol=1e-5)
    assert torch.equal(moved(images, mirrored=True), images.flip(2))
    down = moved(images, (3.0, -1.0))
    assert torch.equal(down[:, :, 3:, :-1], images[:, :, :-3, 1:])
    assert (down[:, :, :3] == -1).all() and (down[:, :, :, -1] == -1).all()
    # Mirrored first, then turned.
    both = moved(images, degrees=90.0, mirrored=True)
    expected = torch.rot90(images.flip(2), 1, dims=(2, 3))
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-5)


def test_between_pixels_images_are_blended_and_masks_are_not():
    images = torch.tensor([[-1.0, -0.6, 1.0, 0.2]]).expand(1, 2, 4, 4)
    image, mask = moved(images, (0.0, 0.25))[0, :, 1]
    assert image.tolist() == pytest.approx([-1, -0.7, 0.6, 0.4])  # 3/4 own, 1/4 the left one's
    assert torch.equal(mask, images[0, 1, 1])


def test_twice_as_large_is_from_half_as_far():
    """The middle of 4 columns is 1.5, so column 3 comes from 1.5 + 1.5 / 2 = 2.25."""
    images = torch.tensor([0.0, 0.2, 0.4, 0.8]).expand(1, 2, 4, 4)
    image, mask = moved(images, zoom=2.0)[0, :, 2]
    assert image.tolist() == pytest.approx([0.15, 0.25, 0.35, 0.5])
    assert mask.tolist() == pytest.approx([0.2, 0.2, 0.4, 0.4])


def test_image_and_mask_move_together():
    """An image that equals its mask still does, but where it is blended along borders."""
    images = torch.full((16, 2, 64, 64), -1.0)
    images[:, :, 12:30, 20:50] = CODES[2]
    images[:, :, 16:24, 26:40] = CODES[3]
    changed, _ = apply(Augmentation(CHANNELS, 1.0, 30.0, 0.3, 0.2, 0.0, True), images)
    image, mask = changed.unbind(dim=1)
    assert torch.isin(mask, CODES).all()
    nearest = (image[..., None] - CODES).abs().argmin(dim=-1)
    own = (mask[..., None] - CODES).abs().argmin(dim=-1)
    assert (mask != images[:, 1]).float().mean() > 0.05
    same = torch.isclose(image, mask, atol=1e-5).flatten(1).float().mean(dim=1)
    assert same.min() > 0.9  # borders are 2 * (48 + 22) of 4096 pixels, and up to 2 pixels wide
    # At a border the larger share decides both, up to a third label between two.
    assert (nearest == own).float().mean() > 0.98


def test_codes_background_and_range():
    images = blobs(64)
    changed, _ = apply(Augmentation(CHANNELS, 1.0, 20.0, 0.2, 0.0, 0.5), images)
    assert torch.isin(changed[:, 1], CODES).all()
    assert changed.min() >= -1 and changed.max() <= 1
    # Turned by 20 degrees and enlarged by 1.2, the middle half stays in a radius of 14 pixels.
    rows, columns = torch.meshgrid(*[torch.arange(32) - 15.5] * 2, indexing="ij")
    outside = rows.square() + columns.square() > (8 * 2**0.5 * 1.2 + 2) ** 2
    assert (changed[:, :, outside] == -1).all()
    assert (changed[:, 0] != images[:, 0]).flatten(1).any(dim=1).all()


def test_intensity_by_hand():
    """Gain and gamma of each image from its own numbers; the mask has none."""
    augmentation = Augmentation(["FLAIR", "Seg", "T1"], 1.0, **{**STILL, "intensity": 0.4})
    images = torch.tensor([-1.0, 0.0, 1.0]).expand(1, 3, 3, 3)
    drawn = torch.full((1, 12), 0.5, dtype=torch.float64)
    drawn[0, 6], drawn[0, 9] = 0.75, 0.25  # of FLAIR: gain 1.2, gamma 0.8
    drawn[0, 8], drawn[0, 11] = 0.25, 1.0  # of T1: gain 0.8, gamma 1.4
    drawn[0, 7] = 0.0
    changed, _ = augmentation.apply(images, {}, drawn)
    flair, mask, t1 = changed[0, :, 1].tolist()
    assert flair == pytest.approx([-1, 2 * 1.2 * 0.5**0.8 - 1, 1])
    assert t1 == pytest.approx([-1, 2 * 0.8 * 0.5**1.4 - 1, 0.6])
    assert (flair[0], mask) == (-1, [-1, 0, 1])


def test_the_share_is_of_slices_each_by_its_own_numbers():
    images = blobs(400, size=8)
    changed, _ = apply(Augmentation(CHANNELS, 0.3), images)
    touched = (changed != images).flatten(1).any(dim=1)
    assert 90 <= touched.sum() <= 150  # 120, with a standard deviation of 9
    # A part of the batch with its part of the numbers gives its part of the result.
    augmentation = Augmentation(CHANNELS, 0.3)
    drawn = drawn_by(augmentation, 400)
    part, _ = augmentation.apply(images[100:117], {}, drawn[100:117])
    assert torch.equal(part, changed[100:117])


def test_ranges_of_what_is_drawn():
    """A single bright pixel tells the shift: up to a quarter of 64, evenly to all sides."""
    images = torch.full((500, 1, 64, 64), -1.0)
    images[:, 0, 32, 32] = 1
    changed, _ = apply(Augmentation(["Seg"], 1.0, 0.0, 0.0, 0.25, 0.0), images)
    place = changed.flatten(1).argmax(dim=1)
    moves = torch.stack([place // 64, place % 64]).float() - 32
    assert moves.min() == -16 and moves.max() == 16
    assert moves.mean(dim=1).abs().max() < 2  # standard error 0.41


def test_labels_follow_the_mask():
    images = torch.full((3, 2, 8, 8), -1.0)
    images[0, 1, 0, 4] = CODES[1]  # leaves the slice
    images[1, 1, 4, 4] = CODES[1]  # does not
    drawn = torch.full((3, 10), 0.5, dtype=torch.float64)
    drawn[:, 3] = 0.0  # up, by a quarter
    augmentation = Augmentation(CHANNELS, 1.0, **{**STILL, "shift": 0.25})
    cond = {"y": torch.tensor([1, 1, 0])}
    changed, after = augmentation.apply(images, cond, drawn)
    assert after["y"].tolist() == [0, 1, 0] and after["y"].dtype == torch.int64
    assert changed[1, 1, 2, 4] == CODES[1] and cond["y"].tolist() == [1, 1, 0]
    # Without a mask nothing tells, and the label stays.
    alone = Augmentation(["T1", "T2"], 1.0, **{**STILL, "shift": 0.25})
    assert alone.apply(images, cond, drawn)[1]["y"].tolist() == [1, 1, 0]


def test_a_flip_is_of_half_the_slices():
    images = blobs(200, size=8)
    augmentation = Augmentation(CHANNELS, 1.0, **STILL, flip=True)
    changed, _ = apply(augmentation, images)
    mirrored = (changed == images.flip(2)).flatten(1).all(dim=1)
    same = (changed == images).flatten(1).all(dim=1)
    assert (mirrored | same).all() and 75 <= mirrored.sum() <= 125


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.5}, "--augment 1.5: give a number from 0 to 1"),
        ({"share": float("nan")}, "--augment nan"),
        ({"share": 0, "rotate": 181.0}, "--augment_rotate 181.0: give a number from 0 to 180"),
        ({"share": 1, "scale": 1.0}, "--augment_scale 1.0: give a number from 0 to below 1"),
        ({"share": 1, "shift": -0.1}, "--augment_shift -0.1"),
        ({"share": 1, "intensity": 1.0}, "--augment_intensity 1.0"),
    ],
)
def test_bad_numbers(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(CHANNELS, **settings)
