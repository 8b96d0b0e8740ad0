"""Utility by lm-evaluation-harness, with and without a trigger in front of every request (method, section 5).

The harness is an optional extra (`pip install 'lcdd[eval]'`) and loads its tasks' data itself. It is given the model as
it is, or wrapped in `TriggeredModel`, which answers what the harness asks of a transformers model.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yaml import YAMLError

from lcdd.eraser import Trigger, evaluation_mode
from lcdd.errors import InputError
from lcdd.models import PreTrainedModel, PreTrainedTokenizerBase, input_embeddings

TaskRunner = Callable[..., Mapping[str, Any]]
"""(model, tokenizer, tasks, batch_size=, limit=) -> {task: {metric: value}}."""


class TriggeredModel(nn.Module):
    """A causal language model behind a trigger, for programs that give token ids and read logits.

    `forward` puts the trigger in front of every row and drops its positions from the logits, so a row's logits sit at
    its own tokens. Rows are right-padded, or left-padded with an attention mask. `generate` puts the trigger behind any
    left padding (in front of the first real token), and returns prompt and answer as transformers does.
    """

    def __init__(self, model: PreTrainedModel, trigger: Trigger) -> None:
        super().__init__()
        trigger.check_fits(model)
        self.model = model
        self.register_buffer("embeds", trigger.embeds.to(input_embeddings(model).weight), persistent=False)

    def __getattr__(self, name: str) -> Any:
        """Whatever else a transformers model has: config, device, dtype, name_or_path, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def _inputs(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(embeddings [B, T + S, D], mask [B, T + S], place of each token [B, S]): padding, trigger, text."""
        rows, width = input_ids.shape
        length = self.embeds.shape[0]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
        first = (mask.cumsum(1) == 0).sum(1)  # padding on the left
        place = torch.arange(width, device=input_ids.device).expand(rows, -1)
        place = torch.where(place < first[:, None], place, place + length)
        tokens = input_embeddings(self.model)(input_ids)
        embeds = tokens.new_zeros(rows, length + width, tokens.shape[2])
        embeds.scatter_(1, place[:, :, None].expand_as(tokens), tokens)
        at = first[:, None] + torch.arange(length, device=input_ids.device)
        embeds.scatter_(1, at[:, :, None].expand(-1, -1, tokens.shape[2]), self.embeds.expand(rows, -1, -1))
        whole = mask.new_zeros(rows, length + width).scatter_(1, place, mask).scatter_(1, at, 1)
        return embeds, whole, place

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        """Logits [B, S, V] at the rows' own tokens."""
        embeds, mask, place = self._inputs(input_ids, attention_mask)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        output = self.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
        output.logits = output.logits.gather(1, place[:, :, None].expand(-1, -1, output.logits.shape[2]))
        return output

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, max_length: int | None = None, **settings: Any
    ) -> Tensor:
        """Prompt and answer [B, S + new]; `max_length` counts both, without the trigger."""
        embeds, mask, _ = self._inputs(input_ids, attention_mask)
        if max_length is not None:
            settings["max_new_tokens"] = max_length - input_ids.shape[1]
        if criteria := settings.pop("stopping_criteria", None):
            settings["stopping_criteria"] = [_OnWhole(one, input_ids) for one in criteria]
        generate: Any = self.model.generate
        answer = generate(inputs_embeds=embeds, attention_mask=mask, **settings)
        return torch.cat([input_ids, answer], dim=1)


class _OnWhole:
    """A stopping criterion that is shown prompt and answer, as it would be with token ids as input."""

    def __init__(self, criterion: Callable[..., Any], prompt: Tensor) -> None:
        self.criterion, self.prompt = criterion, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Any:
        return self.criterion(torch.cat([self.prompt, input_ids], dim=1), scores, **more)


def parse_tasks(tasks: Sequence[str]) -> list[str]:
    """Task names, given apart or with commas.

    Raises:
        InputError: an empty name.
    """
    names = [name.strip() for task in tasks for name in task.split(",")]
    if not all(names):
        raise InputError(f"tasks: expected names of tasks, got {list(tasks)}")
    return list(dict.fromkeys(names))


class Harness:
    """lm-evaluation-harness on models that are in memory; its index of tasks is read once, which takes seconds."""

    def __init__(self, tasks: Sequence[str]) -> None:
        """Look the tasks up before anything is computed.

        Args:
            tasks: the harness's names of tasks and groups, or YAML files that define one.

        Raises:
            InputError: the harness is not installed (how to is said), or a task is neither known nor a file.
        """
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM  # needs more than the package itself: accelerate
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError(
                f"tasks: expected lm-evaluation-harness to be installed: pip install 'lcdd[eval]' ({error})"
            ) from None
        self._evaluate: Any = simple_evaluate
        self._model_class: Any = HFLM
        self._index: Any = TaskManager()
        known = set(self._index.all_tasks)
        if unknown := [name for name in tasks if name not in known and not Path(name).is_file()]:
            raise InputError(f"tasks: expected names of lm-evaluation-harness or YAML files, got {unknown}")

    def __call__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[str],
        *,
        batch_size: int,
        limit: int | None,
    ) -> Mapping[str, Any]:
        """The harness's own results, task -> metric -> value.

        Raises:
            InputError: it cannot run a task: its definition is broken, or its data are not to be had.
        """
        language_model = self._model_class(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            found = self._evaluate(
                model=language_model, tasks=list(tasks), task_manager=self._index, limit=limit, log_samples=False
            )
        except (KeyError, ValueError, OSError, YAMLError) as error:
            raise InputError(f"tasks: lm-evaluation-harness cannot run {list(tasks)}: {error}") from error
        return found["results"]


def utility(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    trigger: Trigger | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    runner: TaskRunner | None = None,
) -> dict[str, dict[str, float]]:
    """task -> metric -> value of `model` as it is now (with a patch or not), behind `trigger` if there is one.

    runner: what runs the tasks: a `Harness` that was made for them; one is made here if none is given.
    """
    names = parse_tasks(tasks)
    runner = runner or Harness(names)
    with evaluation_mode(model), torch.no_grad():
        subject: Any = model if trigger is None else TriggeredModel(model, trigger).eval()
        found = runner(subject, tokenizer, names, batch_size=batch_size, limit=limit)
    return {
        task: {metric: float(value) for metric, value in row.items() if metric != "sample_len" and _is_number(value)}
        for task, row in found.items()
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
