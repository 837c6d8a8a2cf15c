"""Synthetic brain-tumour patients in the layout of BraTS 2020.

They stand in for the real scans, which may not be redistributed: the tools, the demo and the tests
can run on them. They look like skull-stripped brain MRI but carry no medical truth.

A patient is drawn from distances: every structure is a function of the position in millimetres that
is positive inside, and soft thresholds of these give the share of each tissue in a voxel. Axes as
in BraTS: x towards the patient's left (volume axis 0), y to the back (axis 1), z up (axis 2); the
origin lies in the middle of the cerebrum.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Sequence

import nibabel as nib
import numpy as np

from improved_diffusion.parallel import Progress, default_workers, no_progress, process_map
from improved_diffusion.seeds import check_seed

SHAPE = (240, 240, 155)
AFFINE = np.array([[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=np.float64)

PHANTOM_FILE = "phantom.json"
_PHANTOM_VERSION = 1

# Everything is computed in this box around the brain and put into the empty volume at the end.
_BOX = (slice(40, 200), slice(24, 220), slice(2, 150))
_BOX_SHAPE = tuple(part.stop - part.start for part in _BOX)
_ORIGIN = (120.0, 121.0, 68.0)  # voxel of the middle of the cerebrum

# Modality -> grey value of each tissue, relative to white matter in T1.
_CONTRASTS = {
    "flair": {
        "csf": 0.10, "grey": 0.60, "white": 0.50, "deep": 0.58, "vessel": 0.35,
        "oedema": 0.98, "rim": 0.82, "core": 0.48,
    },
    "t1": {
        "csf": 0.16, "grey": 0.56, "white": 0.86, "deep": 0.68, "vessel": 0.45,
        "oedema": 0.60, "rim": 0.55, "core": 0.34,
    },
    "t1ce": {
        "csf": 0.16, "grey": 0.53, "white": 0.78, "deep": 0.63, "vessel": 1.05,
        "oedema": 0.54, "rim": 1.22, "core": 0.32,
    },
    "t2": {
        "csf": 1.05, "grey": 0.60, "white": 0.42, "deep": 0.48, "vessel": 0.25,
        "oedema": 0.86, "rim": 0.68, "core": 0.92,
    },
}  # fmt: skip
MODALITIES = tuple(_CONTRASTS)


def write_phantoms(
    out_dir: str,
    patients: int,
    seed: int = 0,
    *,
    workers: int | None = None,
    progress: Progress = no_progress,
    log: Callable[[str], None] = print,
) -> None:
    """Write ``patients`` synthetic cases as ``BraTS20_Training_001/BraTS20_Training_001_flair...``.

    Patient i depends on the seed and i alone, byte for byte. A folder that an earlier start with
    the same seed has begun is continued; a patient's folder appears only when it is complete.

    :param workers: processes; None: one per core.
    :raises ValueError: fewer than one patient, or a folder that holds something else.
    """
    if patients < 1:
        raise ValueError(f"--patients {patients}: at least one patient is needed.")
    check_seed(seed)
    names = [f"BraTS20_Training_{number:03d}" for number in range(1, patients + 1)]
    origin = {"phantom": _PHANTOM_VERSION, "seed": seed}
    present = _present_patients(out_dir, origin, names)
    missing = [(index, name) for index, name in enumerate(names) if name not in present]
    if present:
        log(f"continuing {out_dir}: {len(present)} of {patients} patients are complete.")
    os.makedirs(out_dir, exist_ok=True)
    with open(os.path.join(out_dir, PHANTOM_FILE), "w", encoding="utf-8") as file:
        json.dump(origin, file)
    workers = min(default_workers() if workers is None else workers, max(1, len(missing)))
    with process_map(workers) as pmap:
        tasks = [(os.path.join(out_dir, name), seed, index) for index, name in missing]
        written = pmap(_write_patient, tasks)
        list(progress(written, total=len(tasks), desc="drawing", unit="patient"))
    log(f"{out_dir}: {patients} synthetic patients (seed {seed}).")


def phantom_patient(seed: int, index: int) -> dict[str, np.ndarray]:
    """Volumes of one synthetic patient.

    :param index: number of the patient, from 0.
    :returns: ``flair, t1, t1ce, t2``: int16 [240, 240, 155], 0 outside the brain and above 0 in
        it; ``seg``: int16 with the labels 0, 1 (necrotic core), 2 (oedema), 4 (enhancing tumour).
    """
    rng = np.random.default_rng((seed, index))
    head = _Head(rng)
    volumes = {}
    for modality, contrast in _CONTRASTS.items():
        volumes[modality] = head.image(rng, contrast, vessels=modality == "t1ce")
    volumes["seg"] = head.labels()
    return volumes


class _Head:
    """One patient's anatomy: distances in mm, positive inside.

    After the outline is known, all arrays are 1-D and hold the brain's voxels only.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._outline(rng)
        self._place_lesion(rng)
        self._push_aside()
        self._cortex(rng)
        self._inner(rng)
        self.texture = self._noise(rng, 2.5)

    def _noise(self, rng: np.random.Generator, spacing: float) -> np.ndarray:
        return smooth_noise(rng, _BOX_SHAPE, spacing).ravel()[self.voxels]

    def _outline(self, rng: np.random.Generator) -> None:
        """The brain's surface: cerebrum with temporal lobes, cerebellum, brain stem."""
        axes = [
            np.arange(part.start - origin, part.stop - origin, dtype=np.float32)
            for part, origin in zip(_BOX, _ORIGIN)
        ]
        x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
        # A head is never straight: a slight turn, then a smooth deformation of the whole.
        yaw, roll = rng.normal(0, 0.03, 2).tolist()
        bend = [smooth_noise(rng, _BOX_SHAPE, 32) * np.float32(2.2) for _ in range(3)]
        x, y, z = (
            bend[0] + (x + yaw * y + roll * z),
            bend[1] + (y - yaw * x),
            bend[2] + (z - roll * x),
        )
        width, length, height = rng.normal((66, 82, 56), (2.2, 2.8, 1.8)).tolist()
        # Widest behind the middle, narrower towards the forehead, flat below.
        across = np.abs(x) / (width * (1 + 0.10 / length * y))
        up = np.maximum(z / height, z / (-0.72 * height))
        radius = (_power(across) + _power(np.abs(y / length)) + _power(up)) ** np.float32(1 / 2.5)
        cerebrum = (1 - radius) * (0.9 * width)
        temporal = _ellipsoid(np.abs(x) - 36, y + 10, z + 30, 20, 34, 19)
        cerebrum = np.maximum(cerebrum, temporal)
        cerebellum = np.maximum(
            _ellipsoid(np.abs(x) - 20, y - 48, z + 44, 30, 27, 20),
            _ellipsoid(x, y - 20, z + 48, 12, 12, 34),
        )
        depth = np.maximum(cerebrum, cerebellum)
        depth += smooth_noise(rng, _BOX_SHAPE, 9) * np.float32(0.9)
        self.voxels = np.flatnonzero(depth > 0)
        self.x, self.y, self.z, self.depth, self.cerebellum = (
            field.ravel()[self.voxels] for field in (x, y, z, depth, cerebellum)
        )

    def _place_lesion(self, rng: np.random.Generator) -> None:
        """Centre and radii of the tumour, and ``rho``: the distorted distance from its centre."""
        x, y, z = self.x, self.y, self.z
        core = rng.uniform(6.0, 14.0)
        self.core_radius = core
        self.rim_radius = core + rng.uniform(3.0, 6.0)
        self.oedema_radius = self.rim_radius + rng.uniform(9.0, 18.0)
        side = float(rng.choice((-1.0, 1.0)))
        inside = (self.depth > 17) & (self.depth < 34) & (side * x > 14) & (z > -8) & (z < 30)
        # Not in the deep middle (basal ganglia), where the ventricles would run through it.
        candidates = np.flatnonzero(inside & (np.abs(y) < 55))
        centre = candidates[rng.integers(len(candidates))]
        offsets = [axis - axis[centre] for axis in (x, y, z)]
        stretch = rng.uniform(0.82, 1.22, 3).tolist()
        self.offsets = offsets
        self.rho = np.sqrt(sum((offset * s) ** 2 for offset, s in zip(offsets, stretch)))
        self.rho += self._noise(rng, 9) * np.float32(1.8) + self._noise(rng, 4.5) * np.float32(0.8)
        self.spread = self._noise(rng, 11) * np.float32(4.5)  # how the oedema's border wanders

    def _push_aside(self) -> None:
        """Mass effect: the tumour pushes midline and ventricles away from its centre."""
        distance = np.sqrt(sum(offset**2 for offset in self.offsets)) + np.float32(1e-3)
        reach = 2.4 * self.rim_radius
        push = 0.45 * self.rim_radius * np.exp(-((distance / reach) ** 2)) / distance
        for axis, offset in zip((self.x, self.y, self.z), self.offsets):
            axis -= push * offset
        del self.offsets

    def _cortex(self, rng: np.random.Generator) -> None:
        """``self.ribbon``: distance from the nearest sulcus, fissure or surface.

        The zero sets of smooth noise are winding sheets; those near the surface are the sulci.
        """
        folds = self._noise(rng, 6.5)
        below = np.maximum(self.depth - 14, 0)
        sulci = np.abs(folds) * np.float32(7.5) + below
        x, y, z = self.x, self.y, self.z
        # The fissure between the hemispheres ends where the corpus callosum joins them.
        bridge = np.sqrt((y / 52) ** 2 + ((z - 2) / 34) ** 2)
        fissure = np.abs(x + folds * np.float32(0.5)) + np.maximum(1 - bridge, 0) * 40
        # The Sylvian fissure runs from the side of the brain inwards, rising to the back.
        sylvian = np.abs(z + 6 - 0.30 * y + folds) + np.maximum(33 + 5 * folds - np.abs(x), 0)
        sylvian += np.maximum(np.abs(y + 8) - 34 + 4 * folds, 0)
        self.ribbon = np.minimum(np.minimum(self.depth, sulci), np.minimum(fissure, sylvian))
        # The cerebellum's leaves are finer.
        leaves = np.abs(self._noise(rng, 3.2)) * np.float32(3.2) + 0.9
        leaves += np.maximum(self.cerebellum - 10, 0) * 0.7
        is_cerebellum = self.cerebellum > self.depth - 4
        self.ribbon[is_cerebellum] = np.minimum(leaves, self.depth + 0.5)[is_cerebellum]
        crossing = self._noise(rng, 8)
        self.vessel = np.exp(-((folds / 0.16) ** 2) - (crossing / 0.16) ** 2)
        sinus = np.exp(-((x / 1.8) ** 2) - ((self.depth - 2) / 2.5) ** 2) * (z > -20) * (y > -50)
        self.vessel = np.maximum(self.vessel, sinus)

    def _inner(self, rng: np.random.Generator) -> None:
        """Ventricles (``self.ventricle``) and deep grey matter (``self.deep``)."""
        x, y, z = self.x, self.y, self.z
        size = rng.uniform(0.75, 1.35)  # ventricles widen with age
        side = np.abs(x) - rng.normal(0, 0.08) * x  # the two are never alike
        front, back = np.minimum(y + 8, 0), np.maximum(y - 6, 0)
        centre_x = 7.5 * size**0.5 + 0.011 * front**2 + 0.017 * back**2
        centre_z = 11 - 0.006 * front**2 - 0.012 * back**2
        taper = np.sqrt(np.maximum(1 - ((y - 3) / 40) ** 2, 1e-4))
        section = np.sqrt(
            ((side - centre_x) / (4.8 * size * taper)) ** 2
            + ((z - centre_z) / (8.5 * size * taper)) ** 2
        )
        lateral = (1 - section) * (4.8 * size) * taper
        third = _ellipsoid(x, y - 2, z + 4, 1.9 * size, 13, 10)
        fourth = _ellipsoid(x, y - 32, z + 40, 5, 5, 9)
        self.ventricle = np.maximum(np.maximum(lateral, third), fourth)
        thalamus = _ellipsoid(side - 10, y - 8, z, 7.5, 13, 9)
        caudate = _ellipsoid(side - 13.5 - 0.011 * front**2, y + 14, z - 5, 4.5, 13, 9)
        putamen = _ellipsoid(side - 26 - 0.006 * y**2, y + 2, z, 5.5, 17, 10)
        self.deep = np.maximum(np.maximum(thalamus, caudate), putamen)

    def labels(self) -> np.ndarray:
        """int16 labels: the necrotic core lies in the enhancing rim, both in the oedema."""
        tumour = self.depth > 1.5
        white = (self.ribbon > 1.6) & (self.ventricle < 0)  # oedema follows the white matter
        labels = np.zeros(len(self.voxels), dtype=np.int16)
        labels[tumour & white & (self.rho + self.spread < self.oedema_radius)] = 2
        labels[tumour & (self.rho < self.rim_radius)] = 4
        labels[tumour & (self.rho < self.core_radius)] = 1
        return self._in_volume(labels)

    def image(
        self, rng: np.random.Generator, contrast: dict[str, float], vessels: bool
    ) -> np.ndarray:
        """int16 image of one modality, 0 outside the brain and at least 1 in it."""
        white = _soft(self.ribbon - 4.0, 1.2)
        level = contrast["grey"] + (contrast["white"] - contrast["grey"]) * white
        for inside, softness, tissue in (
            (self.deep, 1.5, "deep"),
            (0.9 - self.ribbon, 0.8, "csf"),
            (self.ventricle, 1.0, "csf"),
        ):
            level += (contrast[tissue] - level) * _soft(inside, softness)
        if vessels:
            level += (contrast["vessel"] - level) * self.vessel
        oedema = _soft(self.oedema_radius - self.rho - self.spread, 2.5)
        oedema *= _soft(self.ribbon - 1.6, 1.0) * _soft(-self.ventricle, 1.0)
        level += (contrast["oedema"] - level) * oedema
        for inside, tissue in ((self.rim_radius, "rim"), (self.core_radius, "core")):
            level += (contrast[tissue] - level) * _soft(inside - self.rho, 1.0)
        # Coil sensitivity, tissue texture, noise; then the scanner's arbitrary unit.
        level *= 1 + np.float32(0.05) * self._noise(rng, 48)
        level *= 1 + np.float32(0.035) * self.texture
        level += np.float32(0.015) * rng.standard_normal(len(level), dtype=np.float32)
        level *= _soft(self.depth - 0.6, 1.2)  # the surface voxels are partly empty
        unit = rng.uniform(350, 900)
        return self._in_volume(np.maximum(np.rint(level * np.float32(unit)), 1))

    def _in_volume(self, values: np.ndarray) -> np.ndarray:
        box = np.zeros(_BOX_SHAPE, dtype=np.int16)
        box.ravel()[self.voxels] = values
        volume = np.zeros(SHAPE, dtype=np.int16)
        volume[_BOX] = box
        return volume


