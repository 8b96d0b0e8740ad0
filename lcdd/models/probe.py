"""A numeric probe of a model when it is loaded: what is not known by name is not taken on trust either.

On a dozen tokens:

- gates close the channels that the layout says (`lcdd.models.roles`), in one layer of every kind;
- our losses' logits, the head's product as `head_of` shapes it, are `model(x).logits`;
- the forward over rows of any length behind a shared beginning, with windows narrowed so that they are seen, is that of
  one row at a time.

A model that fails is refused, with what differed.
"""

import inspect
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lcdd.errors import InputError
from lcdd.models import roles
from lcdd.models.head import head_of
from lcdd.models.packed_rows import ROUNDING, PackedRows, narrow_windows
from lcdd.models.patterns import Block
from lcdd.models.sites import backbone, decoder_layers, input_embeddings, matched_blocks, output_of, probe_ids

FAILURES = (TypeError, AttributeError, ValueError, RuntimeError, IndexError, KeyError)
"""What a forward gives that expects other inputs than a decoder's."""


@torch.no_grad()
def probe(model: PreTrainedModel) -> None:
    """Run the probe; a model on the meta device has no numbers to look at and is passed. Of a sharded one it is a
    collective, to be called on every rank.

    Raises:
        InputError: LCDD cannot be trusted to work on this model; the message names what differed.
    """
    _, blocks = matched_blocks(model)
    check_generates(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    was_training = model.training
    model.eval()
    try:
        _probe_gates(model, blocks)
        _probe_logits(model)
        _probe_rows(model)
    except InputError:
        raise
    except FAILURES as error:
        raise InputError(f"model: expected a decoder that runs on token ids alone, got {error!r}") from error
    finally:
        model.train(was_training)


def check_generates(model: PreTrainedModel) -> None:
    """Raise InputError unless the model's own `generate` starts from embeddings, which triggers are."""
    prepare: Any = getattr(model, "prepare_inputs_for_generation", None)
    if prepare is None or "inputs_embeds" not in inspect.signature(prepare).parameters:
        raise InputError(f"model: expected one that generates from embeddings, got {type(model).__name__}")


def _probe_gates(model: PreTrainedModel, blocks: list[Block]) -> None:
    seen = set()
    for layer, (module, block) in enumerate(zip(decoder_layers(model), blocks, strict=True)):
        kind = type(module), tuple(replace(matrix, layer=0) for matrix in block.matrices)
        if kind in seen:
            continue
        seen.add(kind)
        group = roles.leaking_group(module, block, partial(output_of, model, layer))
        if group is not None:
            raise InputError(
                f"model: expected channels of {group} to be written by the rows and read by the columns that share "
                f"their gates, got others in layer {layer} ({type(module).__name__})"
            )


def _probe_logits(model: PreTrainedModel) -> None:
    ids = probe_ids(model)
    expected = model(input_ids=ids, use_cache=False).logits
    found = head_of(model).logits(backbone(model)(input_ids=ids, use_cache=False).last_hidden_state)
    check_close("logits", found, expected.to(found.dtype))  # some models widen theirs


def _probe_rows(model: PreTrainedModel) -> None:
    embeds = input_embeddings(model)(probe_ids(model)[0])
    shared, lengths = 4, (1, 2, len(embeds) - 7)
    packed = PackedRows(lengths, starts=1, shared=shared, device=embeds.device)
    with narrow_windows(model):
        found = packed.forward(model, embeds)
        for row, (first, length) in enumerate(zip(packed.first, lengths, strict=True)):
            alone = torch.cat([embeds[:shared], embeds[first : first + length]])
            expected = backbone(model)(inputs_embeds=alone[None], use_cache=False).last_hidden_state[0]
            check_close(f"hidden states of row {row}, packed", found[first : first + length], expected[shared:])


@dataclass(frozen=True, eq=False, kw_only=True)
class Ends:
    """Logits [S, V] of a few tokens by the two models that all gates open, and all gates closed, have to give back."""

    opened: Tensor
    closed: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, base: PreTrainedModel, tuned: PreTrainedModel) -> "Ends":
        """Of a base and what was fine-tuned from it, before training writes into the latter."""
        return cls(opened=logits_of(tuned), closed=logits_of(base))

    def check_opened(self, model: PreTrainedModel) -> None:
        """Raise InputError unless `model` is the fine-tuned one but for rounding of its weights."""
        check_close("logits with all gates open", logits_of(model), self.opened, than="the SFT model's")

    def check_closed(self, model: PreTrainedModel) -> None:
        """Raise InputError unless `model` computes what the base does."""
        check_close("logits with all gates closed", logits_of(model), self.closed, than="the base's")


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    """Of a dozen tokens (or of `ids` [1, S]) in evaluation mode, [S, V]."""
    was_training = model.training
    model.eval()
    try:
        return model(input_ids=probe_ids(model) if ids is None else ids, use_cache=False).logits[0]
    finally:
        model.train(was_training)


def check_close(what: str, found: Tensor, expected: Tensor, *, than: str = "the model's own") -> None:
    """Raise InputError unless two tensors are the same but for rounding."""
    difference = float((found.double() - expected.double()).norm() / expected.double().norm())
    if not difference <= ROUNDING[expected.dtype]:
        raise InputError(f"model: expected {what} that are {than}, got a relative difference of {difference:.2g}")
