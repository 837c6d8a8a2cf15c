import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch

from improved_diffusion import logger


@pytest.fixture(autouse=True)
def fresh_logger(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    monkeypatch.delenv("OPENAI_LOG_FORMAT", raising=False)
    logger.reset()
    yield
    logger.reset()


def write_rows(folder, *rows, formats=("csv",)):
    logger.configure(str(folder), list(formats))
    for row in rows:
        logger.logkvs(row)
        logger.dumpkvs()


def test_the_reference_names_are_there():
    names = """configure reset log debug info warn error logkv logkv_mean logkvs dumpkvs getkvs
        get_dir set_level set_comm get_current scoped_configure profile_kv profile record_tabular
        dump_tabular Logger KVWriter SeqWriter HumanOutputFormat JSONOutputFormat CSVOutputFormat
        TensorBoardOutputFormat make_output_format"""
    assert all(hasattr(logger, name) for name in names.split())
    levels = logger.DEBUG, logger.INFO, logger.WARN, logger.ERROR, logger.DISABLED
    assert levels == (10, 20, 30, 40, 50)


def test_importing_the_logger_does_not_load_torch():
    code = "import sys, improved_diffusion.logger; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


# ------------------------------------------------------------------------------------ the folder


def test_without_a_folder_a_run_gets_a_new_one_under_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "mkdtemp", None)
    monkeypatch.setattr(tempfile, "gettempdir", None)
    logger.configure()
    first = logger.get_dir()
    assert re.fullmatch(r"runs/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", first)
    assert (tmp_path / first).is_dir()
    assert capsys.readouterr().out == f"Logging to {first}\n"
    assert (tmp_path / first / "log.txt").read_text() == f"Logging to {first}\n"
    logger.configure()
    assert logger.get_dir() != first, "two runs that start in one second share no folder"


def test_the_environment_names_folder_and_formats(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "a"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "json, log")
    logger.configure()
    logger.logkv("loss", 1)
    logger.dumpkvs()
    assert sorted(os.listdir(tmp_path / "a")) == ["log.txt", "progress.json"]
    logger.configure(str(tmp_path / "b"), ["csv"], log_suffix="-x")
    logger.logkv("loss", 1)
    logger.dumpkvs()
    assert os.listdir(tmp_path / "b") == ["progress-x.csv"]


def test_a_line_before_configure_makes_no_folder(tmp_path, capsys):
    logger.log("hello", 3)
    assert capsys.readouterr().out == "hello 3\n"
    assert os.listdir(tmp_path) == []
    assert logger.get_dir().startswith("runs/")


def test_scoped_configure_comes_back(tmp_path):
    logger.configure("outer", ["csv"])
    logger.logkv("loss", 1)
    with logger.scoped_configure("inner", ["csv"]):
        assert logger.get_dir() == "inner"
        assert logger.getkvs() == {}
    assert logger.get_dir() == "outer"
    assert logger.dumpkvs() == {"loss": 1}


def test_bad_folder_format_and_communicator_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"log folder .*file.* cannot be made"):
        logger.configure(str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"unknown log format 'xml': choose from stdout, log, csv"):
        logger.configure("a", ["xml"])
    with pytest.raises(ValueError, match="one process"):
        logger.configure("a", ["csv"], comm=object())


# ---------------------------------------------------------------------------------------- values


def test_values_are_collected_and_averaged(tmp_path):
    logger.configure("run", ["csv"])
    logger.logkv("step", 3)
    logger.logkv("step", 4)
    for value in (1.0, torch.tensor(2.0), np.float32(6.0)):
        logger.logkv_mean("loss", value)
    assert logger.getkvs() == {"step": 4, "loss": 3.0}
    assert logger.dumpkvs() == {"step": 4, "loss": 3.0}
    assert logger.getkvs() == {}
    logger.logkv_mean("loss", 10)
    assert logger.dumpkvs() == {"loss": 10.0}, "a mean starts anew with each row"
    assert (tmp_path / "run/progress.csv").read_text() == "loss,step\n3.0,4\n10.0,\n"


def test_tensors_become_numbers_and_others_are_refused():
    logger.configure("run", ["csv"])
    logger.logkvs({"a": torch.tensor(3), "b": np.array(0.5), "c": torch.ones(1), "d": np.int64(7)})
    assert logger.getkvs() == {"a": 3, "b": 0.5, "c": 1.0, "d": 7}
    assert [type(value) for value in logger.getkvs().values()] == [int, float, float, int]
    with pytest.raises(ValueError, match="'x' is logged as a Tensor"):
        logger.logkv("x", torch.ones(2))
    with pytest.raises(ValueError, match="must be a number"):
        logger.logkv_mean("x", "text")


def test_profile_kv_adds_seconds():
    logger.configure("run", ["csv"])

    @logger.profile("load")
    def load():
        return 5

    assert load() == 5
    before = logger.getkvs()["wait_load"]
    with logger.profile_kv("load"):
        pass
    assert 0 <= before <= logger.getkvs()["wait_load"] < 5


