import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_wheel_holds_the_code(tmp_path):
    pytest.importorskip("setuptools", reason="building a wheel needs setuptools")
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT,
        tree,
        ignore=shutil.ignore_patterns(".*", "demo", "runs", "build", "*.egg-info", "__pycache__"),
    )
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", tmp_path, tree]
    subprocess.run(command, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "brats_dataset.py" in names
    modules = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "improved_diffusion").rglob("*.py")
    }
    assert modules <= names
    metadata = next(name for name in names if name.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    required = {
        line.split(": ")[1].split(">=")[0]
        for line in text.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    }
    assert required == {"torch", "numpy", "nibabel", "pillow", "blobfile", "mpi4py", "tqdm"}


def number_or_text(text):
    try:
        return float(text)
    except ValueError:
        return text


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("image_train", "Training"),
        ("image_sample", "Sampling"),
        ("image_nll", "Likelihood"),
        ("image_eval", "Are the samples any good?"),
        ("segmentation_eval", "Does it help?"),
        ("super_res_train", "Training"),
        ("super_res_sample", ""),
        ("ema_posthoc", ""),
        ("brats_prepare", "Your BraTS data in five commands"),
        ("brats_phantom", ""),
    ],
)
def test_readme_tells_every_flag_and_its_default(name, section):
    readme = (ROOT / "README.md").read_text()
    told = {}
    if section:
        table = readme.split(f"\n## {section}\n")[1].split("\n## ")[0]
        told = dict(re.findall(r"^\| `(--\w+)` \| (.*?) \|", table, re.MULTILINE))
        assert len(told) > 5
    command = [sys.executable, ROOT / "scripts" / f"{name}.py", "--help"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    entries = re.split(r"\s(?=--\w+ [A-Z{])", " ".join(output.split("options:")[1].split()))
    flags = {entry.split()[0]: entry for entry in entries if not entry.startswith("-h")}
    assert len(flags) > 3
    for flag, entry in flags.items():
        assert flag in re.findall(r"--\w+", readme), flag
        default = re.search(r"\(default: ([^() ]+)\)$", entry)
        if default and flag in told and " " not in told[flag] and default[1] != "None":
            own = told[flag].strip("`")
            assert number_or_text(own) == number_or_text(default[1]), flag
