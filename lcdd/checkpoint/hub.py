"""Carriers and triggers on the Hugging Face hub: `push_to_hub`, and `from_pretrained("user/name")`.

What goes there is the directory that `save_pretrained` writes, with a model card; what comes from there is checked as
one on the disk is. Nothing but safetensors, JSON and the card is fetched.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download

from lcdd.errors import InputError

FETCHED = ("*.safetensors", "*.json")
README = "README.md"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def hub_name(name: str | None) -> str | None:
    """The name if it can be one of the hub's, user/name, and is no path here."""
    return name if name and _NAME.fullmatch(name) and not Path(name).exists() else None


def local_directory(name: str | Path, *, what: str, revision: str | None = None) -> Path:
    """A directory as it is, or of a hub name (`user/name`) the local copy of what is there.

    what: the argument's name, for errors. revision: a branch, tag or commit of the hub.

    Raises:
        InputError: the hub has no such repository, or cannot be asked and has not been before.
    """
    path = Path(name)
    # a path of two parts whose first is a directory here is a path with a typing error, and not asked of the hub
    if path.exists() or not _NAME.fullmatch(str(name)) or path.parent.is_dir():
        return path
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(FETCHED)))
    except Exception as error:  # the client's own, requests' and the cache's: all mean that it is not to be had
        raise InputError(f"{what}: expected a directory or a hub name, got {str(name)!r}: {error}") from error


def push_directory(
    save: Callable[[Path], None],
    card: ModelCard,
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    commit_message: str,
) -> str:
    """Upload what `save` writes into a directory, with its card; returns the commit's address."""
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "upload"
        save(folder)
        (folder / README).write_text(str(card), encoding="utf-8")
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return str(commit.commit_url)


def model_card(
    *,
    title: str,
    summary: str,
    numbers: Mapping[str, str],
    usage: str,
    tags: Sequence[str],
    base_model: str | None,
    results: str | None,
    library: str = "lcdd",
) -> ModelCard:
    """A card: YAML metadata, what it is, its numbers, how to use it, what was measured.

    Args:
        base_model: hub name of the base; anything that is no hub name is left out of the metadata.
        results: Markdown, the reversal table say (`lcdd.report.markdown_table`).
    """
    data: dict[str, Any] = {"library_name": library, "tags": ["lcdd", *tags], "base_model": hub_name(base_model)}
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in numbers.items())])
    parts = [f"# {title}", summary, table, "## Use", usage]
    if results:
        parts += ["## What was measured", results]
    parts.append("Made with lcdd (arXiv 2605.06632: LCDD and SFT-Eraser).")
    metadata = ModelCardData(**{key: value for key, value in data.items() if value is not None}).to_yaml()
    return ModelCard(f"---\n{metadata}\n---\n\n" + "\n\n".join(parts) + "\n")