# ------------------------------------------------------------------------------- lines and tables


def test_lines_have_levels_and_are_appended(tmp_path, capsys):
    for word in ("one", "two"):
        logger.configure("run", ["stdout", "log"])
        logger.debug("hidden")
        logger.info(word, 1)
    logger.set_level(logger.WARN)
    logger.info("hidden")
    logger.warn("shown")
    logger.error("shown too")
    logger.set_level(logger.DISABLED)
    logger.error("hidden")
    expected = "Logging to run\none 1\nLogging to run\ntwo 1\nshown\nshown too\n"
    assert (tmp_path / "run/log.txt").read_text() == expected
    assert capsys.readouterr().out == expected


def test_the_table_is_aligned_and_short(capsys):
    long_key = "a_name_that_is_much_too_long_for_a_terminal_q"
    row = {"step": 123456, "loss": 0.00123456789, long_key + "0": 1.0, long_key + "1": 2.0}
    write_rows("run", row, formats=["stdout"])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "-" * 47,
        "a_name_that_is_m...or_a_terminal_q0 | 1",
        "a_name_that_is_m...or_a_terminal_q1 | 2",
        "loss                                | 0.0012346",
        "step                                | 123456",
        "-" * 47,
    ]


# ------------------------------------------------------------------------------------------ csv


def test_csv_floats_round_trip_and_missing_keys_are_empty(tmp_path):
    values = [1 / 3, 5.134305617750876e-05, 1e300, -0.0]
    write_rows("run", *({"loss": v, "step": i} for i, v in enumerate(values)), {"step": 9})
    rows = logger.read_progress("run/progress.csv")
    assert [row.get("loss") for row in rows] == [*values, None]
    assert rows[-1] == {"step": 9.0}


def test_csv_is_continued_byte_for_byte(tmp_path):
    rows = [{"step": i, "loss": 1 / (i + 3), "grad_norm": i * 0.1} for i in range(5)]
    write_rows("whole", *rows)
    write_rows("parts", *rows[:2])
    write_rows("parts", *rows[2:])
    whole = (tmp_path / "whole/progress.csv").read_bytes()
    assert (tmp_path / "parts/progress.csv").read_bytes() == whole
    assert whole.startswith(b"grad_norm,loss,step\n0.0,0.3333333333333333,0\n")


def test_a_new_key_extends_the_header(tmp_path):
    path = tmp_path / "run/progress.csv"
    write_rows("run", {"b": 1, "step": 1}, {"a": 0.5, "c": 2, "step": 2}, {"step": 3})
    assert path.read_text() == "b,step,a,c\n1,1,,\n,2,0.5,2\n,3,,\n"
    write_rows("run", {"d": 4, "step": 4})
    assert path.read_text() == "b,step,a,c,d\n1,1,,,\n,2,0.5,2,\n,3,,,\n,4,,,4\n"
    assert os.listdir(tmp_path / "run") == ["progress.csv"], "no temporary file is left"


def test_a_rewrite_that_fails_is_tried_again(tmp_path, monkeypatch, capsys):
    """Rows meanwhile go without the new column; the failure is told once and ends nothing."""
    write_rows("run", {"b": 1, "step": 1})
    path = tmp_path / "run/progress.csv"

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        for step in (2, 3):
            logger.logkvs({"a": 1, "b": 2, "step": step})
            logger.dumpkvs()
    assert path.read_text() == "b,step\n1,1\n2,2\n2,3\n"
    assert os.listdir(tmp_path / "run") == ["progress.csv"]
    logger.logkvs({"a": 1, "step": 4})
    logger.dumpkvs()
    assert path.read_text() == "b,step,a\n1,1,\n2,2,\n2,3,\n,4,1\n"


class DiskThatFills:
    """Stands for blobfile's files: takes some bytes of the next writes, then is full."""

    def __init__(self, monkeypatch):
        self.room = None
        original = logger.bf.BlobFile

        def opened(path, mode):
            file = original(path, mode)
            write = file.write

            def limited(data):
                if self.room is None:
                    return write(data)
                write(data[: self.room])
                self.room = 0
                raise OSError(28, "No space left on device")

            file.write = limited
            return file

        monkeypatch.setattr(logger.bf, "BlobFile", opened)


@pytest.mark.parametrize("room", [0, 3, 11])
def test_rows_wait_for_room_on_the_disk(tmp_path, monkeypatch, capsys, room):
    """A part that was written is written again, not twice."""
    logger.configure(str(tmp_path), ["csv", "json", "log"])
    disk = DiskThatFills(monkeypatch)
    for step in range(1, 6):
        disk.room = {2: room, 3: 0}.get(step)
        logger.logkvs({"loss": step / 4, "step": step})
        logger.log(f"line {step}")
        logger.dumpkvs()
    assert (tmp_path / "progress.csv").read_text() == (
        "loss,step\n0.25,1\n0.5,2\n0.75,3\n1.0,4\n1.25,5\n"
    )
    lines = (tmp_path / "progress.json").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    text = (tmp_path / "log.txt").read_text()
    assert [text.count(f"line {step}\n") for step in range(1, 6)] == [1] * 5
    told = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert len(told) == 3 and "No space left" in told[0]  # one for each file


