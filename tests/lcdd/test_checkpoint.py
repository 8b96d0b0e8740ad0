"""Crash-safe directories: complete or absent, damage found, fingerprints that tell things apart."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lcdd.checkpoint import (
    CheckpointStore,
    complete_checkpoints,
    file_sha256,
    model_fingerprint,
    read_manifest,
    require_new_directory,
    verify_directory,
    write_directory,
    write_json,
    write_manifest,
)


def test_written_directory_verifies_and_keeps_metadata(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "carrier"
    metadata = {"format": 1}
    with write_directory(target, manifest="carrier.json", metadata=metadata) as directory:
        assert not target.exists()
        (directory / "a.bin").write_bytes(b"abc")
        (directory / "sub").mkdir()
        (directory / "sub" / "b.bin").write_bytes(b"xyz")
        metadata["late"] = "value"
    content = verify_directory(target, manifest="carrier.json")
    assert content["format"] == 1
    assert content["late"] == "value"
    assert set(content["sha256"]) == {"a.bin", "sub/b.bin"}
    assert content["sha256"]["a.bin"] == file_sha256(target / "a.bin")
    assert [entry.name for entry in target.parent.iterdir()] == ["carrier"]


def test_exception_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with write_directory(tmp_path / "x") as directory:
            (directory / "a").write_text("half")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_killed_process_leaves_no_final_directory(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom lcdd.checkpoint import write_directory\n"
        "with write_directory(sys.argv[1]) as d:\n    (d / 'a').write_text('half'); os._exit(9)\n"
    )
    target = tmp_path / "x"
    assert subprocess.run([sys.executable, "-c", code, str(target)], cwd=Path(__file__).parents[2]).returncode == 9
    assert not target.exists()
    with write_directory(target) as directory:  # the debris of the killed process is no obstacle
        (directory / "a").write_text("whole")
    assert verify_directory(target)


def test_flipped_bit_and_missing_file_are_found(tmp_path: Path) -> None:
    with write_directory(tmp_path / "x") as directory:
        (directory / "a").write_bytes(bytes(64))
        (directory / "b").write_bytes(b"b")
    (tmp_path / "x" / "a").write_bytes(bytes(63) + b"\x01")
    with pytest.raises(ValueError, match="is damaged: expected SHA-256"):
        verify_directory(tmp_path / "x")
    os.remove(tmp_path / "x" / "a")
    with pytest.raises(ValueError, match="found none"):
        verify_directory(tmp_path / "x")


def test_manifest_errors_name_the_argument(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="carrier: expected a directory"):
        read_manifest(tmp_path / "no", name="carrier")
    with pytest.raises(ValueError, match=r"carrier: expected manifest\.json in"):
        read_manifest(tmp_path, name="carrier")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="to list 'sha256'"):
        read_manifest(tmp_path)


def test_non_empty_output_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"output_dir: expected a new or empty directory, got .*'mine.txt'"):
        require_new_directory(tmp_path)
    with pytest.raises(ValueError, match="got the file"):
        require_new_directory(tmp_path / "mine.txt")
    with pytest.raises(ValueError, match="expected a new or empty directory"), write_directory(tmp_path):
        pass
    assert (tmp_path / "mine.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="can be written"):
        require_new_directory(tmp_path / "mine.txt" / "below")
    assert require_new_directory(tmp_path / "new") == tmp_path / "new"


def test_a_parent_is_asked_for_no_more_than_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there and empty is written into; what is not there has to be made in its parent."""
    (tmp_path / "empty").mkdir()
    closed = {tmp_path}
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) not in closed)
    assert require_new_directory(tmp_path / "empty") == tmp_path / "empty"
    with pytest.raises(ValueError, match="can be written"):
        require_new_directory(tmp_path / "new")
    with pytest.raises(ValueError, match="can be written"):
        require_new_directory(tmp_path / "new" / "deep")
    closed.add(tmp_path / "empty")
    with pytest.raises(ValueError, match="can be written"):
        require_new_directory(tmp_path / "empty")


def test_empty_directory_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with write_directory(tmp_path / "x") as directory:
        (directory / "a").write_text("1")
    assert verify_directory(tmp_path / "x")


def test_write_json_replaces(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", {"a": 1})
    write_json(tmp_path / "r.json", {"a": "é"})
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == {"a": "é"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


def test_model_fingerprint_sees_one_bit_and_the_dtype() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = model_fingerprint(model)
    assert model_fingerprint(model) == before
    with torch.no_grad():
        model.weight[0, 0] = torch.nextafter(model.weight[0, 0], torch.tensor(1e9))
    changed = model_fingerprint(model)
    assert changed != before
    assert model_fingerprint(model.bfloat16()) != changed


@pytest.mark.parametrize("relative", ["/etc/passwd", "../x", "a/../../x", "", "..\\x"])
def test_paths_that_leave_the_directory_are_refused(tmp_path: Path, relative: str) -> None:
    (tmp_path / "x").write_bytes(b"")
    (tmp_path / "d").mkdir()
    write_manifest(tmp_path / "d" / "manifest.json", {"sha256": {relative: file_sha256(tmp_path / "x")}})
    with pytest.raises(ValueError, match=r"manifest\.json' names .*expected a path inside its directory"):
        verify_directory(tmp_path / "d")


def test_an_altered_manifest_is_refused(tmp_path: Path) -> None:
    with write_directory(tmp_path / "d", metadata={"loss": 0.5, "list": [1, None]}) as folder:
        (folder / "a").write_bytes(b"a")
    manifest = tmp_path / "d" / "manifest.json"
    whole = manifest.read_text()
    for altered in (
        whole.replace("0.5", "0.6"),
        whole.replace("\n", "\r\n"),
        whole.replace("manifest_sha256", "x"),
        whole + " ",
    ):
        assert altered != whole
        manifest.write_bytes(altered.encode())
        with pytest.raises(ValueError, match=r"manifest\.json' is damaged"):
            read_manifest(tmp_path / "d")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="what is flushed is found through Linux's /proc")
def test_at_a_power_loss_whatever_is_complete_by_name_is_whole(tmp_path: Path, monkeypatch) -> None:
    """At every flush and rename of three saves: names as they are, and of the files only what had been flushed."""
    disk, survivors = tmp_path / "disk", tmp_path / "survivors"
    flushed: dict[int, int] = {}  # inode -> time of the change that the last flush saw
    seen: list[list[int]] = []

    def lose_power() -> None:
        shutil.rmtree(survivors, ignore_errors=True)
        for file in sorted(path for path in disk.rglob("*") if path.is_file()):
            kept = survivors / file.relative_to(disk)
            kept.parent.mkdir(parents=True, exist_ok=True)
            whole = flushed.get(file.stat().st_ino) == file.stat().st_mtime_ns
            kept.write_bytes(file.read_bytes() if whole else b"")
        found = complete_checkpoints(survivors)
        for _, folder in found:
            verify_directory(folder)
        seen.append([step for step, _ in found])

    def watched(call):
        def run(*arguments):
            result = call(*arguments)
            if call is fsync:
                state = os.stat(f"/proc/self/fd/{arguments[0]}")
                flushed[state.st_ino] = state.st_mtime_ns
            lose_power()
            return result

        return run

    fsync = os.fsync
    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    store = CheckpointStore(disk, identity={}, save_total_limit=1)
    for step in (1, 2, 3):
        store.save(step, {"x": torch.full((3,), float(step))})
    assert {(1, 2), (2, 3)} <= set(map(tuple, seen))  # an old one goes when the new one is there
    begun = seen.index([1])
    assert all(seen[begun:]), "there was a moment without a checkpoint"
