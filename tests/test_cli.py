import pytest
import torch

from improved_diffusion import cli


def status_of(error, capfd):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    return end.value.code, capfd.readouterr().err


def test_a_users_error_is_one_line(capfd):
    assert status_of(ValueError("--lr 0: no"), capfd) == (2, "error: --lr 0: no\n")
    assert status_of(OSError("cannot write x"), capfd) == (2, "error: cannot write x\n")
    assert status_of(KeyboardInterrupt(), capfd) == (130, "interrupted\n")


def test_a_small_gpu_gets_advice(capfd):
    status, text = status_of(torch.OutOfMemoryError("CUDA out of memory"), capfd)
    assert status == 2
    assert "--microbatch" in text and text.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyError("bug"), AssertionError()])
def test_a_bug_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        cli.run(main)


def test_traceback_on_request(monkeypatch):
    def main():
        raise ValueError("x")

    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="x"):
        cli.run(main)


def test_progress_in_a_file_is_a_few_lines(capfd):
    assert list(cli.progress(range(100), total=100, desc="reading", unit="file")) == list(
        range(100)
    )
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "reading: 0/100 file"
    assert lines[1].startswith("reading: 100/100 file, 0 s")
    assert len(lines) == 2
