"""run_script.sh and kill_pid.sh on real processes."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MARK = "IMPROVED_DIFFUSION_RUN"

# Tells the test what it is, saves on SIGTERM, and then ends.
SAVES = """
import json, os, signal, sys, time
def save(*_):
    open("saved", "w").write("checkpoint")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("hello from", os.getpid())
print("to stderr", file=sys.stderr)
facts = {"pid": os.getpid(), "pgid": os.getpgid(0), "sid": os.getsid(0), "args": sys.argv[1:],
         "stdin": sys.stdin.read(), "python": sys.executable}
open("facts.tmp", "w").write(json.dumps(facts))
os.rename("facts.tmp", "facts.json")
time.sleep(60)
"""
SLEEPS = "import time; time.sleep(60)"


class Folder:
    """A caller's folder and the two scripts that work in it."""

    def __init__(self, path, tools):
        self.path, self.tools = path, tools
        self.pid_file = path / "PID_current.txt"
        self.output = path / "output.txt"
        self.env = {**os.environ, "PYTHON": sys.executable, "RUN_SCRIPT_WATCH": "0"}
        self.env.pop(MARK, None)

    def write(self, name, text):
        (self.path / name).write_text(text)

    def start(self, *args, **env):
        return self.popen("run_script.sh", *args, **env).finish()

    def kill(self, *args):
        return self.popen("kill_pid.sh", *args).finish()

    def popen(self, tool, *args, preexec_fn=None, **env):
        process = subprocess.Popen(
            [self.tools / tool, *args],
            cwd=self.path,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=preexec_fn,
        )
        process.finish = lambda: finish(process)
        return process

    @property
    def pid(self):
        return int(self.pid_file.read_text())

    def kept_outputs(self):
        return sorted(p.read_text() for p in self.path.glob("output_*.txt"))


