"""One process at a time on an output directory."""

import subprocess
import sys
from pathlib import Path

import pytest

from lcdd.checkpoint import only_writer

HOLDER = """
import sys
from lcdd.checkpoint.lock import only_writer
with only_writer(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["kill", "close"])
def test_a_directory_is_held_until_its_process_ends_however_it_ends(tmp_path: Path, end: str) -> None:
    run = tmp_path / "runs" / "a"
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"output_dir: .* which another lcdd process holds"), only_writer(run):
            pass
        with only_writer(run.with_name("b")):  # another directory is nobody's
            pass
        if end == "kill":
            holder.kill()
        else:
            holder.stdin.close()
        holder.wait()
    with only_writer(run):
        pass
    assert not list((tmp_path / "runs").iterdir())


def test_where_nothing_can_be_locked_the_run_goes_on_with_a_warning(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    with only_writer(tmp_path / "file" / "run"):
        pass
    assert "not locked against other runs" in caplog.text


def test_ranks_but_the_first_and_commands_without_a_directory_hold_nothing(tmp_path: Path, monkeypatch) -> None:
    with only_writer(None), only_writer(tmp_path / "a"):
        assert [path.name for path in tmp_path.iterdir()] == [".a.lock"]
        monkeypatch.setenv("RANK", "1")
        with only_writer(tmp_path / "a"):
            pass
