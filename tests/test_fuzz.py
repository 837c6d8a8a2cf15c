"""Damaged and hostile files: each is read as what it is, or refused by its name.

The default run tries the same inputs every time. ``FUZZ_EXAMPLES=5000`` tries that many other ones
in every test.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import resource
import signal
import struct
import unicodedata
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import brats_cases as made
import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import brats_dataset
from improved_diffusion import brats, checkpoint, image_datasets, nifti_export, nifti_import

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
fuzz = settings(
    max_examples=int(EXAMPLES or 80),
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SECONDS = 20  # in which one input must be dealt with, on the slowest machine
GROWTH_MIB = 400  # of this process, over all inputs of a test


@contextlib.contextmanager
def in_time():
    """A hang becomes a failure. Not TimeoutError, which is an OSError and would be accepted."""

    def late(number, frame):
        raise AssertionError(f"one input took more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture(autouse=True)
def bounded_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_MIB * 1024


def outcome(read, path, *others):
    """What ``read`` gives, or None if it refuses in one sentence that names a file; no warnings."""
    with in_time(), warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return read()
        except (ValueError, OSError) as error:
            assert any(str(name) in str(error) for name in (path, *others)), repr(error)
            assert "\n" not in str(error), repr(error)
            return None


EXTREMES = [b"\0", b"\xff", b"\x7f\xff", b"\xff\x7f", b"\x80\0\0\0", b"\xff" * 4, b"\0" * 8]


@st.composite
def mutated(draw, original):
    """``original`` with one to four bit flips, overwritten, inserted, lost or repeated parts."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, max(0, len(data) - 1)))
        end = min(len(data), begin + draw(st.sampled_from([1, 2, 4, 8, 64, 1 << 20])))
        kind = draw(st.sampled_from(["flip", "flip", "flip", "write", "insert", "lose", "repeat"]))
        if kind == "flip" and data:
            data[begin] ^= 1 << draw(st.integers(0, 7))
        elif kind == "write":
            part = draw(st.one_of(st.sampled_from(EXTREMES), st.binary(max_size=16)))
            data[begin : begin + len(part)] = part
        elif kind == "insert":
            data[begin:begin] = draw(st.binary(min_size=1, max_size=64))
        elif kind == "lose":
            del data[begin:end]
        elif kind == "repeat":
            place = draw(st.integers(0, len(data)))
            data[place:place] = data[begin:end]
    return bytes(data)


# ------------------------------------------------------------------------------------------- NIfTI

SHAPE = (6, 5, 4)


def nifti(kind, mask=False):
    levels = made.volume("Seg" if mask else "T1", shape=SHAPE)
    return kind(levels, made.AFFINE).to_bytes()


NIFTI = {kind: nifti(kind) for kind in (nib.Nifti1Image, nib.Nifti2Image)}


def prepared(path):
    """All that preparation does with an image file and a mask file of this content."""
    volume, affine, orientation = nifti_import.read_volume(path, (256, 256, 1024))
    assert volume.ndim == 3 and volume.dtype.kind in "iuf"
    assert all(1 <= size <= most for size, most in zip(volume.shape, (256, 256, 1024)))
    assert (affine is None) == (orientation is None)
    if affine is not None:
        assert np.abs(np.abs(affine[:3, :3]) - np.eye(3)).max() < 0.2
        assert np.isfinite(affine).all()
    with contextlib.suppress(ValueError):
        assert set(np.unique(brats.check_labels(volume, path))) <= {0, 1, 2, 3, 4}
    brats.check_intensities(volume, path)
    for recipe in brats.RECIPES:
        scale = brats.intensity_scale(volume, recipe, path)
        brats.covered_slices(volume[:, :, :8], scale)
        levels = brats.image_slice(volume, 1, scale)
        assert levels.shape == (256, 256) and levels.dtype == np.uint8
    return volume


@fuzz
@given(data=st.data(), kind=st.sampled_from(list(NIFTI)))
def test_nifti_headers(tmp_path_factory, data, kind):
    content = bytearray(NIFTI[kind])
    fields = kind.header_class.template_dtype.fields
    for name in data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3)):
        form, place = fields[name]
        value = st.binary(min_size=form.itemsize, max_size=form.itemsize)
        if form.base.kind in "if":
            count = form.itemsize // form.base.itemsize
            if form.base.kind == "f":
                number = st.floats(width=8 * form.base.itemsize)
            else:
                bound = 2 ** (8 * form.base.itemsize - 1)
                number = st.integers(-5, 100) | st.integers(-bound, bound - 1)
            numbers = st.lists(number, min_size=count, max_size=count)
            value |= numbers.map(lambda own, base=form.base: np.array(own, base).tobytes())
        content[place : place + form.itemsize] = data.draw(value)
    path = tmp_path_factory.getbasetemp() / "header_t1.nii"
    path.write_bytes(content)
    outcome(lambda: prepared(str(path)), path)


