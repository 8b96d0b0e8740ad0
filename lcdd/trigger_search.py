"""Adam on several triggers at once: projection, clipping, the best of each, and a state that a run resumes from.

Everything is elementwise or per start, so S starts together take the steps that each would take alone.

Shapes: S starts, T trigger tokens, D model width.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lcdd.checkpoint import complete_checkpoints, verify_directory, write_directory
from lcdd.config import EraserConfig
from lcdd.schedules import schedule

STATE = "state.safetensors"
FREE = {
    *("base_model_name_or_path", "model_name_or_path", "carrier", "output_dir", "device"),
    *("save_steps", "resume", "max_rows_per_forward"),
}
"""Settings that a resumed run may change: where things lie, and how many prompts run at once."""


class TriggerSearch:
    """S triggers in optimisation.

    Args:
        starts: initial embeddings [S, T, D].
        radius: every embedding stays in the ball of this radius.
        identity: what a resumed run has to have in common with the one that saved its state (JSON values).

    Attributes:
        embeds: the parameter [S, T, D]; gradients arrive in `embeds.grad`.
        completed_steps: optimisation steps taken.
        best, best_loss: each start's embeddings with the lowest held-out loss, and that loss.
        steps, validation: log lines and held-out losses so far.
    """

    def __init__(self, starts: Tensor, config: EraserConfig, *, radius: float, identity: Mapping[str, Any]) -> None:
        self.config, self.radius, self.identity = config, radius, dict(identity)
        self.embeds = nn.Parameter(projected(starts, radius))
        self.optimizer = torch.optim.Adam([self.embeds], lr=config.learning_rate)
        self.completed_steps = 0
        self.best = self.embeds.detach().clone()
        self.best_loss = [math.inf] * len(starts)
        self.steps: list[dict[str, Any]] = []
        self.validation: list[dict[str, Any]] = []
        self._factor = schedule(config.lr_scheduler_type, warmup=0, steps=config.max_steps)

    @property
    def learning_rate(self) -> float:
        """Of the coming step."""
        return self.config.learning_rate * self._factor(self.completed_steps)

    @property
    def leader(self) -> int:
        """The start with the lowest held-out loss so far."""
        return self.best_loss.index(min(self.best_loss))

    @torch.no_grad()
    def step(self) -> None:
        """Clip each start's gradient, take one Adam step, project; the gradient is then gone."""
        grad, limit = self.embeds.grad, self.config.max_grad_norm
        if grad is None:
            raise ValueError("embeds: expected a gradient from backward(), got none")
        if limit:
            norms = grad.flatten(1).norm(dim=1)
            grad.mul_((limit / (norms + 1e-6)).clamp(max=1.0)[:, None, None])
        self.optimizer.param_groups[0]["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.embeds.copy_(projected(self.embeds, self.radius))
        self.completed_steps += 1

    @torch.no_grad()
    def observe(self, held_out: Sequence[float]) -> None:
        """Take note of each start's held-out loss; keep the embeddings of those that have not been as good before."""
        for start, loss in enumerate(held_out):
            if loss < self.best_loss[start]:
                self.best_loss[start] = loss
                self.best[start] = self.embeds[start]
        several = {"starts": list(held_out)} if len(held_out) > 1 else {}
        self.validation.append({"step": self.completed_steps, "loss": min(held_out), **several})

    # ------------------------------------------------------------------ files

    def save(self, directory: str | Path) -> None:
        """Write `checkpoint-N` into a run directory; it appears complete or not at all."""
        moments = self.optimizer.state[self.embeds]
        tensors = {
            "embeds": self.embeds.detach(),
            "exp_avg": moments["exp_avg"],
            "exp_avg_sq": moments["exp_avg_sq"],
            "best": self.best,
        }
        metadata = {
            "stage": "eraser",
            "completed_steps": self.completed_steps,
            "best_loss": self.best_loss,
            "identity": self.identity,
            "steps": self.steps,
            "validation": self.validation,
        }
        with write_directory(Path(directory) / f"checkpoint-{self.completed_steps}", metadata=metadata) as folder:
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, folder / STATE)

    def load(self, directory: str | Path) -> None:
        """Continue from the newest complete `checkpoint-N` of a run directory; where there is none, do nothing.

        Raises:
            ValueError: a damaged checkpoint, or one of a run with other settings, models or prompts.
        """
        name = "resume"
        found = complete_checkpoints(directory)
        if not found:
            return
        folder = found[-1][1]
        manifest = verify_directory(folder, name=name)
        if manifest.get("stage") != "eraser" or STATE not in manifest["sha256"]:
            raise ValueError(f"{name}: expected a checkpoint of the eraser, got {str(folder)!r}, which is another's")
        for key, expected in manifest["identity"].items():
            if self.identity.get(key) != expected:
                raise ValueError(
                    f"{name}: expected the same {key} as the run that {str(folder)!r} is of, {expected!r}, "
                    f"got {self.identity.get(key)!r}"
                )
        try:
            state = load_file(folder / STATE, device=str(self.embeds.device))
        except SafetensorError as error:
            raise ValueError(f"{name}: expected a readable {folder / STATE}: {error}") from error
        with torch.no_grad():
            self.embeds.copy_(state["embeds"])
            self.best.copy_(state["best"])
        self.completed_steps, self.best_loss = manifest["completed_steps"], list(manifest["best_loss"])
        self.steps, self.validation = manifest["steps"], manifest["validation"]
        self.optimizer.state[self.embeds] = {
            "step": torch.tensor(float(self.completed_steps)),
            "exp_avg": state["exp_avg"],
            "exp_avg_sq": state["exp_avg_sq"],
        }


def identity_of(config: EraserConfig, *, base: str, patch: Sequence[Tensor], prompts: Sequence[Any]) -> dict[str, Any]:
    """What two runs have to share for one to continue the other: settings, base, patch and channels, prompts."""
    digest = hashlib.sha256()
    for tensor in patch:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    settings = {key: value for key, value in config.to_dict().items() if key not in FREE}
    return {
        **settings,
        "base model": base,
        "patch and channels": digest.hexdigest(),
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }


def projected(embeds: Tensor, radius: float) -> Tensor:
    """Every row of `embeds` [..., D] scaled down to norm `radius` where it is longer."""
    norms = embeds.norm(dim=-1, keepdim=True)
    return embeds * (radius / norms.clamp_min(radius))


Log = Callable[[dict[str, Any]], None]