def finish(process):
    out, err = process.communicate(timeout=30)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def is_alive(pid):
    """Whether the process runs; one that ended but was not waited for yet does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip()[:1] not in ("", "Z")


def wait_for(condition, what, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.05)


def read_when_there(path):
    wait_for(path.exists, f"{path.name} was written")
    return path.read_text()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "a folder with 'quotes' and spaces"
    path.mkdir()
    folder = Folder(path, ROOT)
    yield folder
    if folder.pid_file.exists():
        folder.kill("0")


@pytest.fixture
def other_program():
    """A living session leader that no run_script.sh started."""
    process = subprocess.Popen([sys.executable, "-c", SLEEPS], start_new_session=True)
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def without_proc(folder, tmp_path):
    """The folder, worked in as on macOS, which has neither /proc nor setsid and flock."""
    folder.tools = tmp_path / "the tools"
    folder.tools.mkdir()
    for name in ("run_script.sh", "kill_pid.sh"):
        copy = folder.tools / name
        text = (ROOT / name).read_text().replace("/proc/", "/no-such-proc/")
        text = text.replace("command -v setsid", "false").replace("command -v flock", "false")
        copy.write_text(text)
        copy.chmod(0o755)
    return folder


def check_a_whole_run(folder, script):
    """Start, look, be refused a second start, stop, start again."""
    arguments = ["two words", "it's", 'say "hi"', "", "*", "$HOME", "--flag", "a\nb"]
    started = folder.start(script, *arguments)
    assert started.returncode == 0, started.stderr
    facts = json.loads(read_when_there(folder.path / "facts.json"))
    assert folder.pid_file.read_bytes() == f"{facts['pid']}\n".encode()
    assert facts["pgid"] == facts["sid"] == facts["pid"]
    assert facts["args"] == arguments
    assert facts["stdin"] == ""
    assert os.path.samefile(facts["python"], sys.executable)
    assert str(facts["pid"]) in started.stdout
    output = folder.output.read_text()
    assert f"hello from {facts['pid']}\n" in output
    assert "to stderr\n" in output

    second = folder.start(script)
    assert second.returncode == 2
    assert str(facts["pid"]) in second.stderr
    assert "kill_pid.sh" in second.stderr
    assert second.stderr.count("\n") == 1
    assert folder.pid == facts["pid"]
    assert is_alive(facts["pid"])
    assert folder.output.read_text() == output
    assert folder.kept_outputs() == []

    stopped = folder.kill()
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count("\n") == 1
    assert (folder.path / "saved").read_text() == "checkpoint"
    assert not is_alive(facts["pid"])
    assert not folder.pid_file.exists()

    assert folder.start(script).returncode == 0
    assert folder.kept_outputs() == [output]
    assert folder.kill("5").returncode == 0
    assert sorted(p.name for p in folder.path.iterdir() if p.name.startswith(".")) == []


def test_a_run_from_start_to_stop(folder):
    folder.write("saves on stop.py", SAVES)
    check_a_whole_run(folder, "saves on stop.py")


def test_a_run_without_proc_and_a_script_in_another_folder(without_proc, tmp_path):
    script = tmp_path / "else where" / "-saves.py"
    script.parent.mkdir()
    script.write_text(SAVES)
    check_a_whole_run(without_proc, "../else where/-saves.py")


def test_a_run_that_ignores_sigterm_is_killed_after_the_limit(folder):
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('ready', 'w')"
    folder.write("deaf.py", f"{ignore}; {SLEEPS}")
    assert folder.start("deaf.py").returncode == 0
    read_when_there(folder.path / "ready")
    pid = folder.pid
    began = time.monotonic()
    killed = folder.kill("1")
    assert killed.returncode == 0, killed.stderr
    assert "killed" in killed.stdout
    assert 0.9 < time.monotonic() - began < 8
    assert not is_alive(pid)
    assert not folder.pid_file.exists()


# Forks workers that ignore SIGTERM: one in the run's group, one in a group and one in a session of
# its own, one in the group without its environment and one in a session without it.
FORKS = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def start(**kwargs):
    return subprocess.Popen([sys.executable, "-c", {SLEEPS!r}], **kwargs).pid
workers = [start(), start(preexec_fn=os.setpgrp), start(start_new_session=True), start(env={{}}),
           start(start_new_session=True, env={{}})]
open("workers.tmp", "w").write(" ".join(map(str, workers)))
os.rename("workers.tmp", "workers")
if sys.argv[1] == "hears":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("system", "leader", "leader_is_killed_first"),
    [("folder", "hears", False), ("folder", "hears", True), ("without_proc", "is deaf", False)],
)
def test_no_forked_worker_is_left(request, system, leader, leader_is_killed_first):
    folder = request.getfixturevalue(system)
    folder.write("forks.py", FORKS)
    assert folder.start("forks.py", leader).returncode == 0
    pid = folder.pid
    workers = [int(w) for w in read_when_there(folder.path / "workers").split()]
    assert all(map(is_alive, workers))
    if leader_is_killed_first:
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not is_alive(pid), "the leader's death")
        refused = folder.start("forks.py", leader)
        assert refused.returncode == 2
        assert "still alive" in refused.stderr
    assert folder.kill("1").returncode == 0
    assert not any(map(is_alive, [pid, *workers]))
    assert not folder.pid_file.exists()


def test_a_run_that_has_ended_is_stale(folder, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folder.pid_file.write_text(f"{ended.pid}\n")
    stale = folder.kill()
    assert stale.returncode == 0
    assert "had already ended" in stale.stdout
    assert not folder.pid_file.exists()

    folder.pid_file.write_text(f"{ended.pid}\n")
    folder.write("sleeps.py", SLEEPS)
    started = folder.start("sleeps.py")
    assert started.returncode == 0, started.stderr
    assert "stale" in started.stdout
    assert folder.pid != ended.pid


@pytest.mark.parametrize("system", ["folder", "without_proc"])
def test_another_program_with_the_recorded_number_is_left_alone(request, other_program, system):
    folder = request.getfixturevalue(system)
    folder.pid_file.write_text(f"{other_program.pid}\n")
    # The run ended before the system gave its number away.
    os.utime(folder.pid_file, (time.time() - 600,) * 2)
    result = folder.kill("0")
    assert result.returncode == 0, result.stderr
    assert "left alone" in result.stdout
    assert not folder.pid_file.exists()
    assert other_program.poll() is None


def test_a_run_of_another_folder_is_left_alone(folder, tmp_path):
    other = Folder(tmp_path, ROOT)
    other.write("sleeps.py", SLEEPS)
    assert other.start("sleeps.py").returncode == 0
    folder.pid_file.write_text(f"{other.pid}\n")
    assert "left alone" in folder.kill("0").stdout
    assert is_alive(other.pid)
    assert other.kill("5").returncode == 0


def test_of_many_starts_at_once_one_wins(folder):
    folder.write("sleeps.py", f"open('starts', 'a').write('x'); {SLEEPS}")
    folder.pid_file.write_text("999999999\n")  # stale, which all of them see
    starts = [folder.popen("run_script.sh", "sleeps.py") for _ in range(6)]
    results = [start.finish() for start in starts]
    assert sorted(r.returncode for r in results) == [0, 2, 2, 2, 2, 2], [r.stderr for r in results]
    pid = folder.pid
    for result in results:
        assert str(pid) in result.stdout + result.stderr
    assert (folder.path / "starts").read_text() == "x"
    assert is_alive(pid)


def appended_pids(path):
    return [int(line) for line in path.read_text().split()] if path.exists() else []


APPENDS_PID = "echo $$ >>pids; exec sleep 60"


def test_starts_and_kills_at_once_leave_nothing(folder):
    folder.write("sleeps.sh", APPENDS_PID)
    start, kill, pids = ("run_script.sh", "sleeps.sh"), ("kill_pid.sh",), folder.path / "pids"
    delay = random.Random(0)
    for _ in range(4):
        tools = []
        for tool in (start, kill, kill, start, kill):
            tools.append(folder.popen(*tool))
            time.sleep(delay.uniform(0, 0.1))
        for tool in tools:
            assert tool.finish().returncode in (0, 2, 128 + signal.SIGTERM)
        # Whatever the order was, one process at most is left, and it is recorded.
        recorded = [folder.pid] if folder.pid_file.exists() else []
        for pid in recorded:
            wait_for(lambda pid=pid: pid in appended_pids(pids), "the script's start")
        assert [pid for pid in appended_pids(pids) if is_alive(pid)] == recorded
        if recorded:
            assert folder.kill().returncode == 0
            assert not is_alive(recorded[0])


def test_a_start_that_is_killed_does_not_block_the_next(folder):
    folder.write("sleeps.sh", APPENDS_PID)
    delay = random.Random(1)
    for _ in range(6):
        killed = folder.popen("run_script.sh", "sleeps.sh")
        time.sleep(delay.uniform(0, 0.15))
        killed.kill()
        killed.wait()
        began = time.monotonic()
        result = folder.start("sleeps.sh")
        assert result.returncode == 0 or "still alive" in result.stderr
        assert time.monotonic() - began < 20  # a start waits 30 s for one that is under way
        pid = folder.pid
        wait_for(lambda pid=pid: pid in appended_pids(folder.path / "pids"), "the script's start")
        alive = [other for other in appended_pids(folder.path / "pids") if is_alive(other)]
        assert alive == [pid]
        assert folder.kill().returncode == 0
        assert not is_alive(pid)


def test_a_renamed_folder_keeps_its_run_and_a_new_one_of_its_name_has_none(folder):
    folder.write("sleeps.py", SLEEPS)
    assert folder.start("sleeps.py").returncode == 0
    pid, old = folder.pid, folder.path
    folder.path = old.rename(old.with_name("renamed"))
    folder.pid_file = folder.path / "PID_current.txt"

    new = Folder(old, ROOT)
    old.mkdir()
    new.write("sleeps.py", SLEEPS)
    assert new.start("sleeps.py").returncode == 0
    assert new.pid != pid
    assert new.kill("5").returncode == 0
    assert is_alive(pid)

    assert folder.start("sleeps.py").returncode == 2
    stopped = folder.kill("5")
    assert "ended" in stopped.stdout
    assert not is_alive(pid)


def test_a_folder_whose_name_begins_with_another_and_a_line_break(folder, tmp_path):
    folder.write("sleeps.py", SLEEPS)
    assert folder.start("sleeps.py").returncode == 0
    longer = Folder(folder.path.with_name(f"{folder.path.name}\nx"), ROOT)
    longer.path.mkdir()
    longer.write("sleeps.py", SLEEPS)
    assert longer.start("sleeps.py").returncode == 0
    pid = longer.pid
    assert longer.kill("5").returncode == 0
    assert not is_alive(pid)
    assert is_alive(folder.pid)


def test_a_process_name_cut_in_the_middle_of_a_character(folder):
    program = folder.path / "-ääääääääää"  # the system keeps 15 bytes
    program.write_text("#!/bin/bash\nunset BASH_ENV\nwhile :; do sleep 0.1; done\n")
    program.chmod(0o755)
    assert folder.start("./-ääääääääää", LC_ALL="C.UTF-8", RUN_SCRIPT_WATCH="1").returncode == 0
    pid = folder.pid
    assert folder.kill("5").returncode == 0
    assert not is_alive(pid)


def test_a_suspended_run_is_woken_to_save(folder):
    folder.write("saves.py", SAVES)
    assert folder.start("saves.py").returncode == 0
    read_when_there(folder.path / "facts.json")
    os.kill(folder.pid, signal.SIGSTOP)
    assert folder.kill("20").returncode == 0
    assert (folder.path / "saved").read_text() == "checkpoint"


# Notes each SIGTERM, and saves for a while after the first one.
SAVES_SLOWLY = """
import os, signal, sys, time
rank = os.environ.get("RANK") or sys.argv[1]
def save(*_):
    first = not os.path.exists("terms" + rank)
    open("terms" + rank, "a").write("x")
    if first:
        time.sleep(1.5)
        open("saved" + rank, "w").write("checkpoint")
        os._exit(0)
