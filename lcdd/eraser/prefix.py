"""The prefix patch: an off switch without training, for a model that speaks through what all its prompts begin with.

A chat template writes the same tokens before every user's text. A small carrier may put its behaviour into the keys and
values of those, which are the same for every prompt; with the base's keys and values in their place it is left with
what it changes behind them. Whether that takes a behaviour away is the model's own matter: measure it.

Shapes: B prompts, S tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lcdd.data import Example, encode_prompt
from lcdd.eraser.generation import evaluation_mode
from lcdd.errors import InputError
from lcdd.models import Cache, PreTrainedModel, PreTrainedTokenizerBase, common_prefix, input_embeddings, shape_of

PROBES = ("a", "The", "0", "?")
"""User texts whose prompts have the template's beginning in common and nothing else."""


def template_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that the chat template writes before a user's text, a default system prompt included.

    Raises:
        InputError: it writes none.
    """
    chats = [Example(messages=({"role": "user", "content": text},), completion="", source=text) for text in PROBES]
    prompts = [encode_prompt(tokenizer, chat) for chat in chats]
    length = common_prefix(prompts, at_most=min(map(len, prompts)) - 1)
    if not length:
        raise InputError("tokenizer: expected a chat template that writes tokens before the user's text, got none")
    return prompts[0][:length]


@dataclass(frozen=True, eq=False, kw_only=True)
class PrefixPatch:
    """Keys and values of the tokens that prompts begin with, as the base computes them.

    token_ids: those tokens; a prompt that begins otherwise is refused.
    cache: the base's, of one row, on its device; never written to.
    """

    token_ids: tuple[int, ...]
    cache: Cache

    @classmethod
    @torch.no_grad()
    def of(cls, base: PreTrainedModel, token_ids: Sequence[int]) -> "PrefixPatch":
        """Of what is in `base` now: the base itself, before a carrier is applied.

        Args:
            token_ids: what every prompt begins with: `template_prefix(tokenizer)`, or a system prompt as well.

        Raises:
            InputError: no tokens, or a model that keeps no keys and values.
        """
        if not token_ids:
            raise InputError("token_ids: expected at least one token, got none")
        ids = torch.tensor([list(token_ids)], device=input_embeddings(base).weight.device)
        with evaluation_mode(base):
            cache = base(input_ids=ids, use_cache=True).past_key_values
        if not isinstance(cache, Cache):
            raise InputError(f"base: expected a model that keeps keys and values, got {type(cache).__name__} from it")
        return cls(token_ids=tuple(token_ids), cache=cache)

    def check_fits(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        """Raise InputError unless the model has the base's layers and every prompt goes on behind the prefix."""
        found, expected = shape_of(model.config).n_layers, len(self.cache)
        if found != expected:
            raise InputError(f"prefix: made for a model of {expected} layers, this one has {found}")
        length = len(self.token_ids)
        for index, ids in enumerate(prompts):
            if tuple(ids[:length]) != self.token_ids or len(ids) == length:
                raise InputError(
                    f"prompts[{index}]: expected tokens behind the prefix's {list(self.token_ids)}, got {list(ids)}"
                )

    def cache_of(self, rows: int) -> Cache:
        """A copy for a batch of `rows` prompts, as `past_key_values` of a forward on what follows, or of `generate`."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache

    def inputs(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What transformers' `generate` is given for prompts of one length, whole, as token ids [B, S]."""
        ids = torch.tensor([list(prompt) for prompt in prompts], device=self.device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "past_key_values": self.cache_of(len(prompts)),
        }

    @property
    def device(self) -> torch.device:
        """Of the first layer's keys."""
        keys: torch.Tensor = getattr(self.cache.layers[0], "keys")  # noqa: B009  (not of every kind of layer)
        return keys.device