def smooth_noise(rng: np.random.Generator, shape: Sequence[int], spacing: float) -> np.ndarray:
    """Smooth random field: float32, mean about 0, variance about 1.

    A cubic B-spline through random coefficients on a coarse grid. Sums of products in a fixed
    order rather than matrix products, whose rounding may depend on the number of threads.

    :param spacing: voxels between coefficients; structures are about twice as wide.
    """
    counts = [int((size - 1) / spacing) + 4 for size in shape]
    field = rng.standard_normal(counts, dtype=np.float32)
    for axis in reversed(range(len(shape))):  # the axis with the longest rows last
        position = np.arange(shape[axis]) / spacing
        left = position.astype(int)
        t = position - left
        weights = (
            (1 - t) ** 3 / 6,
            (3 * t**3 - 6 * t**2 + 4) / 6,
            (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
            t**3 / 6,
        )
        column = [-1 if other == axis else 1 for other in range(len(shape))]
        field = sum(
            np.take(field, left + k, axis=axis) * weight.astype(np.float32).reshape(column)
            for k, weight in enumerate(weights)
        )
    # The squared weights sum to 0.479 on average along each axis.
    return field / np.float32(0.479 ** (len(shape) / 2))


def _ellipsoid(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, a: float, b: float, c: float
) -> np.ndarray:
    """About the distance in mm from the surface of an ellipsoid, positive inside."""
    return (1 - np.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2)) * min(a, b, c)