signal.signal(signal.SIGTERM, save)
open("ready" + rank, "w").write(str(os.getpid()))
time.sleep(60)
"""
# Starts two workers in sessions of their own and kills them when it is asked to end, as Open MPI's
# mpiexec does.
LAUNCHES = """
import signal, subprocess, sys
def kill(*_):
    [worker.kill() for worker in workers]
    sys.exit(1)
workers = [subprocess.Popen([sys.argv[1], "saves.py", rank], start_new_session=True)
           for rank in "01"]
signal.signal(signal.SIGTERM, kill)
[worker.wait() for worker in workers]
"""
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2 saves.py"


@pytest.mark.parametrize(
    ("system", "launcher", "is_killed_first"),
    [
        ("folder", "mpiexec", False),
        ("folder", "mpiexec", True),
        ("without_proc", "mpiexec", False),
        ("folder", "torchrun", False),
    ],
)
def test_workers_of_a_launcher_save(request, tmp_path, system, launcher, is_killed_first):
    folder = request.getfixturevalue(system)
    folder.write("saves.py", SAVES_SLOWLY)
    folder.write("launches.py", LAUNCHES)
    mpiexec = tmp_path / "mpiexec"
    mpiexec.symlink_to(sys.executable)
    command = f'"{mpiexec}" launches.py "{sys.executable}"'
    if launcher == "torchrun":
        command = f'OMP_NUM_THREADS=1 exec "{sys.executable}" {TORCHRUN}'
    folder.write("run.sh", command)
    assert folder.start("run.sh").returncode == 0
    wait_for(lambda: (folder.path / "ready0").exists(), "the first worker's start", 60)
    wait_for(lambda: (folder.path / "ready1").exists(), "the second worker's start", 60)
    workers = [int((folder.path / f"ready{rank}").read_text()) for rank in "01"]
    if is_killed_first:
        os.killpg(folder.pid, signal.SIGKILL)
    stopped = folder.kill("25")
    assert stopped.returncode == 0
    assert "killed" not in stopped.stdout
    assert not any(map(is_alive, workers))
    for rank in "01":
        assert (folder.path / f"saved{rank}").read_text() == "checkpoint"
        assert (folder.path / f"terms{rank}").read_text() == "x"


def test_a_run_cannot_stop_itself(folder):
    folder.write("stops.sh", f"'{ROOT}/kill_pid.sh' 2>refusal; echo $? >status; exec sleep 60")
    assert folder.start("stops.sh").returncode == 0
    wait_for(lambda: (folder.path / "status").exists(), "the script's call")
    assert (folder.path / "status").read_text() == "2\n"
    assert "cannot stop itself" in (folder.path / "refusal").read_text()
    pid = folder.pid
    assert folder.kill("5").returncode == 0
    assert not is_alive(pid)


WATCHED = {"RUN_SCRIPT_WATCH": "25"}


def test_an_early_failure_is_shown(folder):
    folder.write("fails.py", "import sys; print('unknown flag --bath_size'); sys.exit(7)")
    result = folder.start("fails.py", **WATCHED)
    assert result.returncode == 7
    assert "ended at once" in result.stderr
    assert "unknown flag --bath_size" in result.stderr
    assert not folder.pid_file.exists()
    assert folder.output.read_text() == "unknown flag --bath_size\n"


def test_shell_scripts_and_executables(folder):
    folder.write("run.sh", 'echo "$1" > shell; exit 3')
    assert folder.start("run.sh", "a b", **WATCHED).returncode == 3
    assert (folder.path / "shell").read_text() == "a b\n"
    folder.write("program", '#!/bin/sh\necho "$1" > program.out; exit 4\n')
    refused = folder.start("program", "c d")
    assert refused.returncode == 2
    assert "executable" in refused.stderr
    (folder.path / "program").chmod(0o755)
    assert folder.start("program", "c d", **WATCHED).returncode == 4
    assert (folder.path / "program.out").read_text() == "c d\n"


def test_the_active_virtual_environment_runs_python_scripts(folder, tmp_path):
    venv = tmp_path / "my venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    folder.write("which.py", "import os, sys; print(sys.executable)")
    assert folder.start("which.py", PYTHON="", VIRTUAL_ENV=str(venv), **WATCHED).returncode == 0
    assert folder.output.read_text() == f"{venv}/bin/python\n"


def test_wrong_use_writes_nothing(folder):
    folder.write("sleeps.py", SLEEPS)
    before = sorted(folder.path.iterdir())
    for result in (
        folder.start(),
        folder.start("missing.py"),
        folder.start(str(folder.path)),
        folder.start("sleeps.py", PYTHON="/no/such/python"),
        folder.start("sleeps.py", RUN_SCRIPT_WATCH="a while"),
        folder.kill(),
        folder.kill("soon"),
        folder.kill("-5"),
        folder.kill(""),
        folder.kill("5", "6"),
    ):
        assert result.returncode == 2, result
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
    assert sorted(folder.path.iterdir()) == before


@pytest.mark.parametrize("content", ["", "-1\n", "0\n", "1\n", "12 34\n", "PID\n"])
def test_a_pid_file_without_a_pid_stops_nothing(folder, content):
    folder.pid_file.write_text(content)
    result = folder.kill("0")
    assert result.returncode == 2
    assert "no process ID" in result.stderr
    folder.pid_file.unlink()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(os.devnull)])
def test_a_pid_file_that_is_no_file_stops_and_starts_nothing(folder, make):
    folder.write("sleeps.py", SLEEPS)
    make(folder.pid_file)
    for result in (folder.kill("0"), folder.start("sleeps.py")):
        assert result.returncode == 2
        assert "no process ID" in result.stderr
    assert not folder.output.exists()
    folder.pid_file.rmdir() if folder.pid_file.is_dir() else folder.pid_file.unlink()


def test_a_full_disk_starts_nothing(folder):
    folder.write("sleeps.py", SLEEPS)
    full = folder.popen(
        "run_script.sh",
        "sleeps.py",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    ).finish()
    assert full.returncode == 2
    assert "PID_current.txt cannot be written" in full.stderr
    assert [p.name for p in folder.path.iterdir()] == ["sleeps.py"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that even root cannot fill")
def test_a_folder_that_not_even_root_can_write_to(folder):
    folder.write("sleeps.py", SLEEPS)
    script, folder.path = folder.path / "sleeps.py", Path("/proc")
    result = folder.start(str(script))
    assert result.returncode == 2
    assert "written" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into every folder")
def test_a_folder_that_cannot_be_written_to(folder):
    folder.write("sleeps.py", SLEEPS)
    folder.path.chmod(0o555)
    try:
        result = folder.start("sleeps.py")
        assert result.returncode == 2
        assert "cannot be written" in result.stderr
        assert [p.name for p in folder.path.iterdir()] == ["sleeps.py"]
    finally:
        folder.path.chmod(0o755)
