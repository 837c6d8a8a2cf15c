"""Make a folder of pictures from the binary version of CIFAR-10, for train_cifar10.py."""

from __future__ import annotations

import argparse
import gzip
import os
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from improved_diffusion import cli

ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
FOLDER = "cifar-10-batches-bin"
FILES = {
    "train": [f"{FOLDER}/data_batch_{number}.bin" for number in range(1, 6)],
    "test": [f"{FOLDER}/test_batch.bin"],
}
# By label, as in the archive's batches.meta.txt.
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SIZE = 32
RECORD = 1 + 3 * SIZE * SIZE  # the label; then the red, the green and the blue plane, row by row
MOST_RECORDS = 10_000  # in a file


def main() -> None:
    args = create_argparser().parse_args()
    target = Path(args.out_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"--out_dir {target} already holds something, and nothing is overwritten; choose "
            "another folder"
        )
    records = read_records(args.archive, args.split)
    write_pictures(records, target)
    print(f"wrote {len(records)} pictures to {target}")


def read_records(path: str, split: str) -> np.ndarray:
    """The records of a split, uint8 [N, 3073]. No file of the archive gets to the disk.

    :param split: ``train`` or ``test``.
    :raises ValueError: no such file, or not the binary version of CIFAR-10 in full.
    """
    if not os.path.isfile(path):
        raise ValueError(f"--archive {path}: there is no such file; download it from {ADDRESS}")
    wanted = FILES[split]
    found: dict[str, np.ndarray] = {}
    try:
        with gzip.open(path) as stream:
            # One pass from the beginning to the end, where gzip compares its checksum.
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    if member.name in wanted and member.isreg():
                        found[member.name] = read_file(path, archive, member)
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"--archive {path} is damaged or no .tar.gz file ({error}); download it again from "
            f"{ADDRESS}"
        ) from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"--archive {path} holds no file {', '.join(missing)}, so it is not the binary version "
            f"of CIFAR-10; download that from {ADDRESS}"
        )
    return np.concatenate([found[name] for name in wanted])


def read_file(path: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> np.ndarray:
    """The records of one file of the archive ``path``, uint8 [N, 3073].

    :raises ValueError: they are no CIFAR-10 records.
    """
    count, rest = divmod(member.size, RECORD)
    if rest or not 1 <= count <= MOST_RECORDS:
        raise ValueError(
            f"--archive {path}: {member.name} has {member.size} bytes instead of 1 to "
            f"{MOST_RECORDS} records of {RECORD}; download the archive again from {ADDRESS}"
        )
    file = archive.extractfile(member)
    assert file is not None  # it is a regular file
    records = np.frombuffer(file.read(), dtype=np.uint8).reshape(count, RECORD)
    wrong = np.flatnonzero(records[:, 0] >= len(CLASSES))
    if len(wrong):
        raise ValueError(
            f"--archive {path}: record {wrong[0]} of {member.name} has the label "
            f"{records[wrong[0], 0]} instead of 0 to {len(CLASSES) - 1}; download the archive "
            f"again from {ADDRESS}"
        )
    return records


def write_pictures(records: np.ndarray, target: Path) -> None:
    """Write ``<class>_<number>.png`` for every record, uint8 [N, 3073].

    The folder has its name when it is complete; until then it grows as ``<target>.partial``,
    which a new start begins again.
    """
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    planes = records[:, 1:].reshape(-1, 3, SIZE, SIZE)  # [N, C, H, W]
    pictures = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))  # [N, H, W, C]
    labels = records[:, 0]
    numbers = cli.progress(range(len(records)), total=len(records), desc="writing", unit="picture")
    for number in numbers:
        name = f"{CLASSES[labels[number]]}_{number:05d}.png"
        Image.fromarray(pictures[number]).save(partial / name)
    if target.exists():
        target.rmdir()
    partial.rename(target)


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archive", required=True, help=f"cifar-10-binary.tar.gz from {ADDRESS}")
    parser.add_argument("--out_dir", required=True, help="folder of pictures to make")
    parser.add_argument(
        "--split",
        choices=sorted(FILES),
        default="train",
        help="50,000 pictures to train on, or 10,000 to test (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