UNIT = st.sampled_from([tuple(row) for row in np.vstack([np.eye(3), -np.eye(3)])]) | st.builds(
    lambda a, b: (np.cos(a), np.sin(a) * np.cos(b), np.sin(a) * np.sin(b)),
    *[st.floats(0, 6.3)] * 2,
)


@fuzz
@given(
    columns=st.lists(UNIT, min_size=3, max_size=3),
    place=st.floats(-1e3, 1e3) | st.floats(-1e30, 1e30),
)
def test_nifti_affines_of_1_mm(tmp_path_factory, columns, place):
    image = nib.Nifti1Image(made.volume("T1", shape=SHAPE), None)
    affine = np.column_stack([*columns, (place, 0, 0)])
    image.header["sform_code"], image.header["vox_offset"] = 2, 352
    for row, name in zip(affine, ("srow_x", "srow_y", "srow_z")):
        image.header[name] = row
    path = tmp_path_factory.getbasetemp() / "affine_t1.nii"
    path.write_bytes(image.header.binaryblock + bytes(4) + image.dataobj.tobytes(order="F"))
    volume = outcome(lambda: prepared(str(path)), path)
    # Axes of the body are taken, whichever way they run; of others only the nearly so.
    straight = np.allclose(sorted(np.abs(columns).round(9).tolist()), np.eye(3)[::-1], atol=1e-9)
    assert volume is not None or not straight or abs(place) > 1e5
    assert volume is None or sorted(volume.shape) == sorted(SHAPE)


@fuzz
@given(content=st.sampled_from(list(NIFTI.values())).flatmap(mutated), zipped=st.booleans())
def test_nifti_bytes(tmp_path_factory, content, zipped):
    path = tmp_path_factory.getbasetemp() / "bytes_t1.nii"
    path.write_bytes(gzip.compress(content, 1) if zipped else content)
    outcome(lambda: prepared(str(path)), path)


@fuzz
@given(content=mutated(gzip.compress(NIFTI[nib.Nifti1Image], mtime=0)))
def test_gzipped_nifti_is_what_it_was_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "zipped_t1.nii.gz"
    path.write_bytes(content)
    volume = outcome(lambda: prepared(str(path)), path)
    assert volume is None or np.array_equal(volume, made.volume("T1", shape=SHAPE))


# ---------------------------------------------------------------------------------------- pictures

PLANE = np.add.outer(np.arange(12), 3 * np.arange(12)).astype(np.uint8)


def encoded(form, picture, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


PNG = encoded("PNG", Image.fromarray(PLANE))


def slice_of(path):
    brats_dataset._check_headers([path])
    item, _ = brats_dataset.load_channels_from_dir([[path]], image_size=8)[0]
    assert item.shape == (1, 8, 8) and torch.isfinite(item).all() and item.abs().max() <= 1
    return np.asarray(brats_dataset._read_levels(path))


def picture_of(path):
    item, _ = image_datasets.ImageDataset(8, [path])[0]
    assert item.shape == (3, 8, 8) and np.abs(item).max() <= 1
    return item


@fuzz
@given(content=mutated(PNG))
def test_png_is_what_it_was_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.png"
    path.write_bytes(content)
    plane = outcome(lambda: slice_of(str(path)), path)
    assert plane is None or np.array_equal(plane, PLANE)
    outcome(lambda: picture_of(str(path)), path)


def chunks_of(content):
    place = 8
    while place < len(content):
        (length,) = struct.unpack_from(">I", content, place)
        yield content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        place += 12 + length


TEXT = (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 21)))  # 2 KB that become 2 MB
FRAMES = (b"acTL", struct.pack(">II", 2**31, 0))
PALETTE = (b"PLTE", bytes(range(48)))
CHUNKS = [*chunks_of(PNG), TEXT, FRAMES, PALETTE, (b"tRNS", b"\0\7"), (b"IHDR", b"\xff" * 13)]


