"""Power averages: their mathematics, in training, and other lengths made of them afterwards."""

import json
import os
import re
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from test_scripts import TRAIN, refused, script, write_slices  # noqa: F401
from test_train_util import assert_equal, batches, full_disk, make, spoilt

from improved_diffusion import checkpoint, logger, posthoc_script, power_ema
from improved_diffusion.cost import training_cost
from improved_diffusion.power_ema import gamma_of, posthoc_weights, sigma_rel_of
from improved_diffusion.training_script import train

LENGTHS = {"ema_sigma_rel": "0.05,0.10"}


# Mathematics


@pytest.mark.parametrize(
    ("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.15, 3.56), (0.25, 0.72)]
)
def test_exponents_of_lengths(sigma_rel, gamma):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.005)


def test_lengths_are_standard_deviations():
    """The constant profile's is that of the uniform distribution; the others' by integration."""
    assert sigma_rel_of(0) == pytest.approx(12**-0.5, rel=1e-15)
    middles = (np.arange(100_000) + 0.5) / 100_000
    for sigma_rel in np.geomspace(*power_ema.SIGMA_REL_RANGE, 30):
        gamma = gamma_of(sigma_rel)
        assert gamma > 0
        assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-12)
        if sigma_rel > 0.01:
            profile = (gamma + 1) * middles**gamma / len(middles)
            mean = profile @ middles
            assert profile @ (middles - mean) ** 2 == pytest.approx(sigma_rel**2, rel=1e-4)


@pytest.mark.parametrize("text", ["a", "0", "0.3", "-0.1", "0.1,0.10", "0.1,", "nan"])
def test_impossible_lengths(text):
    with pytest.raises(ValueError, match=re.escape(f"--sigma_rel {text}: expected different")):
        power_ema.parse_sigma_rels("--sigma_rel", text)


def test_lengths():
    assert power_ema.parse_sigma_rels("--x", "0.05,0.10") == [0.05, 0.1]
    assert power_ema.parse_sigma_rels("--x", "") == []


def discrete(time, gamma, number):
    """How much each of ``number`` updates counts at ``time``: the profile's integral over it."""
    k = np.arange(1, number + 1)
    return np.where(k <= time, (k / time) ** (gamma + 1) - ((k - 1) / time) ** (gamma + 1), 0)


def test_updates_add_up_to_the_profile():
    values = np.random.default_rng(0).normal(size=300)
    for gamma in (0, 1.5, 16.97):
        average = 1e9  # which the first update forgets
        for update, value in enumerate(values, 1):
            rate = power_ema.rate(update, gamma)
            average = rate * average + (1 - rate) * value
            weights = discrete(update, gamma, 300)
            assert weights.sum() == pytest.approx(1, rel=1e-12)
            assert average == pytest.approx(weights @ values, abs=1e-12)


def test_inner_products_are_integrals():
    times, gammas = [100, 70, 100, 3], [16.97, 6.94, 0, 2.5]
    others, other_gammas = [100, 120, 50], [6.94, 3, 16.97]
    products = power_ema.inner_products(times, gammas, others, other_gammas)
    middles = (np.arange(600_000) + 0.5) * (120 / 600_000)

    def profile(time, gamma):
        return np.where(middles <= time, (gamma + 1) * (middles / time) ** gamma / time, 0)

    for i, own in enumerate(zip(times, gammas)):
        for j, other in enumerate(zip(others, other_gammas)):
            integral = (profile(*own) * profile(*other)).sum() * (120 / 600_000)
            assert products[i, j] == pytest.approx(integral, rel=2e-4, abs=1e-12)
    swapped = power_ema.inner_products(others, other_gammas, times, gammas)
    np.testing.assert_allclose(swapped.T, products, rtol=1e-14)


def stored(number, last):
    """Times and exponents of two lengths, evenly spaced."""
    times = np.repeat(np.linspace(last / number, last, number), 2)
    return times, np.tile([gamma_of(0.05), gamma_of(0.1)], number)


def test_a_stored_average_is_itself():
    times, gammas = stored(20, 2000)
    for i in (0, 7, 38, 39):
        weights, error = posthoc_weights(times, gammas, times[i], gammas[i])
        np.testing.assert_allclose(weights, np.eye(40)[i], atol=1e-10)
        assert error < 1e-6


