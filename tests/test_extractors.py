"""Networks held to the numbers of others, with random weights; files that are not theirs."""

import functools
import itertools
import json
import zlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import relative_error

from improved_diffusion import checkpoint
from improved_diffusion.evaluation import distribution, extractors, inception, resnet


@functools.cache
def weights(network):
    """The golden numbers' weights for a class: a rule on each parameter's name."""
    found = OrderedDict()
    for name, own in network().state_dict().items():
        random = np.random.RandomState(zlib.crc32(name.encode())).randn(*own.shape)
        if name.endswith("num_batches_tracked"):
            found[name] = own
            continue
        if name.endswith("running_var"):
            random = 1 + 0.1 * np.abs(random)
        elif own.dim() == 4:
            random *= np.sqrt(2 / np.prod(own.shape[1:]))
        elif own.dim() == 1 and name.endswith("weight"):
            random = 1 + 0.1 * random
        else:
            random *= 0.1
        found[name] = torch.from_numpy(np.asarray(random)).float()
    return found


def images(seed, size):
    """uint8 [2, size, size, 3] of the golden numbers, which hold the channels first."""
    levels = np.random.RandomState(seed).randint(0, 256, (2, 3, size, size)).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("weights") / "inception.pth")
    checkpoint.save(weights(inception.InceptionV3), path)
    return path


@pytest.fixture(scope="module")
def inception_extractor(inception_file):
    return extractors.inception_v3(inception_file, checkpoint.sha256(inception_file))


@pytest.fixture(scope="module")
def radimagenet_file(tmp_path_factory):
    """A file under the authors' names: layers of torchvision's sequence, by number."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    renamed = OrderedDict()
    for name, tensor in weights(resnet.ResNet50).items():
        part, rest = name.split(".", 1)
        renamed[f"backbone.{numbers[part]}.{rest}"] = tensor
    path = str(tmp_path_factory.mktemp("weights") / "ResNet50.pt")
    checkpoint.save(renamed, path)
    return path


def test_inception_has_the_published_keys(golden):
    shapes = {name: list(t.shape) for name, t in inception.InceptionV3().state_dict().items()}
    assert shapes == golden("inception_keys.json")


@pytest.mark.parametrize(("seed", "size"), [(7, 299), (8, 256)])
def test_inception_features_equal_torch_fidelity(golden, inception_extractor, seed, size):
    found = inception_extractor(images(seed, size))
    assert found.dtype == np.float64
    assert relative_error(found, golden("inception.npz")[f"features_{size}"]) < 1e-5


def test_inception_classifier_equals_torch_fidelity(golden):
    """The layer after the features, whose weights the file also holds."""
    weight = weights(inception.InceptionV3)["fc.weight"].numpy()
    arrays = golden("inception.npz")
    logits = arrays["features_299"] @ weight.T
    assert relative_error(logits, arrays["logits_unbiased_299"]) < 1e-5


def test_resize_as_tensorflow_1_by_hand():
    """Output pixel i shows position i * old / new; past the last pixel it repeats."""
    row = torch.tensor([0.0, 10, 20, 30]).view(1, 1, 1, 4)
    assert inception.resize(row, 1, 8).flatten().tolist() == [0, 5, 10, 15, 20, 25, 30, 30]
    assert inception.resize(row, 1, 2).flatten().tolist() == [0, 20]
    assert inception.resize(row.view(1, 1, 4, 1), 8, 1).flatten()[1] == 5
    prepared = inception.prepare(torch.full((1, 3, 20, 30), 192, dtype=torch.uint8))
    assert prepared.shape == (1, 3, 299, 299) and (prepared == 0.5).all()


def test_resnet_features_equal_monai(golden, radimagenet_file):
    """Those of MONAI 1.6.1's resnet50(spatial_dims=2, conv1_t_stride=2), with equal weights."""
    extractor = extractors.radimagenet_resnet50(radimagenet_file)
    found = extractor(images(9, 256))
    assert relative_error(found, golden("resnet50.npz")["features_256"]) < 1e-5
    assert extractor.sha256 == checkpoint.sha256(radimagenet_file)
    assert "FID" not in extractor.frechet_name


def test_resnet_input_is_scaled_and_centred():
    levels = torch.zeros(1, 3, 448, 448, dtype=torch.uint8)
    levels[..., 1::2] = 255
    prepared = resnet.prepare(levels)  # each pixel shows the mean of two columns
    assert prepared.shape == (1, 3, 224, 224)
    torch.testing.assert_close(prepared, torch.zeros_like(prepared))
    white = resnet.prepare(torch.full((1, 3, 8, 8), 255))
    torch.testing.assert_close(white, torch.ones_like(white))


def test_resnet_takes_torchvision_names_and_leaves_the_classifier(radimagenet_file, tmp_path):
    own = OrderedDict(weights(resnet.ResNet50))
    own["fc.weight"], own["fc.bias"] = torch.zeros(165, 2048), torch.zeros(165)
    path = str(tmp_path / "torchvision.pt")
    checkpoint.save(own, path)
    sets = images(9, 64)
    found = [extractors.radimagenet_resnet50(p)(sets) for p in (path, radimagenet_file)]
    np.testing.assert_array_equal(*found)


