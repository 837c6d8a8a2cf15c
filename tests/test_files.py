import os

import pytest

from improved_diffusion.files import atomic_write


def test_content_appears_whole_and_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    with atomic_write(str(path)) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt(), ValueError()])
def test_an_error_leaves_the_old_content(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_write(str(path)) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_message_names_the_file(tmp_path):
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "below")
    with pytest.raises(OSError, match=f"cannot write {path}"), atomic_write(path):
        pass
