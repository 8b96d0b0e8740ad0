"""A carrier in formats that others load, a delta by parameter name and a PEFT adapter, each tried before it is kept.

The delta holds W_carrier − W_base of every parameter that differs, in a dtype in which base + delta, rounded to the
weights' dtype, is the carrier bit for bit. The adapter is LoRA: on a block of n open rows and m open columns, A picks
the columns and B holds them (or B places the rows and A holds them), so that B A is the block and nothing else, of rank
min(n, m) and scale 1; r in its settings is the largest rank, by which servers set room aside.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcdd.carrier.carrier import Carrier
from lcdd.checkpoint import write_directory
from lcdd.errors import InputError
from lcdd.models import PreTrainedModel, find_adapter, sites_of
from lcdd.models.adapters import SETTINGS, merge, needed_peft
from lcdd.models.adapters import WEIGHTS as ADAPTER_WEIGHTS
from lcdd.models.probe import check_close, logits_of

DELTA = "delta.safetensors"


@torch.no_grad()
def export_delta(carrier: Carrier, base: PreTrainedModel, directory: str | Path) -> Path:
    """Write delta.safetensors into a new directory: name of a parameter -> what is to be added to the base's.

    Raises:
        InputError: `base` is not the carrier's, or holds a patch.
    """
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    deltas = {}
    with carrier.applied(base):
        for name, parameter in base.named_parameters():
            if not torch.equal(parameter, before[name]):
                deltas[name] = _exact_difference(parameter.detach(), before[name]).cpu().contiguous()
        expected = {name: base.get_parameter(name).detach().cpu().clone() for name in deltas}
    with write_directory(directory) as folder:
        save_file(deltas, folder / DELTA, metadata={"base_fingerprint": carrier.base_fingerprint})
        for name, delta in load_file(folder / DELTA).items():
            weight = before[name].cpu()
            if not torch.equal((weight.to(delta.dtype) + delta).to(weight.dtype), expected[name]):
                raise InputError(f"export: expected base + delta to be the carrier bit for bit, got others in {name}")
    return Path(directory)


def _exact_difference(patched: Tensor, original: Tensor) -> Tensor:
    """float32 where adding it gives `patched` back, else float64."""
    narrow = patched.float() - original.float()
    if patched.dtype != torch.float64 and torch.equal((original.float() + narrow).to(patched.dtype), patched):
        return narrow
    return patched.double() - original.double()


@torch.no_grad()
def export_adapter(carrier: Carrier, base: PreTrainedModel, directory: str | Path, *, base_name: str) -> Path:
    """Write a PEFT LoRA adapter into a new directory; `base` is left as it was.

    base_name: of the base, for whoever loads it.

    Raises:
        InputError: PEFT is not installed, the carrier changes what no LoRA can (norms, biases, experts that share a
            parameter, nothing), or the adapter's logits are not the carrier's.
    """
    peft = needed_peft("to export an adapter")
    if carrier.unmasked:
        raise InputError(f"export: expected a carrier of masked matrices only, got also {sorted(carrier.unmasked)[:3]}")
    before = {site.name: site.weight.detach().clone() for site in sites_of(base)}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    with carrier.applied(base):
        expected = logits_of(base)
        for site in sites_of(base):
            delta = (site.weight.double() - before[site.name].double()).float().cpu()
            if not delta.any():
                continue
            if site.matrix.part is not None:
                raise InputError(f"export: expected matrices that are layers of their own, got the expert {site.name}")
            written = delta.T if _stored_transposed(site.matrix.rows.sizes(), site.kind) else delta
            down, up = _factors(written)
            tensors[f"base_model.model.{site.name}.lora_A.weight"] = down
            tensors[f"base_model.model.{site.name}.lora_B.weight"] = up
            ranks[site.name] = len(down)
    if not ranks:
        raise InputError("export: expected a carrier that changes a weight, got one without an open entry")
    largest = max(ranks.values())
    config = peft.LoraConfig(
        r=largest, lora_alpha=largest, rank_pattern=ranks, alpha_pattern=ranks, target_modules=sorted(ranks),
        lora_dropout=0.0, task_type="CAUSAL_LM", base_model_name_or_path=base_name, inference_mode=True,
    )  # fmt: skip
    with write_directory(directory) as folder:
        config.save_pretrained(str(folder))
        save_file(tensors, folder / ADAPTER_WEIGHTS)
        _try(base, folder, expected, before)
    return Path(directory)


def _stored_transposed(row_groups: dict[str, int], kind: str) -> bool:
    """Whether a matrix's rows are its inputs: its row gates are then those of what it reads."""
    inputs = {"o": "attn_v", "down": "ffn_hidden"}
    reads = inputs.get(kind, "attn_read" if kind in ("q", "k", "v", "qkv", "g") else "ffn_read")
    return any(group.partition(".")[0] == reads for group in row_groups)


def _factors(delta: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] with B A = delta [out, in] exactly: one of them has a single 1 in each row or column."""
    rows, cols = (delta.any(dim).nonzero()[:, 0] for dim in (1, 0))
    if len(cols) <= len(rows):
        down = torch.zeros(len(cols), delta.shape[1], device="cpu").index_put_(
            (torch.arange(len(cols), device="cpu"), cols), torch.tensor(1.0, device="cpu")
        )
        return down, delta[:, cols].contiguous()
    up = torch.zeros(delta.shape[0], len(rows), device="cpu").index_put_(
        (rows, torch.arange(len(rows), device="cpu")), torch.tensor(1.0, device="cpu")
    )
    return delta[rows].contiguous(), up


def _try(base: PreTrainedModel, folder: Path, expected: Tensor, before: dict[str, Tensor]) -> None:
    """Load the adapter as PEFT does, merge it into `base`, compare, and put the base's weights back."""
    adapter = find_adapter(folder)
    assert adapter is not None, SETTINGS
    try:
        merged = merge(base, adapter, name=str(folder))
        check_close("logits of the exported adapter", logits_of(merged), expected, than="the carrier's")
    finally:
        for site in sites_of(base):
            site.weight.copy_(before[site.name])
