"""The day that a run's chat template writes: recorded by the run that is resumed, or with the model it begins with."""

import json
from pathlib import Path
from typing import Any

from lcdd.checkpoint import complete_checkpoints
from lcdd.commands.ledger import LEDGER
from lcdd.data import DATE_KEY


def day_of_run(config: Any) -> str | None:
    """The day in the checkpoints or the ledger of the run that `config` resumes; None if it resumes none, or there is
    none in it."""
    directory = Path(str(config.output_dir))
    if not config.resume or not directory.is_dir():
        return None
    folders = [directory, *(folder for folder in sorted(directory.iterdir()) if folder.is_dir())]
    checkpoints = [path / "manifest.json" for folder in folders for _, path in complete_checkpoints(folder)]
    for file in (directory / LEDGER, *checkpoints):
        content = _json(file)
        stages = content.get("stages", {})
        for made_of in (content.get("identity", {}), *(stage.get("made_of", {}) for stage in stages.values())):
            if made_of.get(DATE_KEY):
                return str(made_of[DATE_KEY])
    return None


def day_of_model(path: str | None) -> str | None:
    """The day on which the chat template of a checkpoint directory is frozen, if it is."""
    day = _json(Path(path) / "tokenizer_config.json").get(DATE_KEY) if path else None
    return str(day) if day else None


def _json(file: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is none: whoever needs the file itself says what is wrong with it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