@fuzz
@given(data=st.data())
def test_png_chunks_with_right_checksums(tmp_path_factory, data):
    chunks = list(CHUNKS[:3])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(chunks) - 1))
        name, own = chunks[place]
        other = data.draw(st.sampled_from(CHUNKS))
        chunks[place : place + 1] = data.draw(
            st.sampled_from(
                [
                    [(name, data.draw(mutated(own)))],
                    [(data.draw(st.binary(min_size=4, max_size=4)), own)],
                    [(name, own), other],
                    [other],
                    [],
                ]
            )
        )
        assume(chunks)
    parts = [
        struct.pack(">I", len(own)) + name + own + struct.pack(">I", zlib.crc32(name + own))
        for name, own in chunks
    ]
    path = tmp_path_factory.getbasetemp() / "chunks.png"
    path.write_bytes(PNG[:8] + b"".join(parts))
    outcome(lambda: slice_of(str(path)), path)
    outcome(lambda: picture_of(str(path)), path)


RGB = Image.fromarray(np.stack([PLANE, PLANE.T, 255 - PLANE], axis=-1))
PICTURES = [encoded("JPEG", RGB), encoded("GIF", RGB), encoded("PNG", RGB), encoded("TIFF", RGB)]
PICTURES += [encoded("PNG", RGB.quantize(7)), encoded("JPEG", RGB, progressive=True)]


@fuzz
@given(content=st.sampled_from(PICTURES).flatmap(mutated))
def test_pictures(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "a.jpg"
    path.write_bytes(content)
    outcome(lambda: picture_of(str(path)), path)


# ------------------------------------------------------------------------------------ dataset.json

CASES = [
    {"subject": "Subject_001", "case": "P_1", "split": "train", "slices": [1, 2]},
    {"subject": "Subject_002", "case": "P_2", "split": "test", "slices": [7]},
]
DATASET = {
    "format": "brats-slices",
    "version": 1,
    "image_size": 256,
    "label_convention": "2020",
    "geometry": {
        "volume_shape": [240, 240, 155],
        "padding": [[8, 8], [8, 8]],
        "affine": made.AFFINE.tolist(),
    },
    "cases": CASES,
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(10**18), 2**63, 1e308, float("nan"), float("inf")]),
    st.text(max_size=8),
    st.sampled_from(["train", "Subject_001", "1" * 5000, "\ud800", "\0", "../../etc"]),
)
LISTS = st.lists(SCALARS, max_size=4)
VALUES = st.one_of(
    SCALARS,
    LISTS,
    st.lists(LISTS, max_size=4),
    st.dictionaries(st.text(max_size=4), SCALARS | LISTS, max_size=3),
)


def places_in(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places_in(value[key], (*path, key))


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    root = tmp_path_factory.mktemp("slices")
    for channel in ("Seg", "T1CE"):
        (root / channel).mkdir()
        for case in CASES:
            for z in case["slices"]:
                name = brats.slice_name(f"{case['subject']}_slice_{z}", channel)
                (root / channel / name).write_bytes(PNG)
    return root


def check_dataset(root):
    dataset = brats.read_dataset_json(str(root))
    geometry = nifti_export.geometry_of(dataset)
    if geometry:
        assert np.isfinite(nifti_export.slice_affine(geometry, 64)).all()
        nifti_export.labels_of(PLANE, geometry["label_convention"])
    for files in brats_dataset.get_BRATS_paths(["Seg", "T1CE"], str(root)):
        assert all(os.path.exists(path) for path in files)


@fuzz
@given(data=st.data())
def test_dataset_json_of_other_types(slices, data):
    dataset = json.loads(json.dumps(DATASET))
    for _ in range(data.draw(st.integers(1, 2))):
        *parents, key = data.draw(st.sampled_from(list(places_in(dataset))[1:]))
        holder = dataset
        for parent in parents:
            holder = holder[parent]
        if data.draw(st.booleans()):
            holder[key] = data.draw(VALUES)
        else:
            del holder[key]
        assume(len(dataset) > 1)
    with contextlib.suppress(ValueError):  # of an integer with too many digits to be written
        (slices / "dataset.json").write_text(json.dumps(dataset))
    outcome(lambda: check_dataset(slices), slices)


NESTED = [b"[" * 10_000, b'{"a":' * 10_000]
TEXTS = [json.dumps(DATASET).encode(), b"", *NESTED, b"\xff\xfe", b"1" * 5000]


@fuzz
@given(content=st.sampled_from(TEXTS).flatmap(mutated))
def test_dataset_json_bytes(slices, content):
    (slices / "dataset.json").write_bytes(content)
    outcome(lambda: check_dataset(slices), slices)


# ------------------------------------------------------------------------------------------- names

NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"])
    | st.sampled_from("_-. 0123456789\u0301eE"),
    min_size=1,
    max_size=12,
).filter(lambda name: name not in (".", "..") and len(name.encode()) < 60)


