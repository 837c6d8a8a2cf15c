from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "improved_diffusion" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="improved-diffusion",
    version=VERSION,
    description="Multi-channel diffusion models for brain-MRI slices with their tumour masks",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=["improved_diffusion", "improved_diffusion.evaluation"],
    py_modules=["brats_dataset"],
    install_requires=[
        "torch>=2.6",  # before, weights_only loading had a hole (CVE-2025-32434)
        "numpy>=1.26",
        "nibabel>=5.0",
        "pillow>=10.1",
        "blobfile>=2.0",
        "mpi4py>=3.1",
        "tqdm>=4.60",
    ],
    extras_require={
        "plots": ["matplotlib>=3.10"],
        "tensorboard": ["tensorboard>=2.12"],
        # mpi4py needs an MPI library only for runs of several processes; this one comes as a wheel.
        "mpi": ["mpich"],
        # Solvers are tested against its schedulers.
        "peers": ["diffusers>=0.30"],
        # segmentation_eval.py's network, losses, metrics and test.
        "eval": ["monai>=1.3", "scipy>=1.11", "matplotlib>=3.10"],
        "test": [
            "hypothesis>=6.100",
            "matplotlib>=3.10",
            "monai>=1.3",
            "mpich",
            "pytest>=7.4",
            "pytest-xdist>=3.3",
            "ruff==0.17.6",
            "scipy>=1.11",
        ],
    },
)