def test_a_grey_image_is_three_equal_channels(inception_extractor):
    levels = images(1, 32)[..., 0]
    done = []
    grey = inception_extractor(levels, done.append)
    assert grey.shape == (2, 2048) and done == [2]
    np.testing.assert_array_equal(grey, inception_extractor(levels[..., None]))
    np.testing.assert_array_equal(grey, inception_extractor(np.stack([levels] * 3, axis=-1)))
    with pytest.raises(ValueError, match="found float32"):
        inception_extractor(levels.astype(np.float32))


def test_more_channels_are_composites(radimagenet_file):
    extractor = extractors.radimagenet_resnet50(radimagenet_file)
    five = np.random.RandomState(4).randint(0, 256, (1, 32, 32, 5)).astype(np.uint8)
    side_by_side = [extractor(five[..., own]) for own in ([0, 1, 2], [2, 3, 4])]
    np.testing.assert_allclose(extractor(five), np.concatenate(side_by_side, axis=1), rtol=1e-6)
    np.testing.assert_allclose(extractor(five[..., :2]), extractor(five[..., [0, 1, 1]]))


@pytest.mark.parametrize("channels", range(1, 9))
def test_composites_are_connected(channels):
    found = extractors.composites(channels)
    assert set().union(*found) == set(range(channels))
    for before, after in itertools.pairwise(found):
        assert set(before) & set(after)
    assert len(found) == max(1, channels // 2)


def test_only_published_weights_are_called_fid(inception_file, monkeypatch):
    digest = checkpoint.sha256(inception_file)
    own = extractors.inception_v3(inception_file, digest[:12].upper())
    assert own.sha256 == digest
    assert own.name == "Inception-v3 with other weights"
    assert "FID" not in own.frechet_name and "KID" not in own.kernel_name
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", digest[:8])
    own = extractors.open_extractor("inception", inception_file)
    assert (own.frechet_name, own.kernel_name) == ("FID", "KID")


def test_the_random_extractor_needs_no_file():
    extractor = extractors.open_extractor("random")
    samples = np.concatenate([images(2, 32)] * 150)  # more than a batch
    done = []
    found = extractor(samples, done.append)
    np.testing.assert_array_equal(found, distribution.features(samples))
    assert done == [256, 44] and found.shape == (300, 160 + 3 * 12)
    assert extractor.sha256 == ""
    assert "FID" not in json.dumps([extractor.name, extractor.frechet_name])


def test_memory_maps_are_read_in_batches(tmp_path):
    samples = images(3, 32)
    np.save(tmp_path / "samples.npy", samples)
    mapped = np.load(tmp_path / "samples.npy", mmap_mode="r")
    extractor = extractors.random()
    np.testing.assert_array_equal(extractor(mapped), extractor(samples))


def test_other_files_are_refused(inception_file, tmp_path):
    def refused(message, *arguments):
        with pytest.raises(ValueError, match=message) as caught:
            extractors.open_extractor(*arguments)
        assert "\n" not in str(caught.value)

    digest = checkpoint.sha256(inception_file)
    refused(f"has the SHA-256 {digest}, expected one that starts with 6726825d", "inception",
            inception_file)  # fmt: skip
    refused("expected one that starts with 00000000", "radimagenet", inception_file, "0" * 8)
    refused("by its first 8 or more hexadecimal digits, found '6726'", "inception",
            inception_file, "6726")  # fmt: skip
    refused("no file of weights .*nowhere.pt", "radimagenet", str(tmp_path / "nowhere.pt"))
    refused("--extractor inception needs its weights", "inception")
    refused("needs no weights", "random", inception_file)
    refused("--extractor vgg: choose from random, inception, radimagenet", "vgg")

    text = tmp_path / "text.pt"
    text.write_text("no weights")
    refused("is no readable checkpoint", "radimagenet", str(text))


def test_weights_of_other_networks_are_refused(tmp_path):
    path = str(tmp_path / "other.pt")
    checkpoint.save(OrderedDict(weight=torch.zeros(3)), path)
    message = "other.pt holds other weights than RadImageNet's ResNet-50: conv1.weight is missing"
    with pytest.raises(ValueError, match=message):
        extractors.open_extractor("radimagenet", path)
    # What Keras' weights become has biases in its convolutions, and is another network.
    keras = OrderedDict(weights(resnet.ResNet50))
    keras["conv1.bias"] = torch.zeros(64)
    with pytest.raises(ValueError, match=r"conv1.bias is \[64\] in the file, expected none"):
        extractors.load_into(resnet.ResNet50(), keras, "keras.pt", "a ResNet-50")
    uncounted = OrderedDict(
        (name, own) for name, own in weights(resnet.ResNet50).items() if "num_batches" not in name
    )
    extractors.load_into(resnet.ResNet50(), uncounted, "old.pt", "a ResNet-50")


def test_nothing_in_a_file_is_executed(tmp_path):
    marker = tmp_path / "executed"

    class Harmful:
        def __reduce__(self):
            return marker.touch, ()

    path = tmp_path / "weights.pt"
    torch.save({"conv1.weight": Harmful()}, path)
    with pytest.raises(ValueError, match="could run code when opened"):
        extractors.open_extractor("radimagenet", str(path))
    assert not marker.exists()
