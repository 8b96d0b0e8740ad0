"""A fine-tuned model that comes from elsewhere may have changed what no gate masks: biases, norms, embeddings, head."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lcdd.models.shards import full, local, reshard
from lcdd.models.sites import backbone, sites_of, unmasked_parameters


def unmasked_changes(base: PreTrainedModel, other: PreTrainedModel, *, trained: bool = False) -> dict[str, list[str]]:
    """Kind -> names of the parameters that no gate masks and that differ between two models of one architecture.

    Kinds: biases, norms, embeddings, head, routers, and others, outside the decoder (a tower for pictures). trained:
    leave out the norms and biases that LCDD would train (`unmasked_parameters`). A collective where the models are
    sharded.
    """
    masked = {id(site.parameter) for site in sites_of(other)}
    kept = {id(parameter) for parameter in unmasked_parameters(other).values()} if trained else set()
    kinds = _kinds(other)
    found: dict[str, list[str]] = {}
    for (name, theirs), ours in zip(other.named_parameters(), base.parameters(), strict=True):
        if id(theirs) in masked | kept or torch.equal(_whole(theirs), _whole(ours)):
            continue
        found.setdefault(kinds.get(id(theirs)) or _by_form(name, theirs), []).append(name)
    return found


@torch.no_grad()
def take_from_base_(model: PreTrainedModel, base: PreTrainedModel, names: Sequence[str]) -> None:
    """Give some parameters of a model the base's values."""
    for given in (model, base):
        reshard(given)  # what is written into a gathered weight is lost
    for name in names:
        local(model.get_parameter(name)).copy_(local(base.get_parameter(name)))


def in_words(changes: Mapping[str, Sequence[str]]) -> str:
    """ "12 biases, 1 norm, head"."""
    one = {"biases": "1 bias", "norms": "1 norm", "routers": "1 router", "others": "1 other"}
    return ", ".join(
        one.get(kind, kind) if len(names) == 1 else f"{len(names)} {kind}" for kind, names in changes.items()
    )


def _whole(parameter: Tensor) -> Tensor:
    return full(parameter.detach())


def _kinds(model: PreTrainedModel) -> dict[int, str]:
    """id of a parameter -> its kind, of those whose place or module's class tells."""
    decoder = backbone(model)
    inside = {id(p) for p in decoder.parameters()}
    others = {id(p): "others" for p in model.parameters() if id(p) not in inside}
    head = {id(p): "head" for p in model.get_output_embeddings().parameters()}
    return others | head | {id(m.weight): "embeddings" for m in decoder.modules() if isinstance(m, nn.Embedding)}


def _by_form(name: str, parameter: Tensor) -> str:
    if name.rpartition(".")[2].endswith("bias"):
        return "biases"
    return "norms" if parameter.ndim == 1 else "routers"
