"""The numbers of a run's log in the experiment trackers that people use, by accelerate's trackers behind our log.

A tracker gets the same numbers as log.jsonl, as `stage/name`. Each is set up by its own environment variables
(WANDB_MODE, TRACKIO_DIR, MLFLOW_TRACKING_URI, ...); TensorBoard's files lie beside the log, under tensorboard/.
"""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcdd.errors import InputError

PROJECT = "lcdd"
"""Project (wandb, trackio) or experiment (mlflow) that runs are put into, where the environment names no other."""

logger = logging.getLogger(__name__)


def require(name: str) -> None:
    """Raise InputError, saying how to install it, unless the tracker can be used."""
    missing = [module for module in ("accelerate", name) if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f"report_to: expected {' and '.join(missing)} to be installed: pip install 'lcdd[{name}]'")


class Tracker:
    """A run in a tracker.

    Args:
        name: "tensorboard", "wandb", "trackio" or "mlflow".
        directory: the run's; its name is the run's name.
        stage: beside it.

    Raises:
        InputError: the tracker did not start (nobody is logged in, say).
    """

    def __init__(self, name: str, directory: Path, stage: str) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's logger insists on it
        run = f"{directory.absolute().name}/{stage}"
        made: Mapping[str, Mapping[str, Any]] = {
            "tensorboard": {"run_name": "tensorboard", "logging_dir": str(directory)},
            "wandb": {"run_name": PROJECT, "name": run, "group": directory.absolute().name, "dir": str(directory)},
            "trackio": {"run_name": PROJECT, "name": run},
            "mlflow": {"experiment_name": PROJECT, "run_name": run},
        }
        self.name = name
        try:
            self._tracker: Any = LOGGER_TYPE_TO_CLASS[name](**made[name])
            self._tracker.main_process_only = False  # only the first rank has a log at all
            self._tracker.start()
        except Exception as error:  # whatever the tracker's own client raises
            raise InputError(f"report_to: {name} did not start: {error}") from error

    def write(self, line: Mapping[str, Any]) -> None:
        """The numbers of a log line. A tracker that fails is warned of and left; the run and its log go on."""
        if self._tracker is None:
            return
        try:
            self._tracker.log(numbers(line), step=int(line.get("step", 0)))
        except Exception as error:
            logger.warning("report_to: %s failed and gets no more of this run: %s", self.name, error)
            self._tracker = None

    def close(self) -> None:
        """End the run there."""
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """`stage/name` -> number, nested ones as `stage/name/inner`."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if key in ("step", "stage", "seconds"):
            continue
        for inner, number in value.items() if isinstance(value, Mapping) else [(None, value)]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                found["/".join(part for part in (line.get("stage"), key, inner) if part)] = number
    return found
