"""What a pipeline has finished: `stages.json` says of each stage what it was made of, and seals what it left.

`lcdd run --resume` goes by it. A stage is skipped only if its settings, the data, the models and the results of all
stages before it are what they were, and every file of its own results is as it was written; where that does not hold
it is an error, never a second try over the first one's files.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lcdd.checkpoint import (
    RESULTS,
    differences,
    file_sha256,
    path_sha256,
    require_new_directory,
    template_fingerprint,
    tokenizer_fingerprint,
    verify_directory,
    write_manifest,
)
from lcdd.config import Config, DataConfig
from lcdd.data import DATE_KEY, Prepared
from lcdd.errors import InputError
from lcdd.models import hub_commit

LEDGER = "stages.json"


def has_run(directory: Path, *, resume: bool) -> bool:
    """Whether a pipeline lies in the directory, to be resumed.

    Raises:
        InputError: the directory is not new, and holds no pipeline, or one while not `resume`.
    """
    traces = (LEDGER, "log.jsonl", "*/checkpoint-*", "*/.checkpoint-*")
    known = directory.is_dir() and any(next(directory.glob(trace), None) for trace in traces)
    if known and resume:
        return True
    try:
        require_new_directory(directory)
    except InputError as error:
        unfinished = known and not (directory / "report.json").exists()
        hint = "; it has a pipeline's run: --resume goes on with it" if unfinished else ""
        raise InputError(f"{error}{hint}") from None
    return False


class Ledger:
    """The finished stages of the pipeline in `directory`.

    Args:
        data, prepared: the data set's settings and what came of them; part of what every stage is made of.
        models: name -> checkpoint directory or hub name of the models that the pipeline begins with; likewise.

    Raises:
        InputError: a result that the ledger seals is damaged or gone.
    """

    def __init__(self, directory: Path, data: DataConfig, prepared: Prepared, models: Mapping[str, str]) -> None:
        self.directory = directory
        found = (directory / LEDGER).exists()
        self.stages = verify_directory(directory, manifest=LEDGER, name="resume")["stages"] if found else {}
        text = hashlib.sha256()
        for split in (prepared.splits.train, prepared.splits.validation, prepared.splits.test):
            for example in split:
                text.update(example.content_hash.encode())
            text.update(b"|")
        self._common = {
            "data": {key: value for key, value in data.to_dict().items() if key != "dataset_name"},
            "examples": text.hexdigest(),
            "tokenizer": tokenizer_fingerprint(prepared.tokenizer),
            "chat_template": template_fingerprint(prepared.tokenizer),
            **({DATE_KEY: prepared.template_date} if prepared.template_date else {}),
        }
        self._inputs = {
            name: path_sha256(path) if Path(path).is_dir() else hub_commit(path) for name, path in models.items()
        }

    def seconds(self, stage: str, settings: Config) -> float | None:
        """How long a finished stage took; None if it has to be run.

        Raises:
            InputError: it is finished, but was made of something else, or a file of its results is damaged.
        """
        entry = self.stages.get(stage)
        if entry is None:
            return None
        changed = differences(entry["made_of"], self._made_of(settings))
        if changed:
            raise InputError(
                f"resume: {self.directory / stage} was made of something else: {'; '.join(changed)}. "
                "Start anew in another output_dir"
            )
        for relative in entry["sha256"]:
            file = self.directory / relative
            if RESULTS.get(file.parent.name) == file.name:
                verify_directory(file.parent, manifest=file.name, name="resume")
        self._inputs |= entry["sha256"]
        return float(entry["seconds"])

    def add(self, stage: str, settings: Config, written: Iterable[Path], *, seconds: float) -> None:
        """Take note of a stage that has just ended, and of what it wrote (of a directory, the file that seals it)."""
        files = [path / RESULTS[path.name] if path.name in RESULTS else path for path in written]
        hashes = {str(file.relative_to(self.directory)): file_sha256(file) for file in files}
        self.stages[stage] = {"made_of": self._made_of(settings), "sha256": hashes, "seconds": seconds}
        self._inputs |= hashes
        together = {name: digest for entry in self.stages.values() for name, digest in entry["sha256"].items()}
        write_manifest(self.directory / LEDGER, {"stages": self.stages, "sha256": together})

    def _made_of(self, settings: Config) -> dict[str, Any]:
        config = settings.lasting(settled=True)
        return {"config": config, **self._common, "inputs": dict(self._inputs)}
