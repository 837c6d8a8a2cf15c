"""Masks in the network's form and back."""

import itertools

import numpy as np
import pytest
import torch

from improved_diffusion.brats import MASK_CODES, snap_mask
from improved_diffusion.encodings import (
    ENCODINGS,
    MaskEncoding,
    network_channels,
    signed_distance,
)

CHANNELS = ["FLAIR", "Seg", "T1CE"]
OTHERS = [name for name in ENCODINGS if name != "grey"]


def in_range(levels):
    """As the data sets scale levels."""
    return torch.tensor(np.asarray(levels) / 127.5 - 1, dtype=torch.float32)


def slices(labels):
    """[N, 3, H, W] with the mask of ``labels`` [N, H, W] between two random images."""
    labels = np.asarray(labels)
    levels = np.random.default_rng(1).integers(0, 256, (len(labels), 3, *labels.shape[1:]))
    levels[:, 1] = np.array(MASK_CODES)[labels]
    return in_range(levels)


def label_maps(size):
    """Random labels, one label, single pixels, lines, nested rings and a chessboard."""
    rng = np.random.default_rng(0)
    maps = [rng.integers(0, 4, (size, size)) for _ in range(4)]
    maps += [np.full((size, size), label) for label in range(4)]
    for label, (row, column) in itertools.product(range(1, 4), [(0, 0), (size // 2, size - 1)]):
        maps.append(np.zeros((size, size), int))
        maps[-1][row, column] = label
        maps.append(np.full((size, size), label))
        maps[-1][row, column] = (label + 1) % 4
    for label in range(1, 4):
        maps.append(np.zeros((size, size), int))
        maps[-1][size // 3] = label
        maps[-1][:, size // 2] = 4 - label
        maps.append(np.diag(np.full(size, label)))
    rows, columns = np.mgrid[:size, :size]
    radius = np.hypot(rows - size / 2, columns - size / 2)
    maps.append(np.select([radius < size / 8, radius < size / 5, radius < size / 3], [1, 3, 2], 0))
    maps.append((rows + columns) % 2 * 3)
    return np.stack(maps)


@pytest.mark.parametrize("size", [8, 32, 50])
@pytest.mark.parametrize("name", ENCODINGS)
def test_every_label_map_comes_back(name, size):
    encoding = MaskEncoding(name, CHANNELS)
    images = slices(label_maps(size))
    encoded = encoding.encode(images)
    assert encoded.shape == (len(images), encoding.width, size, size)
    assert encoded.dtype == torch.float32 and encoded.abs().max() == 1
    assert torch.equal(encoding.decode(encoded), images)
    off = encoding.off_code(encoded)
    assert off is None if name == "sdf" else off.tolist() == [0.0] * len(images)
    # The images stand around the mask, untouched.
    assert torch.equal(encoded[:, 0], images[:, 0]) and torch.equal(encoded[:, -1], images[:, 2])


def test_codewords():
    """One pixel of each label: background, necrotic core, oedema, enhancing tumour."""
    images = slices([[[0, 1, 2, 3]]])
    onehot = MaskEncoding("onehot", CHANNELS).encode(images)[0, 1:4, 0]
    assert onehot.T.tolist() == [[-1, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]
    bits = MaskEncoding("bits", CHANNELS).encode(images)[0, 1:3, 0]
    assert bits.T.tolist() == [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    # Along background, oedema, enhancing tumour, core and back one bit changes at a time.
    order = bits.T[[0, 2, 3, 1, 0]]
    assert [(a != b).sum().item() for a, b in itertools.pairwise(order)] == [1, 1, 1, 1]


def test_names_and_widths():
    names = {
        "grey": ["FLAIR", "Seg", "T1CE"],
        "labels": ["FLAIR", "Seg", "T1CE"],
        "onehot": ["FLAIR", "Seg_51", "Seg_102", "Seg_204", "T1CE"],
        "bits": ["FLAIR", "Seg_bit1", "Seg_bit0", "T1CE"],
        "sdf": ["FLAIR", "Seg_51", "Seg_102", "Seg_204", "T1CE"],
    }
    for name, expected in names.items():
        encoding = MaskEncoding(name, CHANNELS)
        assert (encoding.names, encoding.width) == (expected, len(expected))
        assert network_channels(name, 3) == len(expected)
    pictures = MaskEncoding("grey", [], 3)
    assert (pictures.names, pictures.width) == ([], 3)
    assert MaskEncoding("bits", ["Seg"]).width == 2


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("bits", ["T1"], "--mask_encoding bits needs Seg among --channels, not T1; add it"),
        ("sdf", [], "--mask_encoding sdf needs Seg among --channels, not ordinary pictures"),
        ("gray", CHANNELS, "--mask_encoding gray: choose from grey, labels, onehot, bits, sdf"),
    ],
)
def test_refused(name, channels, message):
    with pytest.raises(ValueError, match=message):
        MaskEncoding(name, channels)


def test_levels_off_the_codes_go_to_the_nearest_as_elsewhere():
    """All 256 levels, the half-way ones included."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    expected = in_range(snap_mask(levels))
    for name in OTHERS:
        encoding = MaskEncoding(name, ["Seg"])
        assert torch.equal(encoding.decode(encoding.encode(in_range(levels))), expected), name
    assert torch.equal(MaskEncoding("grey", ["Seg"]).encode(in_range(levels)), in_range(levels))


@pytest.mark.parametrize(
    ("name", "drawn", "code"),
    [
        ("onehot", (-0.2, -0.9, -0.5), 0),
        ("onehot", (0.1, -0.9, -0.5), 51),
        ("onehot", (0.3, 0.4, -1.2), 102),
        ("onehot", (0.9, 0.8, 1.1), 204),
        ("onehot", (1, -0.9, 1), 51),  # limited to 1, equally near
        ("bits", (-0.1, -0.1), 0),
        ("bits", (-2.0, 0.1), 51),
        ("bits", (0.1, -0.9), 102),
        ("bits", (0.2, 0.01), 204),
        ("sdf", (-0.01, -1.0, -0.3), 0),
        ("sdf", (-0.5, 0.02, -0.3), 102),
        ("sdf", (0.2, -0.5, 0.7), 204),
    ],
)
def test_noisy_masks_decode_to_the_nearest(name, drawn, code):
    encoded = torch.tensor([0.5, *drawn]).reshape(1, -1, 1, 1)
    decoded = MaskEncoding(name, ["FLAIR", "Seg"]).decode(encoded)
    assert torch.equal(decoded.flatten(), torch.stack([torch.tensor(0.5), in_range(code)]))


@pytest.mark.parametrize(
    ("name", "pixels", "share"),
    [
        # Levels 0, 11 and 40 (11 below 51), then 14 and 90, 14 and 12.1 from a code.
        ("grey", [[0, 11, 40, 14, 89.9]], 2 / 5),
        # 12 levels are 0.094. Near to a codeword in one channel alone is not near.
        ("onehot", [[-1.09, 0.91, 0.9, -1], [-1, -1, -1, -0.9], [-0.92, -1, -1, -1]], 2 / 4),
        ("onehot", [[1, 1], [-1, 1], [-1, -1]], 1 / 2),  # two labels at once are no code
        # What is beyond 1 counts as 1.
        ("bits", [[1, 0.92, -0.5, 1.2], [-1, 0.92, 1, 1]], 1 / 4),
    ],
)
def test_off_code_by_hand(name, pixels, share):
    planes = torch.tensor(pixels) / 127.5 - 1 if name == "grey" else torch.tensor(pixels)
    encoded = torch.cat([torch.zeros(1, len(planes[0])), planes])[None, :, None]
    encoded = torch.cat([encoded, encoded.new_tensor(-1).expand_as(encoded)])
    off = MaskEncoding(name, ["FLAIR", "Seg"]).off_code(encoded)
    # A second slice whose planes are all -1: background in every encoding.
    assert off.tolist() == pytest.approx([share, 0])
    assert MaskEncoding("grey", ["FLAIR"]).off_code(encoded) is None


def brute_force(inside, limit):
    """Signed distances from all pairs of pixels."""
    places = np.argwhere(np.ones_like(inside))
    found = np.empty(inside.shape)
    for row, column in places:
        other = places[(inside != inside[row, column]).ravel()]
        distance = np.hypot(*(other - (row, column)).T).min(initial=limit)
        found[row, column] = distance if inside[row, column] else -distance
    return found


@pytest.mark.parametrize("limit", [1.0, 2.5, 4.0, 100.0])
def test_distances_are_those_of_all_pairs(limit):
    rng = np.random.default_rng(2)
    masks = [rng.random((13, 17)) < share for share in (0.02, 0.1, 0.5, 0.98)]
    masks += [np.zeros((13, 17), bool), np.ones((13, 17), bool)]
    found = signed_distance(torch.from_numpy(np.stack(masks)), limit)
    expected = np.stack([brute_force(mask, limit) for mask in masks])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_distances_end_at_a_sixteenth_of_the_size():
    """A square of 12 x 12 in 64 x 64: 4 pixels are 1."""
    labels = np.zeros((1, 64, 64), int)
    labels[0, 20:32, 20:32] = 2
    planes = MaskEncoding("sdf", CHANNELS).encode(slices(labels))[0, 1:4]
    assert (planes[0] == -1).all() and (planes[2] == -1).all()
    outside, inside = [-1, -1, -0.75, -0.5, -0.25], [0.25, 0.5, 0.75, 1, 1, 1]
    assert planes[1, 25, 15:26].tolist() == outside + inside
    assert planes[1, 18, 18].item() == pytest.approx(-(8**0.5) / 4)  # to the corner
