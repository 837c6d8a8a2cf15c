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
        f"improved_diffusion/{path.name}" for path in (ROOT / "improved_diffusion").glob("*.py")
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


def test_every_flag_stands_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for name in ("image_train", "image_sample", "brats_prepare", "brats_phantom"):
        script = ROOT / "scripts" / f"{name}.py"
        output = subprocess.run(
            [sys.executable, script, "--help"], capture_output=True, text=True, check=True
        ).stdout
        flags = {word for word in output.split() if word.startswith("--") and word != "--"}
        assert len(flags) > 3
        for flag in flags:
            assert f"`{flag.strip('.,;:)')}" in readme or f" {flag} " in readme, (name, flag)