def test_the_weights_are_the_best_with_a_sum_of_one():
    """Any other weights with this sum are further from the profile; the error is as integrated."""
    times, gammas = stored(8, 800)
    wanted = gamma_of(0.15)
    weights, error = posthoc_weights(times, gammas, 800, wanted)
    assert weights.sum() == pytest.approx(1, rel=1e-12)
    middles = (np.arange(80_000) + 0.5) / 100

    def profile(time, gamma):
        return np.where(middles <= time, (gamma + 1) * (middles / time) ** gamma / time, 0)

    profiles = np.array([profile(t, g) for t, g in zip(times, gammas)])
    target = profile(800, wanted)

    def distance(own):
        return np.linalg.norm(own @ profiles - target) / np.linalg.norm(target)

    assert error == pytest.approx(distance(weights), rel=1e-3)
    generator = np.random.default_rng(0)
    for _ in range(20):
        change = generator.normal(size=16) * 0.01
        assert distance(weights + change - change.mean()) > error


@pytest.mark.parametrize(
    ("sigma_rel", "at", "expected", "limit"),
    [
        (0.03, 2000, 0.0264, 8e-3),
        (0.08, 2000, 0.0019, 3e-4),
        (0.2, 2000, 0.0155, 2e-3),
        (0.08, 1000, 0.0073, 2e-3),
        (0.15, 1000, 0.0220, 3e-3),
    ],
)
def test_a_third_average_of_a_random_walk(sigma_rel, at, expected, limit):
    """Two averages at 20 times give one that was followed all along, relative to how far the
    weights are from it; also at an earlier time, and far from 0, where only a sum of 1 holds."""
    generator = np.random.default_rng(0)
    walk = 1000 + np.cumsum(generator.normal(size=(2000, 200)), axis=0)
    times, gammas = stored(20, 2000)
    used = times <= at
    assert used.sum() == (40 if at == 2000 else 20)
    weights, error = posthoc_weights(times[used], gammas[used], at, gamma_of(sigma_rel))
    assert error == pytest.approx(expected, abs=1e-4)
    averages = {}
    for gamma in (gamma_of(0.05), gamma_of(0.1), gamma_of(sigma_rel)):
        average = np.zeros(200)
        for update, values in enumerate(walk, 1):
            rate = power_ema.rate(update, gamma)
            average = rate * average + (1 - rate) * values
            averages[update, gamma] = average
    own = sum(w * averages[t, g] for w, t, g in zip(weights, times, gammas))
    tracked = averages[at, gamma_of(sigma_rel)]
    distance = np.linalg.norm(tracked - walk[at - 1])
    assert np.linalg.norm(own - tracked) < limit * distance


# Training


def files(folder, step):
    return {
        path.name: path.read_bytes()
        for path in folder.glob(f"*_{step:06d}.pt")
        if path.name.startswith("ema_p")
    }


def test_averages_of_a_training_are_the_weighted_sums(tmp_path):
    """A step that is skipped counts as an update, as for the other averages."""
    loop = make(tmp_path, data=spoilt({0, 4}), max_steps=12, **LENGTHS)
    start = torch.cat([p.detach().flatten() for p in loop.params])
    seen = []
    for update in range(12):
        loop.run_step(*next(loop.data))
        seen.append(torch.cat([p.detach().flatten() for p in loop.params]).double())
        if update == 0:
            for averages in loop.power_params:
                assert all(torch.equal(a, p) for a, p in zip(averages, loop.params))
    assert torch.equal(seen[0], start.double()) and torch.equal(seen[4], seen[3])
    loop.save()
    for length in (0.05, 0.1):
        path = str(tmp_path / checkpoint.snapshot_name(length, 12))
        saved = checkpoint.load_weights(path)
        weights = torch.from_numpy(discrete(12, gamma_of(length), 12))
        expected = (weights[:, None] * torch.stack(seen)).sum(dim=0)
        own = torch.cat([value.flatten() for value in saved.values()]).double()
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-7)
        assert checkpoint.metadata_of(saved) == {"step": 12, "sigma_rel": length}