@fuzz
@given(stem=NAMES, channel=st.sampled_from(brats.CHANNELS))
def test_every_stem_survives_its_suffix(stem, channel):
    normal = unicodedata.normalize("NFC", stem)
    assert brats.split_slice_name(brats.slice_name(stem, channel), channel) == normal
    assert brats.split_slice_name(brats.slice_name(normal, channel), channel) == normal


@fuzz
@given(texts=st.lists(st.text(st.sampled_from("ab_019\u0665\u00b2"), max_size=8), max_size=6))
def test_natural_order_is_an_order(texts):
    ordered = sorted(texts, key=brats.natural_key)
    backwards = texts[::-1]
    assert ordered == sorted(backwards, key=brats.natural_key)
    digits = [text for text in texts if text.isascii() and text.isdigit()]
    assert [int(text) for text in sorted(digits, key=brats.natural_key)] == sorted(map(int, digits))


@fuzz
@given(stems=st.lists(NAMES, min_size=1, max_size=4), other=st.none() | NAMES)
def test_slices_pair_by_name_or_are_refused(tmp_path_factory, stems, other):
    root = tmp_path_factory.mktemp("names")
    for channel, form in (("Seg", "NFC"), ("T1CE", "NFD")):
        (root / channel).mkdir()
        for stem in stems:
            name = brats.slice_name(unicodedata.normalize(form, stem), channel)
            (root / channel / name).write_bytes(PNG)
    if other:
        (root / "Seg" / f"{other}.png").write_bytes(PNG)
    try:
        pairs = brats_dataset.get_BRATS_paths(["Seg", "T1CE"], str(root))
    except ValueError as error:
        hidden = any(stem.startswith(".") for stem in stems)
        assert other or hidden or "two files for the slice" in str(error), error
        return
    for seg, t1ce in pairs:
        assert os.path.exists(seg) and os.path.exists(t1ce)
        assert brats.split_slice_name(os.path.basename(seg), "Seg") == brats.split_slice_name(
            os.path.basename(t1ce), "T1CE"
        )


# ------------------------------------------------------------------------------------- checkpoints

WEIGHTS = OrderedDict(
    [
        ("weight", torch.arange(12, dtype=torch.float32).reshape(3, 4)),
        ("bias", torch.ones(4, dtype=torch.float64)),
        ("steps", torch.tensor(7)),
    ]
)
METADATA = {"flags": {"image_size": 64, "lr": 1e-4}, "channels": ["Seg", "T1CE"], "step": 5}


def saved(**options):
    file = io.BytesIO()
    torch.save(checkpoint.with_metadata(WEIGHTS, METADATA), file, **options)
    return file.getvalue()


ARCHIVE, LEGACY = saved(), saved(_use_new_zipfile_serialization=False)


def opened(path):
    """Both ways to open a checkpoint; the weights."""
    assert checkpoint.load(str(path)) is not None
    return checkpoint.load_weights(str(path))


@fuzz
@given(content=mutated(ARCHIVE))
def test_checkpoint_is_what_it_was_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "model000005.pt"
    path.write_bytes(content)
    weights = outcome(lambda: opened(path), path)
    if weights is not None:
        assert list(weights) == list(WEIGHTS)
        assert all(torch.equal(weights[name], own) for name, own in WEIGHTS.items())


