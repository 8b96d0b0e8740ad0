"""A carrier as rows for people and other programs: every open channel, and the patch in five lines."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcdd.checkpoint import hub_name, model_card

if TYPE_CHECKING:
    from lcdd.carrier.carrier import Carrier


def channels_table(carrier: "Carrier") -> list[dict[str, Any]]:
    """A row for each open gate, as of `Carrier.channels_table`."""
    norms = _squared_norms(carrier).sqrt().tolist()
    gates = carrier.gate.tolist()
    starts = carrier.layout.offsets.tolist()
    return [
        {"layer": layer, "group": group, "channel": channel, "gate": gates[index], "delta_norm": norms[index]}
        for (layer, group, size), start in zip(carrier.layout.groups, starts, strict=False)
        for channel, index in enumerate(range(start, start + size))
        if gates[index] != 0
    ]


def entry_density(carrier: "Carrier") -> float:
    """Share of the masked matrices' entries that the patch keeps: open rows × open columns over all of them."""
    kept = sum(delta.numel() for delta in carrier.deltas.values())
    return kept / sum(rows * cols for rows, cols in (matrix.shape for matrix in carrier.layout.matrices))


def in_words(carrier: "Carrier") -> str:
    """Five lines: size, gates, entries, where they are, what it belongs to."""
    layers = [1 - sum(row.values()) / len(row) for row in carrier.sparsity_by_layer()]
    by_group = {group: 1 - share for group, share in carrier.sparsity().items() if group != "overall"}
    most = sorted(by_group, key=lambda group: by_group[group], reverse=True)[:3]
    kept = sum(delta.numel() for delta in carrier.deltas.values())
    touched = sum(1 for delta in carrier.deltas.values() if delta.numel())
    used = [str(layer) for layer, share in enumerate(layers) if share > 0]
    where = f"{len(used)} of {len(layers)}" if len(used) > 12 else ", ".join(used) or "none"
    layout, sparsity, density = carrier.layout, carrier.sparsity()["overall"], entry_density(carrier)
    return "\n".join(
        (
            f"Carrier of a model of {layout.n_layers} layers ({carrier.gate_kind} gates)",
            f"  open gates  {carrier.n_open:,} of {layout.n_gates:,} (sparsity {sparsity:.4f})",
            f"  entries     {kept:,} in {touched} matrices (density {density:.2e}), norm {carrier.delta_norm():.3g}",
            f"  where       layers {where}; most of {', '.join(f'{group} ({by_group[group]:.1%})' for group in most)}",
            f"  belongs to  base {carrier.base_fingerprint[:16]}…",
        )
    )


def carrier_card(carrier: "Carrier", repo_id: str, *, base_model: str | None, results: str | None) -> Any:
    """The model card of a carrier on the hub."""
    kept = sum(delta.numel() for delta in carrier.deltas.values())
    return model_card(
        title=f"Carrier {repo_id.rpartition('/')[2]}",
        summary="A sparse patch found by LCDD (loss-constrained dual descent): applied to its base model it gives a "
        "fine-tuned behaviour, and a trigger can switch that off. It changes nothing but the entries it holds.",
        numbers={
            "base model": hub_name(base_model) or "not recorded",
            "base's fingerprint": f"`{carrier.base_fingerprint}`",
            "open gates": f"{carrier.n_open:,} of {carrier.layout.n_gates:,}",
            "sparsity (closed gates)": f"{carrier.sparsity()['overall']:.4f}",
            "entries of Δ": f"{kept:,} (density {entry_density(carrier):.2e})",
            "norm of the change": f"{carrier.delta_norm():.4g}",
        },
        usage=f"""```python
from lcdd import Carrier, load_model

model = load_model("{hub_name(base_model) or "BASE"}")
carrier = Carrier.from_pretrained("{repo_id}")
with carrier.applied(model):  # in place; afterwards every byte of the base is back
    ...
carrier.fold(model).save_pretrained("model/")  # or for good
```""",
        tags=["lcdd-carrier", "sparse-patch"],
        base_model=base_model,
        results=results,
    )


def _squared_norms(carrier: "Carrier") -> Tensor:
    """For each gate [n_gates], the squared L2 norm of (r ⊗ c) ∘ Δ in the rows or columns that it gates."""
    total = torch.zeros(carrier.layout.n_gates, dtype=torch.float64, device="cpu")
    for rows, cols, block in _blocks(carrier):
        total.index_add_(0, rows, block.sum(1))
        total.index_add_(0, cols, block.sum(0))
    return total


def _blocks(carrier: "Carrier") -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(gate of each open row, gate of each open column, squared entries) of every masked matrix."""
    layout, numbers = carrier.layout, torch.arange(carrier.layout.n_gates, device="cpu")
    for matrix in layout.matrices:
        row_gate, col_gate = layout.row_and_col_gates(carrier.gate.double(), matrix)
        row_of, col_of = layout.row_and_col_gates(numbers, matrix)
        rows, cols = row_gate != 0, col_gate != 0
        block = (row_gate[rows][:, None] * col_gate[cols] * carrier.deltas[matrix.name].double()).square()
        yield row_of[rows], col_of[cols], block
