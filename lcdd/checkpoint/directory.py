"""Directories that are either complete or absent, and fingerprints that tell models and templates apart.

A directory is written under a temporary name beside its final one; every file is flushed to disk, the manifest
with each file's SHA-256 comes last, and one rename makes it visible. A process killed at any moment leaves no
half-written checkpoint under the final name, and a flipped bit, which safetensors loads silently, is found by
`verify_directory`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from lcdd.errors import InputError

MANIFEST = "manifest.json"
SEAL = "manifest_sha256"
"""Key of a manifest: SHA-256 of everything else in it."""
CHUNK_BYTES = 1 << 24


def require_new_directory(path: str | Path, *, name: str = "output_dir") -> Path:
    """The path, if nothing is there or only an empty directory.

    Raises:
        InputError: it is a file, or a directory with something in it; nothing of the user's is ever overwritten.
    """
    path = Path(path)
    if path.is_dir():
        first = next(path.iterdir(), None)
        if first is not None:
            raise InputError(f"{name}: expected a new or empty directory, got {str(path)!r}, which has {first.name!r}")
        if not os.access(path, os.W_OK | os.X_OK):
            raise InputError(f"{name}: expected a place that can be written, got {str(path)!r}")
        return path  # what is written goes into it, and asks nothing of its parent
    elif path.exists():
        raise InputError(f"{name}: expected a new or empty directory, got the file {str(path)!r}")
    for parent in path.absolute().parents:
        if parent.exists():
            if not parent.is_dir() or not os.access(parent, os.W_OK):
                raise InputError(f"{name}: expected a place that can be written, got {str(path)!r}")
            break
    return path


def json_sha256(value: Any) -> str:
    """Hex SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def path_sha256(path: str | Path) -> str:
    """Hex SHA-256 over the names and contents of a directory's files (weights, config, …), hidden ones aside."""
    files = [file for file in sorted(Path(path).iterdir()) if file.is_file() and not file.name.startswith(".")]
    return json_sha256([[file.name, file_sha256(file)] for file in files])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def partial_path(path: Path, process: int) -> Path:
    """Where a process writes what will be `path`."""
    return path.parent / f".{path.name}.partial-{process}"


@contextmanager
def write_directory(
    path: str | Path, *, manifest: str = MANIFEST, metadata: dict[str, Any] | None = None
) -> Iterator[Path]:
    """Write a directory that appears complete or not at all.

    Yields the temporary directory to write into. `metadata` (which may still be filled inside the block) goes
    into the manifest, beside `sha256`: relative file name -> hex digest. If the block raises, nothing remains.

    Raises:
        InputError: `path` exists and is not an empty directory.
    """
    path = require_new_directory(path, name="path")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_path(path, os.getpid())
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        hashes = {str(file.relative_to(temporary)): file_sha256(file) for file in _files(temporary)}
        for file in _files(temporary):
            _sync(file)
        write_manifest(temporary / manifest, {**(metadata or {}), "sha256": hashes})
        for directory in [*(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
            _sync(directory)
        os.rename(temporary, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write one JSON file so that a reader sees the old one or the new one, never half of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(_json_text(value))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def write_manifest(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a manifest with the seal that `read_manifest` checks."""
    write_json(path, {**content, SEAL: json_sha256(content)})


def _json_text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_manifest(path: str | Path, *, manifest: str = MANIFEST, name: str = "path") -> dict[str, Any]:
    """The manifest of a directory, its files not yet checked.

    Raises:
        InputError: no such directory, no (readable) manifest in it: it was never completed; or an altered manifest,
            or one that names files outside its directory.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{name}: expected a directory, got {str(path)!r}, which does not exist")
    try:
        text = (path / manifest).read_bytes().decode("utf-8")
        content = json.loads(text)
    except FileNotFoundError:
        raise InputError(f"{name}: expected {manifest} in {str(path)!r}, found none") from None
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8
        raise InputError(f"{name}: expected JSON in {str(path / manifest)!r}, got {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("sha256"), dict):
        raise InputError(f"{name}: expected {str(path / manifest)!r} to list 'sha256', it does not")
    seal = content.get(SEAL)
    rest = {key: value for key, value in content.items() if key != SEAL}
    # the text too: JSON that reads the same but was written by someone else is not what we wrote
    if seal != json_sha256(rest) or text != _json_text(content):
        raise InputError(f"{name}: {str(path / manifest)!r} is damaged: its content is not what was written")
    for relative in content["sha256"]:
        parts = PurePath(relative)
        if not relative or parts.is_absolute() or ".." in parts.parts or "\\" in relative:
            raise InputError(
                f"{name}: {str(path / manifest)!r} names {relative!r}, expected a path inside its directory"
            )
    return content


def verify_directory(path: str | Path, *, manifest: str = MANIFEST, name: str = "path") -> dict[str, Any]:
    """The manifest, after every file that it names was found with the SHA-256 that it gives.

    Raises:
        InputError: not a complete directory, or a file is missing or differs.
    """
    content = read_manifest(path, manifest=manifest, name=name)
    for relative, expected in content["sha256"].items():
        file = Path(path) / relative
        if not file.is_file():
            raise InputError(f"{name}: expected the file {str(file)!r} that {manifest} lists, found none")
        found = file_sha256(file)
        if found != expected:
            raise InputError(f"{name}: {str(file)!r} is damaged: expected SHA-256 {expected}, got {found}")
    return content


def complete_checkpoints(path: str | Path) -> list[tuple[int, Path]]:
    """(N, directory) of every finished `checkpoint-N` in a run's directory, oldest first."""
    found = []
    for folder in Path(path).glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdecimal() and (folder / MANIFEST).is_file():
            found.append((int(number), folder))
    return sorted(found)
