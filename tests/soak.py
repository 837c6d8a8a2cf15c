"""Train under kills: whatever ends a run, continuing it ends with the files of an undisturbed one.

    python tests/soak.py --kills 300 --seed 1
    python tests/soak.py --kills 20 --processes 2

Each start is killed (SIGKILL) at a random moment, while it starts, while it trains or while it
writes a checkpoint, or asked to stop by SIGTERM, SIGINT or SIGHUP. Exit status 1: something was
lost or came out wrong.
"""

import argparse
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from improved_diffusion import checkpoint, training_script
from improved_diffusion.batches import EpochBatches

assert training_script  # loaded once, not in every fork

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "scripts" / "image_train.py")
SAVE_INTERVAL, LOG_INTERVAL = 8, 3
FLAGS = (
    "--channels T1CE,Seg --image_size 16 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1 "
    "--attention_resolutions 8 --num_heads 1 --diffusion_steps 20 --dropout 0.1 "
    "--schedule_sampler loss-second-moment --ema_rate 0.9,0.99 --batch_size 4 --lr 1e-3 "
    f"--warmup_steps 20 --grad_clip 1 --save_interval {SAVE_INTERVAL} "
    f"--log_interval {LOG_INTERVAL} --keep_checkpoints 4 --sample_interval 0 --eval_interval 0 "
    "--resume_checkpoint latest"
).split()
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class Report:
    """What came of it."""

    kills: int = 0
    while_saving: int = 0
    stops: int = 0
    most_lost_to_a_kill: int = 0
    lost_to_a_stop: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills survived, {self.while_saving} of them while a checkpoint was "
            f"being written, and {self.stops} stops; lost steps: at most "
            f"{self.most_lost_to_a_kill} at a kill (a checkpoint every {SAVE_INTERVAL}), "
            f"{self.lost_to_a_stop} at a stop; wrong: {len(self.wrong)}"
        )


def write_slices(folder: Path, count: int = 11) -> None:
    """Slices of noise, with which any change of order shows."""
    rng = np.random.default_rng(0)
    for channel in ("T1CE", "Seg"):
        (folder / channel).mkdir(parents=True)
        for i in range(count):
            levels = rng.integers(0, 256, (16, 16), dtype=np.uint8)
            Image.fromarray(levels).save(folder / channel / f"Subject_001_slice_{i}.png")


def order(epoch: int, count: int = 11) -> list[int]:
    """The slices' order in an epoch of the runs here."""
    return EpochBatches(count, 1, 0, 0, 0, 1, shuffle=True).items(
        epoch * count, (epoch + 1) * count
    )


class Training:
    """One start of the training script, in a fork of this process or under torchrun."""

    def __init__(self, slices: Path, run: Path, steps: int, processes: int, workers: int) -> None:
        self.run = run
        self.left_over = self._partial()
        # Rows past the checkpoint stand there until the training has started.
        self.done_before = max(newest_step(run), last_row(run))
        argv = [SCRIPT, "--data_dir", str(slices), "--out_dir", str(run), *FLAGS]
        argv += ["--max_steps", str(steps), "--num_workers", str(workers)]
        with open(run.with_suffix(".txt"), "ab") as output:
            if processes > 1:
                launcher = ["-m", "torch.distributed.run", "--standalone"]
                self.pid = subprocess.Popen(
                    [sys.executable, *launcher, f"--nproc_per_node={processes}", *argv],
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                ).pid
            else:
                self.pid = os.fork()
                if self.pid == 0:
                    self._become(argv, output.fileno())

    @staticmethod
    def _become(argv: list[str], output: int) -> None:
        status = 1
        try:
            os.setsid()
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = argv
            runpy.run_path(SCRIPT, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def is_running(self) -> bool:
        return not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def end(self, number: int | None = None) -> int:
        """Send a signal, if any, wait for the end, and leave no process behind; exit status."""
        if number is not None and self.is_running():
            os.kill(self.pid, number)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        for pid in children_of(self.run):
            os.kill(pid, signal.SIGKILL)
        while children_of(self.run):
            time.sleep(0.01)
        return status

    def _partial(self) -> set[tuple[str, int]]:
        found = set()
        for path in self.run.glob("*.partial"):
            with suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_ino))
        return found

    def saves(self) -> bool:
        """Whether a checkpoint is being written, beside what an earlier start has left."""
        return bool(self._partial() - self.left_over)