@pytest.mark.parametrize("rest", ["2,0.2", "2", "2,0.25,"])
def test_a_line_cut_by_a_kill_is_dropped(tmp_path, rest):
    path = tmp_path / "progress.csv"
    path.write_text("step,loss\n1,0.1\n" + rest)
    assert logger.read_progress(str(path)) == [{"step": 1.0, "loss": 0.1}]
    assert path.read_text().endswith(rest), "reading changes nothing"
    write_rows(tmp_path, {"step": 2, "loss": 0.5})
    assert path.read_text() == "step,loss\n1,0.1\n2,0.5\n"


def test_a_header_cut_by_a_kill_is_written_again(tmp_path):
    (tmp_path / "progress.csv").write_text("lo")
    write_rows(tmp_path, {"step": 2, "loss": 0.5})
    assert (tmp_path / "progress.csv").read_text() == "loss,step\n0.5,2\n"


def test_text_and_odd_keys_survive(tmp_path):
    write_rows("run", {"note": 'a, "b"\nc', "x,y": 1}, {"new": 1})
    assert (tmp_path / "run/progress.csv").read_text() == ('note,"x,y",new\n"a, ""b"" c",1,\n,,1\n')
    assert logger.read_progress("run/progress.csv") == [{"x,y": 1.0}, {"new": 1.0}]


def test_what_is_no_table_is_refused(tmp_path):
    path = tmp_path / "progress.csv"
    path.write_text("step,loss\n1,0.1\n2,0.1,7\n")
    message = r"row 2 of .*progress.csv has 3 cells where the header has 2"
    with pytest.raises(ValueError, match=message):
        logger.read_progress(str(path))
    with pytest.raises(ValueError, match=message):
        logger.configure(str(tmp_path), ["csv"])
    path.write_bytes(b"\x89PNG\r\n\xff\n")
    with pytest.raises(ValueError, match="is not a CSV file"):
        logger.read_progress(str(path))
    with pytest.raises(ValueError, match=r"there is no file .*none.csv"):
        logger.read_progress(str(tmp_path / "none.csv"))


# -------------------------------------------------------------------------------------- resuming


def test_drop_rows_after_removes_the_lost_work(tmp_path, capsys):
    rows = [{"step": step, "loss": step / 7} for step in range(10, 60, 10)]
    write_rows("kept", *rows[:3])
    write_rows("run", *rows, formats=["stdout", "csv", "json"])
    capsys.readouterr()
    assert logger.drop_rows_after(30) == 2
    assert "dropped 2 logged rows past step 30" in capsys.readouterr().out
    kept = (tmp_path / "kept/progress.csv").read_bytes()
    assert (tmp_path / "run/progress.csv").read_bytes() == kept
    lines = (tmp_path / "run/progress.json").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30]
    assert logger.drop_rows_after(30) == 0
    assert capsys.readouterr().out == ""
    logger.logkvs(rows[3])
    logger.dumpkvs()
    assert [row["step"] for row in logger.read_progress("run/progress.csv")] == [10, 20, 30, 40]


def test_drop_rows_after_keeps_rows_without_a_step(tmp_path):
    write_rows("run", {"loss": 1})
    assert logger.drop_rows_after(0) == 0
    write_rows("run", {"step": 5, "loss": 2})
    assert logger.drop_rows_after(4) == 1
    assert (tmp_path / "run/progress.csv").read_text() == "loss,step\n1,\n"


# ----------------------------------------------------------------------------------- tensorboard


def test_tensorboard_asked_for_and_missing_is_an_error(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    with pytest.raises(ValueError, match="pip install tensorboard"):
        logger.configure("run", ["tensorboard"])
    logger.configure("other")  # by default it is used only where it is installed
    assert sorted(os.listdir("other")) == ["log.txt"]


def test_tensorboard_shows_the_resumed_curve(tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, last in ((1, 5), (4, 6)):
        logger.configure("run", ["tensorboard"])
        if start > 1:
            logger.drop_rows_after(start - 1)
        for step in range(start, last + 1):
            logger.logkvs({"step": step, "loss": step + start / 10, "note": "text"})
            logger.dumpkvs()
        logger.reset()
    events = EventAccumulator(str(tmp_path / "run/tb"))
    events.Reload()
    points = [(event.step, round(event.value, 4)) for event in events.Scalars("loss")]
    assert points == [(1, 1.1), (2, 2.1), (3, 3.1), (4, 4.4), (5, 5.4), (6, 6.4)]
