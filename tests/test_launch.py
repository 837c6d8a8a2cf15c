"""run_script.sh and kill_pid.sh on real processes."""

import json
import os
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
        self.env = {**os.environ, "PYTHON": sys.executable, "RUN_SCRIPT_WATCH": "1"}
        self.env.pop(MARK, None)

    def write(self, name, text):
        (self.path / name).write_text(text)

    def start(self, *args, **env):
        return self.popen("run_script.sh", *args, **env).finish()

    def kill(self, *args):
        return self.popen("kill_pid.sh", *args).finish()

    def popen(self, tool, *args, **env):
        process = subprocess.Popen(
            [self.tools / tool, *args],
            cwd=self.path,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
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


def wait_for(condition, what):
    end = time.monotonic() + 10
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
    """The folder, worked in as on a system without /proc."""
    folder.tools = tmp_path / "the tools"
    folder.tools.mkdir()
    for name in ("run_script.sh", "kill_pid.sh"):
        copy = folder.tools / name
        copy.write_text((ROOT / name).read_text().replace("/proc/", "/no-such-proc/"))
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
    assert second.returncode == 1
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
# its own, and one in the group without its environment.
FORKS = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def start(**kwargs):
    return subprocess.Popen([sys.executable, "-c", {SLEEPS!r}], **kwargs).pid
workers = [start(), start(preexec_fn=os.setpgrp), start(start_new_session=True), start(env={{}})]
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
        assert refused.returncode == 1
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
    assert sorted(r.returncode for r in results) == [0, 1, 1, 1, 1, 1], [r.stderr for r in results]
    pid = folder.pid
    for result in results:
        assert str(pid) in result.stdout + result.stderr
    assert (folder.path / "starts").read_text() == "x"
    assert is_alive(pid)


def test_an_early_failure_is_shown(folder):
    folder.write("fails.py", "import sys; print('unknown flag --bath_size'); sys.exit(7)")
    result = folder.start("fails.py")
    assert result.returncode == 7
    assert "ended at once" in result.stderr
    assert "unknown flag --bath_size" in result.stderr
    assert not folder.pid_file.exists()
    assert folder.output.read_text() == "unknown flag --bath_size\n"


def test_shell_scripts_and_executables(folder):
    folder.write("run.sh", 'echo "$1" > shell; exit 3')
    assert folder.start("run.sh", "a b").returncode == 3
    assert (folder.path / "shell").read_text() == "a b\n"
    folder.write("program", '#!/bin/sh\necho "$1" > program.out; exit 4\n')
    refused = folder.start("program", "c d")
    assert refused.returncode == 2
    assert "executable" in refused.stderr
    (folder.path / "program").chmod(0o755)
    assert folder.start("program", "c d").returncode == 4
    assert (folder.path / "program.out").read_text() == "c d\n"


def test_the_active_virtual_environment_runs_python_scripts(folder, tmp_path):
    venv = tmp_path / "my venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    folder.write("which.py", "import os, sys; print(sys.executable)")
    assert folder.start("which.py", PYTHON="", VIRTUAL_ENV=str(venv)).returncode == 0
    assert folder.output.read_text() == f"{venv}/bin/python\n"


def test_wrong_use_writes_nothing(folder):
    folder.write("sleeps.py", SLEEPS)
    before = sorted(folder.path.iterdir())
    for result in (
        folder.start(),
        folder.start("missing.py"),
        folder.start(str(folder.path)),
        folder.start("sleeps.py", PYTHON="/no/such/python"),
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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into every folder")
def test_a_folder_that_cannot_be_written_to(folder):
    folder.write("sleeps.py", SLEEPS)
    folder.path.chmod(0o555)
    try:
        result = folder.start("sleeps.py")
        assert result.returncode == 1
        assert "cannot be written" in result.stderr
        assert [p.name for p in folder.path.iterdir()] == ["sleeps.py"]
    finally:
        folder.path.chmod(0o755)