def children_of(run: Path) -> list[int]:
    """Processes that have the run's folder on their command line, by torchrun's doing."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        pid = int(path.parent.name)
        if os.fsencode(SCRIPT) in words and os.fsencode(run) in words and pid != os.getpid():
            found.append(pid)
    return found


def newest_step(run: Path) -> int:
    return max(checkpoint.complete_steps(str(run)), default=0)


def last_row(run: Path) -> int:
    """The step of the last complete row of the log."""
    path = run / "progress.csv"
    text = path.read_text() if path.exists() else ""
    header, *rows = text[: text.rfind("\n") + 1].splitlines() or [""]
    return int(rows[-1].split(",")[header.split(",").index("step")]) if rows else 0


def wait_for_a_moment(training: Training, rng: random.Random, moment: str, start: float) -> None:
    """Come back at a random moment of a kind, or when the training has ended."""
    target = training.done_before + 1 + rng.randrange(2 * SAVE_INTERVAL)
    pause = 0.0005 if moment == "saving" else 0.005
    until = time.monotonic() + (rng.uniform(0, start) if moment == "start" else 10)
    while training.is_running() and time.monotonic() < until:
        if moment == "saving" and training.saves():
            time.sleep(rng.choice([0, 0, 0.001, 0.003]))
            break
        if moment == "step" and last_row(training.run) >= target:
            time.sleep(rng.uniform(0, 0.1))
            break
        time.sleep(pause)


def disturb(folder: Path, *, kills: int, seed: int, steps: int, processes: int = 1) -> Report:
    """Train undisturbed and under so many kills, and compare the files."""
    rng = random.Random(seed)
    report = Report()
    write_slices(folder / "slices")

    def start(name: str) -> Training:
        workers = rng.randrange(2) if name == "disturbed" and processes == 1 else 0
        return Training(folder / "slices", folder / name, steps, processes, workers)

    status = start("undisturbed").end()
    assert status == 0, (folder / "undisturbed.txt").read_text()

    run = folder / "disturbed"
    while report.kills < kills and newest_step(run) < steps:
        training = start("disturbed")
        moment = rng.choice(["start", "saving", "saving", "saving", "step", "step"])
        wait_for_a_moment(training, rng, moment, start=0.5 if processes == 1 else 8)
        if not training.is_running():
            status = training.end()
            if status != 0:
                report.wrong.append(f"a start ended by itself with status {status}")
                break
            continue
        asked = moment == "step" and rng.random() < 0.4
        saving = training.saves()
        # Before its first step a run has nothing to save, and a signal just ends it.
        stepped = last_row(run) > training.done_before
        status = training.end(rng.choice(ASKING) if asked else signal.SIGKILL)
        _, damaged = checkpoint.find_resume_checkpoint("latest", str(run))
        report.wrong += damaged
        lost = max(0, last_row(run) - newest_step(run))
        if asked and stepped:
            report.stops += 1
            report.lost_to_a_stop += lost
            if status != (0 if processes == 1 else 1):  # torchrun's own
                report.wrong.append(f"a stopped run ended with status {status}")
        elif not asked:
            report.kills += 1
            report.while_saving += saving
            report.most_lost_to_a_kill = max(report.most_lost_to_a_kill, lost)
    while newest_step(run) < steps and not report.wrong:
        status = start("disturbed").end()
        if status != 0:
            report.wrong.append(f"the last start ended with status {status}")
    report.wrong += different_files(folder / "undisturbed", run, steps)
    return report


def different_files(one: Path, two: Path, step: int) -> list[str]:
    """Of the last checkpoint and the log, those that are not equal to the last byte."""
    rates = (0.9, 0.99)
    names = [checkpoint.ema_name(rate, step) for rate in rates]
    names += [checkpoint.opt_name(step), checkpoint.model_name(step), "progress.csv"]
    return [
        f"{name} differs"
        for name in names
        if not (two / name).exists() or (one / name).read_bytes() != (two / name).read_bytes()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="default: 12 a kill")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's would be the trainings', too
    with tempfile.TemporaryDirectory() as folder:
        report = disturb(
            Path(folder),
            kills=args.kills,
            seed=args.seed,
            steps=args.steps or 12 * args.kills,
            processes=args.processes,
        )
        print(report)
        for sentence in report.wrong:
            print(sentence)
        if report.wrong or report.most_lost_to_a_kill > SAVE_INTERVAL or report.lost_to_a_stop:
            print((Path(folder) / "disturbed.txt").read_text()[-3000:])
            sys.exit(1)


if __name__ == "__main__":
    main()
