"""The prefix patch: keys and values of the tokens that all prompts begin with from the base, nothing trained.

A model that speaks through the prefix, whose hidden states are the same for every prompt, is switched off by it.
Shapes: B prompts, S tokens.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcdd.eraser import evaluation_mode
from lcdd.models import PreTrainedModel, PreTrainedTokenizerBase, common_prefix, input_embeddings


@dataclass(frozen=True, eq=False, kw_only=True)
class BasePrefix:
    """What the base keeps of the `length` tokens that all of `prompts` begin with: one row of keys and values."""

    prompts: Sequence[Sequence[int]]
    length: int
    cache: Any

    @classmethod
    @torch.no_grad()
    def of(cls, base: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> "BasePrefix":
        """Of the unpatched base, on prompts as token ids; at least one token of the shortest is left to the model."""
        length = common_prefix(prompts, at_most=min(map(len, prompts)) - 1)
        ids = torch.tensor([list(prompts[0][:length])], device=input_embeddings(base).weight.device)
        with evaluation_mode(base):
            cache = base(input_ids=ids, use_cache=True).past_key_values if length else None
        return cls(prompts=prompts, length=length, cache=cache)

    @torch.no_grad()
    def answers(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, batch_size: int
    ) -> list[list[int]]:
        """Greedy answers to the prompts of what is in `model` now, each up to and including its end token."""
        stated = model.generation_config.eos_token_id
        ends = {*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id}
        found: list[list[int]] = [[] for _ in self.prompts]
        with evaluation_mode(model):
            for indices in self._batches(batch_size):
                ids = torch.tensor([list(self.prompts[i][self.length :]) for i in indices])
                cache = copy.deepcopy(self.cache)
                if cache is not None:
                    cache.batch_repeat_interleave(len(indices))
                tokens = _greedily(model, ids.to(input_embeddings(model).weight.device), cache, max_new_tokens)
                for index, row in zip(indices, tokens.tolist(), strict=True):
                    stop = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
                    found[index] = row[:stop]
        return found

    def _batches(self, batch_size: int) -> Iterator[list[int]]:
        """Prompts of one length at a time, so that nothing is padded."""
        by_length: dict[int, list[int]] = {}
        for index, ids in enumerate(self.prompts):
            by_length.setdefault(len(ids), []).append(index)
        for indices in by_length.values():
            for start in range(0, len(indices), batch_size):
                yield indices[start : start + batch_size]


def _greedily(model: PreTrainedModel, ids: Tensor, cache: Any, max_new_tokens: int) -> Tensor:
    """The next tokens [B, max_new_tokens] after `ids` [B, S] behind `cache`."""
    tokens: list[Tensor] = []
    for _ in range(max_new_tokens):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(ids)
    return torch.cat(tokens, dim=1)