@pytest.mark.parametrize("stop", [5, 7])
def test_a_continued_run_ends_with_the_same_files(tmp_path, stop):
    """Snapshots between the checkpoints and skipped steps included, to the last byte."""
    settings = {**LENGTHS, "ema_snapshot_interval": 4, "save_interval": 6}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    bad = {0, 3, 8}
    make(whole, data=spoilt(bad), max_steps=14, **settings).run_loop()
    assert [step for step, _ in checkpoint.snapshots(str(whole))][::2] == [4, 6, 8, 12, 14]
    make(parts, data=spoilt(bad), max_steps=stop, **settings).run_loop()
    path = str(parts / checkpoint.model_name(stop))
    loop = make(parts, data=spoilt(bad, stop), resume_checkpoint=path, max_steps=14, **settings)
    loop.run_loop()
    for step in (4, 6, 8, 12, 14):
        if step != 6 or stop == 5:
            assert len(files(whole, step)) == 2
        assert files(parts, step) == files(whole, step)
    for name in ("model000014.pt", "opt000014.pt", "ema_0.9_000014.pt"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_other_files_are_the_same_with_and_without(tmp_path):
    make(tmp_path / "a", max_steps=6, log_interval=3).run_loop()
    make(tmp_path / "b", max_steps=6, log_interval=3, **LENGTHS).run_loop()
    for name in ("opt000006.pt", "ema_0.9_000006.pt", "ema_0.5_000006.pt", "progress.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    a, b = (checkpoint.load_weights(str(tmp_path / x / "model000006.pt")) for x in "ab")
    assert_equal(dict(a), dict(b))
    more = set(checkpoint.metadata_of(b)["files"]) - set(checkpoint.metadata_of(a)["files"])
    assert more == {"ema_p0.05_000006.pt", "ema_p0.1_000006.pt"}


def test_power_averages_belong_to_the_checkpoint(tmp_path):
    make(tmp_path, max_steps=10, save_interval=5, **LENGTHS).run_loop()
    newest, older = str(tmp_path / "model000010.pt"), str(tmp_path / "model000005.pt")
    checkpoint.verify(newest, [0.9], [0.05, 0.1])
    with pytest.raises(ValueError, match=r"p0\.2_000010.*leave its length out of --ema_sigma_rel"):
        checkpoint.verify(newest, [0.9], [0.2])
    with pytest.raises(ValueError, match=r"ema_p0\.2_000010\.pt is missing .* leave 0\.2 out of"):
        make(tmp_path, resume_checkpoint=newest, ema_sigma_rel="0.05,0.2")
    path = tmp_path / "ema_p0.1_000010.pt"
    content = path.read_bytes()
    path.write_bytes(content[:-200] + b"x" + content[-199:])
    used, (sentence,) = checkpoint.find_resume_checkpoint("latest", str(tmp_path))
    assert used == older and "ema_p0.1_000010.pt is not the file that was saved" in sentence
    path.unlink()
    with pytest.raises(ValueError, match=r"ema_p0\.1_000010\.pt is missing beside"):
        checkpoint.verify(newest)


def test_older_checkpoints_go_and_snapshots_stay(tmp_path):
    settings = {"save_interval": 2, "max_steps": 16, "keep_checkpoints": 4}
    (tmp_path / "ema_posthoc_0.08_000006.pt").write_bytes(b"")
    make(tmp_path, restart=True, **settings, **LENGTHS).run_loop()
    assert os.listdir(tmp_path / "superseded") == ["ema_posthoc_0.08_000006.pt"]
    assert checkpoint.complete_steps(str(tmp_path)) == [4, 8, 14, 16]
    expected = [(step, length) for step in range(2, 17, 2) for length in (0.05, 0.1)]
    assert checkpoint.snapshots(str(tmp_path)) == expected
    (tmp_path / "ema_posthoc_0.08_000004.pt").write_bytes(b"")
    assert checkpoint.thin_out(str(tmp_path), 2) == [4, 8]
    assert len(list(tmp_path.glob("*.pt"))) == 2 * 4 + len(expected) + 1


def test_newer_snapshots_are_moved_aside(tmp_path):
    settings = {**LENGTHS, "ema_snapshot_interval": 3, "save_interval": 5}
    make(tmp_path, max_steps=12, **settings).run_loop()
    (tmp_path / "ema_posthoc_0.08_000012.pt").write_bytes(b"")
    path = str(tmp_path / "model000005.pt")
    make(tmp_path, start=5, resume_checkpoint=path, **settings)
    assert [step for step, _ in checkpoint.snapshots(str(tmp_path))] == [3, 3, 5, 5]
    moved = os.listdir(tmp_path / "superseded")
    assert len(moved) == 2 * 4 + 2 * 4 + 1  # steps 6, 9, 10, 12; two checkpoints; the result
    (tmp_path / "ema_p0.05_000009.pt.partial").write_text("half")
    checkpoint.remove_partial(str(tmp_path))
    assert not list(tmp_path.glob("*.partial"))
    assert checkpoint.holds_run(str(tmp_path / "superseded"))


def test_a_snapshot_that_cannot_be_written_is_left_out(tmp_path, monkeypatch, capsys):
    save = checkpoint.save

    def limited(content, path):
        if path.endswith("_000004.pt"):
            raise OSError(f"cannot write {path}: No space left on device")
        return save(content, path)

    monkeypatch.setattr(checkpoint, "save", limited)
    loop = make(tmp_path, max_steps=7, ema_snapshot_interval=2, **LENGTHS)
    logger.configure(str(tmp_path), ["stdout"])
    loop.run_loop()
    assert [step for step, _ in checkpoint.snapshots(str(tmp_path))] == [2, 2, 6, 6, 7, 7]
    assert "the snapshot of the averages at step 4 is left out: cannot" in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_written_leaves_none_of_its_averages(tmp_path, monkeypatch):
    full_disk(monkeypatch, {5, 7})
    with pytest.raises(OSError, match=r"model000007\.pt: No space left"):
        make(tmp_path, save_interval=5, max_steps=7, **LENGTHS).run_loop()
    assert checkpoint.snapshots(str(tmp_path)) == [(6, 0.05), (6, 0.1)]
    assert checkpoint.complete_steps(str(tmp_path)) == [6]


def test_the_automatic_microbatch_counts_all_averages(tmp_path, monkeypatch):
    counted = []

    def cost(*args, averages, **kwargs):
        counted.append(averages)
        return training_cost(*args, averages=averages, **kwargs)

    monkeypatch.setattr("improved_diffusion.train_util.training_cost", cost)
    loop = make(tmp_path, microbatch="auto", **LENGTHS)
    loop.run_step(*next(batches()))
    assert counted == [4]


# Afterwards


def write_snapshot(folder, step, length, values, **about):
    weights = OrderedDict(weight=torch.as_tensor(values), count=torch.tensor(step))
    metadata = {"step": step, "sigma_rel": length, "flags": {"num_channels": 32}, **about}
    path = str(folder / checkpoint.snapshot_name(length, step))
    checkpoint.save(checkpoint.with_metadata(weights, metadata), path)
    return path


def test_sums_are_taken_in_double_precision(tmp_path):
    """1 + 2^-30 - 1 is nothing in float32. What is no number is the newest's."""
    snapshots = [(10, 0.05), (20, 0.05), (20, 0.1)]
    for (step, length), value in zip(snapshots, (1.0, -1.0, 2.0**-30)):
        write_snapshot(tmp_path, step, length, [value, 4.0], channels=["Seg"])
    weights = np.array([[1.0, 1.0, 1.0], [0.25, 0.25, 0.5]])
    (total, mixed), metadata = posthoc_script.combine(str(tmp_path), snapshots, weights)
    assert total["weight"].dtype == torch.float32
    assert total["weight"].tolist() == [2.0**-30, 12.0]
    assert mixed["weight"].tolist() == [2.0**-31, 4.0]
    assert total["count"].item() == 20 and total["count"].dtype == torch.int64
    assert (metadata["step"], metadata["channels"]) == (20, ["Seg"])


def test_snapshots_of_other_runs_are_refused(tmp_path):
    snapshots, weights = [(10, 0.05), (20, 0.05)], np.ones((1, 2))
    write_snapshot(tmp_path, 20, 0.05, [1.0, 2.0], version="2")
    path = write_snapshot(tmp_path, 10, 0.05, [1.0, 2.0], version="1")
    posthoc_script.combine(str(tmp_path), snapshots, weights)
    for values, about in [
        ([1.0, 2.0, 3.0], {}),
        ([1.0, 2.0], {"flags": {"num_channels": 64}}),
        ([1.0, 2.0], {"channels": ["T1"]}),
    ]:
        write_snapshot(tmp_path, 10, 0.05, values, **about)
        with pytest.raises(ValueError, match=f"{path} is of another network or run than .*20.pt"):
            posthoc_script.combine(str(tmp_path), snapshots, weights)
    os.replace(tmp_path / "ema_p0.05_000020.pt", path)
    with pytest.raises(ValueError, match=r"there is no checkpoint file .*000020\.pt"):
        posthoc_script.combine(str(tmp_path), snapshots, weights)
    with pytest.raises(ValueError, match=f"{path} is not what its name says: .* of step 20"):
        posthoc_script.combine(str(tmp_path), snapshots[:1], weights[:, :1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 24 steps with ten snapshots of two lengths, whose 0.07 was kept as well."""
    folder = tmp_path_factory.mktemp("posthoc")
    write_slices(folder / "slices")
    argv = ["--data_dir", folder / "slices", *TRAIN, "--out_dir", folder / "run"]
    argv += ["--max_steps", 24, "--save_interval", 12, "--sample_interval", 0, "--lr", 1e-3]
    argv += ["--eval_interval", 0, "--ema_snapshot_interval", 1, "--ema_sigma_rel", "0.05,0.1,0.07"]
    before, sys.argv = sys.argv, ["image_train", *map(str, argv)]
    try:
        train("")
    finally:
        sys.argv = before
    kept = folder / "kept"
    kept.mkdir()
    for path in (folder / "run").glob("ema_p0.07_*.pt"):
        path.rename(kept / path.name)
    return folder / "run"


def test_other_lengths_of_a_run(run, script, tmp_path):  # noqa: F811
    """The tracked average comes out, at the end and at an earlier step, and can be sampled."""
    for step, limit in ((24, 2e-3), (15, 4e-3)):
        out = tmp_path / f"own{step}.pt"
        argv = ["--run_dir", run, "--sigma_rel", 0.07, "--out", out, "--step", step]
        status, output, _ = script("ema_posthoc", *argv)
        assert status == 0
        number = 2 * step
        error = re.search(rf"0\.07 at step {step} from {number} snapshots: (.*)% off", output)
        assert 0.01 < float(error[1]) < 1
        own = checkpoint.load_weights(str(out))
        name = checkpoint.snapshot_name(0.07, step)
        tracked = checkpoint.load_weights(str(run.parent / "kept" / name))
        raw = f"model{24 if step == 24 else 12:06d}.pt"
        raw = checkpoint.load_weights(str(run / raw))

        def distance(a, b):
            return sum((a[key] - b[key]).double().square().sum() for key in a).sqrt()

        assert distance(own, tracked) < limit * distance(raw, tracked)
        assert own.keys() == raw.keys() and own["out.2.weight"].dtype == torch.float32
        about = checkpoint.metadata_of(tracked)
        assert checkpoint.metadata_of(own) == {**about, "sigma_rel": 0.07, "posthoc": True}
        assert about["step"] == step and about["channels"] == ["Seg", "T1CE"]

    for name, path in (("own", out), ("stored", run / "ema_p0.05_000024.pt")):
        argv = ["--model_path", path, "--num_samples", 1, "--sample_dir", tmp_path / name]
        assert script("image_sample", *argv, "--sampling_steps", 2)[0] == 0
        about = json.loads((tmp_path / name / "samples.json").read_text())
        assert about["step"] == (15 if name == "own" else 24)


def test_several_lengths_at_once(run, script):  # noqa: F811
    """A stored one comes out to the last bit. Nothing is overwritten."""
    status, output, error = script("ema_posthoc", "--run_dir", run, "--sigma_rel", "0.05,0.2")
    assert status == 0 and "warning" not in error
    paths = [run / f"ema_posthoc_{length}_000024.pt" for length in (0.05, 0.2)]
    assert re.findall("wrote (.*)", output) == list(map(str, paths))
    stored = checkpoint.load_weights(str(run / "ema_p0.05_000024.pt"))
    assert_equal(dict(checkpoint.load_weights(str(paths[0]))), dict(stored))
    result = script("ema_posthoc", "--run_dir", run, "--sigma_rel", "0.06,0.2")
    refused(result, paths[1], "is there already, and nothing is overwritten")
    assert not (run / "ema_posthoc_0.06_000024.pt").exists()
    for path in paths:
        path.unlink()


def test_what_cannot_be_made_is_refused(run, script, tmp_path):  # noqa: F811
    def result(*argv, folder=run):
        return script("ema_posthoc", "--run_dir", folder, *argv)

    before = sorted(os.listdir(run))
    refused(script("ema_posthoc", "--sigma_rel", 0.1), "--run_dir is missing")
    refused(result(), "--sigma_rel is missing")
    refused(result("--sigma_rel", 0.4), "--sigma_rel 0.4: expected", "0.001 to 0.288")
    refused(result("--sigma_rel", 0.1, folder=tmp_path), tmp_path, "holds no snapshots")
    refused(result("--sigma_rel", 0.1, folder="nowhere"), "nowhere holds no snapshots")
    refused(result("--sigma_rel", 0.1, "--step", 30), "--step 30", "of step 23 and 24")
    refused(result("--sigma_rel", "0.1,0.2", "--out", "x.pt"), "--out x.pt names one file")
    refused(result("--sigma_rel", 0.001), "cannot express this (sigma_rel 0.001 at step 24")
    assert sorted(os.listdir(run)) == before

    write_snapshot(tmp_path, 10, 0.05, [1.0])
    refused(result("--sigma_rel", 0.06, folder=tmp_path), "from 1 snapshots", "cannot express")
    assert result("--sigma_rel", 0.05, folder=tmp_path)[0] == 0
    (tmp_path / "ema_posthoc_0.05_000010.pt").unlink()
    path = write_snapshot(tmp_path, 10, 0.1, [1.0])
    refused(result("--sigma_rel", 0.01, folder=tmp_path), "from 2 snapshots", "cannot express")
    status, _, error = result("--sigma_rel", 0.15, folder=tmp_path)
    assert status == 0 and "warning: sigma_rel 0.15 is only roughly expressed" in error
    (tmp_path / "ema_posthoc_0.15_000010.pt").unlink()
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) - 100)
    refused(result("--sigma_rel", 0.08, folder=tmp_path), path, "is no readable checkpoint")
    assert not list(tmp_path.glob("ema_posthoc*"))


def test_training_flags_of_power_averages(run, script, tmp_path, monkeypatch):  # noqa: F811
    """Bad ones are refused; the disk need counts the snapshots; a continued run keeps them."""
    out = tmp_path / "run"
    argv = ["--data_dir", run.parent / "slices", *TRAIN, "--out_dir", out, "--eval_interval", 0]
    refused(script("image_train", *argv, "--ema_sigma_rel", "0.3"), "--ema_sigma_rel 0.3")
    refused(script("image_train", *argv, "--ema_snapshot_interval", 5), "without --ema_sigma_rel")
    lengths = ["--ema_sigma_rel", "0.05,0.10"]
    refused(script("image_train", *argv, *lengths, "--ema_snapshot_interval", -1), "0 or more")
    assert not out.exists()
    monkeypatch.setattr(checkpoint, "free_bytes", lambda folder: 45 * 10**6)
    argv += [*lengths, "--ema_snapshot_interval", 1, "--save_interval", 2, "--keep_checkpoints", 2]
    status, output, _ = script("image_train", *argv, "--max_steps", 8)
    # 318,692 parameters of 4 bytes, six times over and twice.
    assert "a checkpoint takes 7.6 MB, 3 of them 22.9 MB, and 5 snapshots 12.7 MB" in output
    assert status == 0 and "NOT ENOUGH" not in output
    assert checkpoint.complete_steps(str(out)) == [6, 8]
    assert [step for step, _ in checkpoint.snapshots(str(out))][::2] == list(range(1, 9))
    argv = ["--data_dir", run.parent / "slices", "--out_dir", out, "--max_steps", 9]
    assert script("image_train", *argv, "--resume_checkpoint", "latest")[0] == 0
    assert checkpoint.snapshots(str(out))[-2:] == [(9, 0.05), (9, 0.1)]
    argv = ["--data_dir", run.parent / "slices", *TRAIN, "--dry_run", "True", "--precision", "fp32"]
    sizes = []
    for more in ([], lengths):
        output = script("image_train", *argv, *more)[1]
        sizes.append(int(re.search(r"weights and optimizer (\d+) MiB", output)[1]))
    assert sizes == [6, 9]  # five and seven numbers of 4 bytes for each parameter