@fuzz
@given(content=mutated(LEGACY))
def test_checkpoint_of_the_old_format(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "model000006.pt"
    path.write_bytes(content)
    outcome(lambda: opened(path), path)


def members_of(archive):
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return {name: file.read(name) for name in file.namelist()}


def rezipped(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as archive:
        warnings.simplefilter("ignore")  # a name that comes twice
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


MEMBERS = members_of(ARCHIVE)
PREFIX = next(iter(MEMBERS)).split("/")[0]
STRANGE = [
    "../../trap",
    "/trap",
    f"{PREFIX}/constants.pkl",
    f"{PREFIX}/code/__torch__.py",
    "a" * 99,
]


@fuzz
@given(data=st.data())
def test_checkpoint_with_other_members(tmp_path_factory, data):
    """Members changed, lost, renamed or added, with checksums that are right again."""
    members = list(MEMBERS.items())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(members) - 1))
        name, own = members[place]
        change = data.draw(st.sampled_from(["change", "lose", "rename", "add", "twice"]))
        if change == "change":
            members[place] = name, data.draw(mutated(own))
        elif change == "lose":
            del members[place]
            assume(members)
        elif change == "rename":
            members[place] = data.draw(st.sampled_from(STRANGE)), own
        elif change == "add":
            members.append((data.draw(st.sampled_from(STRANGE)), data.draw(mutated(own))))
        else:
            members.append((name, data.draw(mutated(own))))
    compression = data.draw(st.sampled_from([zipfile.ZIP_STORED] * 3 + [zipfile.ZIP_DEFLATED]))
    path = tmp_path_factory.getbasetemp() / "model000007.pt"
    path.write_bytes(rezipped(members, compression))
    outcome(lambda: opened(path), path)


def test_what_is_mutated_is_sound(tmp_path, slices):
    """Otherwise all would be refused for one and the same reason."""
    path = tmp_path / "a"
    for content in NIFTI.values():
        path.write_bytes(content)
        assert np.array_equal(prepared(str(path)), made.volume("T1", shape=SHAPE))
    path.write_bytes(PNG)
    assert np.array_equal(slice_of(str(path)), PLANE)
    for content in PICTURES:
        path.write_bytes(content)
        assert (outcome(lambda: picture_of(str(path)), path) is None) == (content[:2] == b"II")
    for content in (ARCHIVE, LEGACY, rezipped(MEMBERS.items())):
        path.write_bytes(content)
        weights = opened(path)
        assert all(torch.equal(weights[name], own) for name, own in WEIGHTS.items())
        assert checkpoint.metadata_of(weights) == METADATA
    (slices / "dataset.json").write_text(json.dumps(DATASET))
    check_dataset(slices)


class Call:
    """Pickled, it asks the reader to call a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(trap):
    """Objects that would create the file ``trap``, were they loaded as pickles usually are."""
    code = f"open({str(trap)!r}, 'w').close()"
    return [
        Call(os.mkdir, str(trap)),
        Call(os.system, f"touch '{trap}'"),
        Call(eval, code),
        Call(exec, code),
        Call(open, str(trap), "w"),
        Call(Path.touch, trap),
        Call(np.save, str(trap), 1),
        Call(torch.save, 1, str(trap)),
    ]


def test_the_traps_are_real(tmp_path):
    for place, call in enumerate(hostile(tmp_path / "trap")):
        pickle.loads(pickle.dumps(call))
        made_by_call = [path for path in tmp_path.iterdir() if path.name.startswith("trap")]
        assert made_by_call, place
        for path in made_by_call:
            path.rmdir() if path.is_dir() else path.unlink()


@fuzz
@given(data=st.data())
def test_nothing_in_a_checkpoint_is_executed(tmp_path_factory, data):
    trap = tmp_path_factory.getbasetemp() / "trap"
    call = data.draw(st.sampled_from(hostile(trap)))
    content = data.draw(
        st.sampled_from(
            [
                call,
                [call],
                {"weight": call},
                {call: 1} if data.draw(st.booleans()) else {"state": {0: {"step": call}}},
                OrderedDict(WEIGHTS, extra=call),
                checkpoint.with_metadata(WEIGHTS, {"flags": {"image_size": call}}),
            ]
        )
    )
    protocol = data.draw(st.integers(0, 5))
    form = data.draw(st.sampled_from(["zip", "old", "pickle", "second", "mutated"]))
    file = io.BytesIO()
    if form in ("pickle", "second"):
        pickle.dump(content, file, protocol)
    else:
        archive = form != "old"
        torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=archive)
    raw = file.getvalue()
    if form == "second":  # a second pickle where the archive has its first
        raw = rezipped([*MEMBERS.items(), (f"{PREFIX}/data.pkl", raw)])
    elif form == "mutated":
        raw = data.draw(mutated(raw))
    path = tmp_path_factory.getbasetemp() / "model000008.pt"
    path.write_bytes(raw)
    outcome(lambda: opened(path), path)
    assert not list(trap.parent.glob("trap*"))