def _power(t: np.ndarray) -> np.ndarray:
    """``t ** 2.5``, for which square and square root are much faster than a general power."""
    return t * t * np.sqrt(t)


def _soft(distance: np.ndarray, width: float) -> np.ndarray:
    """Share of a voxel inside a surface: 0 to 1 over ``2 * width`` mm around distance 0."""
    t = np.clip(distance / np.float32(2 * width) + np.float32(0.5), 0, 1)
    return t * t * (3 - 2 * t)


# ------------------------------------------------------------------------------------------- files


def _present_patients(out_dir: str, origin: dict[str, int], names: list[str]) -> set[str]:
    """Patients that an earlier start with the same seed has completed.

    :raises ValueError: the folder holds something else, or more patients than are asked for.
    """
    if not os.path.exists(out_dir):
        return set()
    if not os.path.isdir(out_dir):
        raise ValueError(f"--out_dir {out_dir} is a file: name a new folder.")
    entries = set(os.listdir(out_dir))
    if not entries:
        return set()
    path = os.path.join(out_dir, PHANTOM_FILE)
    if PHANTOM_FILE not in entries:
        raise ValueError(f"--out_dir {out_dir} is not empty: name a new folder.")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if text != json.dumps(origin):
        raise ValueError(
            f"--out_dir {out_dir} holds other phantoms ({text}, now {json.dumps(origin)}): name a"
            " new folder or give the same --seed."
        )
    unfinished = {entry for entry in entries if entry.endswith(".partial")}
    others = entries - unfinished - {PHANTOM_FILE} - set(names)
    if others:
        raise ValueError(
            f"--out_dir {out_dir} already holds {min(others)}, which --patients {len(names)} does"
            " not ask for: name a new folder."
        )
    return entries & set(names)


def _write_patient(task: tuple[str, int, int]) -> None:
    folder, seed, index = task
    partial = f"{folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    for modality, volume in phantom_patient(seed, index).items():
        image = nib.Nifti1Image(volume, AFFINE)
        image.header.set_xyzt_units("mm")
        image.set_sform(AFFINE, code=1)
        image.set_qform(AFFINE, code=1)
        path = os.path.join(partial, f"{os.path.basename(folder)}_{modality}.nii.gz")
        with open(path, "wb") as file:
            # No time stamp, so that the same patient is the same bytes.
            file.write(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
    os.replace(partial, folder)
