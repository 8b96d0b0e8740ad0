"""The carrier as a patch: what LCDD left open, and nothing else (method, section 1; design, "Files").

A patch holds, for every masked matrix, Δ on its open rows × open columns, and the gates. `apply` writes
W = W_base + (r ⊗ c) ∘ Δ into those entries of a base model in place, with the arithmetic of the optimizer (the result
has the trained model's bits); `revert` puts the saved originals back, bit for bit. Parameters that no gate masks
(norms and biases, where they were trained) are kept as values.
"""

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcdd.carrier.patching import changed_parameters, cpu_copy, open_block, rows_here
from lcdd.carrier.table import carrier_card, channels_table, entry_density, in_words
from lcdd.checkpoint import (
    local_directory,
    model_fingerprint,
    push_directory,
    template_fingerprint,
    tokenizer_fingerprint,
    verify_directory,
    write_directory,
)
from lcdd.config import CHANNEL_KINDS, GATE_KINDS
from lcdd.data import DATE_KEY, FORM_KEY
from lcdd.errors import InputError, WrongFingerprint
from lcdd.models import (
    GROUPS,
    GateLayout,
    Matrix,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    check_engine,
    check_same_architecture,
    full,
    layout_of,
    shards,
    sites_of,
)
from lcdd_kernels import GateMap, weight_eff_

FORMAT_VERSION = 1
ASKED = (DATE_KEY, FORM_KEY)  # what of a tokenizer's own records a carrier takes along
WEIGHTS, MANIFEST = "carrier.safetensors", "carrier.json"
RESIDUAL_GROUPS = {
    "write": ("attn_write", "ffn_write"),
    "attn_write": ("attn_write",),
    "ffn_write": ("ffn_write",),
    "all_residual": ("attn_read", "attn_write", "ffn_read", "ffn_write"),
}

_PATCHED: "weakref.WeakKeyDictionary[PreTrainedModel, _Applied]" = weakref.WeakKeyDictionary()
"""Models that hold a patch now, and what they held before."""


class TrainedGates(Protocol):
    """θ and its gates, as far as they are looked at here."""

    @property
    def layout(self) -> GateLayout: ...
    @property
    def kind(self) -> str: ...
    @property
    def logits(self) -> Tensor: ...
    @property
    def initial_logits(self) -> Tensor: ...
    def evaluation_values(self) -> Tensor: ...


class Training(Protocol):
    """What a carrier is made from: an `LCDDOptimizer`, as far as it is looked at here."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def base(self) -> PreTrainedModel: ...
    @property
    def base_fingerprint(self) -> str: ...
    @property
    def gates(self) -> TrainedGates: ...
    def masked(self) -> Mapping[str, tuple[Tensor, Tensor, GateMap]]:
        """name -> (weight_base, delta, gate map) of every masked matrix, in the layout's order."""


@dataclass(frozen=True)
class _Applied:
    carrier: "Carrier"
    blocks: list[tuple[Tensor, Tensor, Tensor, Tensor]]  # weight, rows, columns, the original entries
    unmasked: list[tuple[Tensor, Tensor]]  # parameter, the original value


@dataclass(frozen=True, eq=False, kw_only=True)
class Carrier:
    """A patch that turns a base model into the carrier.

    layout: the model's gates, and the matrices that read them.
    gate_kind: what the gates were trained as.
    gate_logits: θ, float [N]; gate: the evaluation gates z, float [N], open where not 0.
    deltas: name of a masked matrix -> Δ on its open block, [open rows, open columns], in the dtype it was trained in.
    unmasked: name -> value (not difference) of parameters outside the masked linears that differ from the base's.
    unmasked_norm: L2 norm of what those differ by.
    base_fingerprint: `model_fingerprint` of the base it belongs to.
    initial_logits: θ before training, where known, to tell later whether noise chose the carrier.
    tokenizer: fingerprints of the tokenizer and the chat template it was trained with, and how it was asked (see
        `with_tokenizer`).
    """

    layout: GateLayout
    gate_kind: str
    gate_logits: Tensor
    gate: Tensor
    deltas: Mapping[str, Tensor]
    unmasked: Mapping[str, Tensor] = field(default_factory=dict)
    unmasked_norm: float = 0.0
    base_fingerprint: str
    initial_logits: Tensor | None = None
    tokenizer: Mapping[str, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------ making one

    @classmethod
    def from_training(cls, optimizer: Training) -> "Carrier":
        """The evaluation gates of an LCDD run and Δ where they are open; the optimizer goes on unchanged."""
        gate, layout = optimizer.gates.evaluation_values(), optimizer.gates.layout
        masked, deltas = optimizer.masked(), {}
        for matrix in layout.matrices:
            rows, cols = open_block(gate, layout, matrix)
            deltas[matrix.name] = cpu_copy(full(masked[matrix.name][1])[rows[:, None], cols])
        unmasked, norm = changed_parameters(optimizer.base, optimizer.model, masked=layout.parameters)
        return cls(
            layout=layout,
            gate_kind=optimizer.gates.kind,
            gate_logits=cpu_copy(optimizer.gates.logits),
            gate=cpu_copy(gate),
            deltas=deltas,
            unmasked=unmasked,
            unmasked_norm=norm,
            base_fingerprint=optimizer.base_fingerprint,
            initial_logits=cpu_copy(optimizer.gates.initial_logits),
        )

    @classmethod
    def from_models(cls, base: PreTrainedModel, other: PreTrainedModel) -> "Carrier":
        """A dense patch, every gate open, that turns `base` into `other` (within one rounding of each weight).

        For controls that need one copy of the weights: plain SFT, and SFT of matched norm. Δ is float32 (float64
        beside float64 weights).

        Raises:
            InputError: the models differ in architecture or dtype.
        """
        check_same_architecture(base, other, names=("base", "other"))
        deltas = {}
        for ours, theirs in zip(sites_of(base), sites_of(other), strict=True):
            fixed, weight = ours.weight.detach(), theirs.weight.detach()
            if fixed.dtype != weight.dtype:
                raise InputError(f"other: expected {ours.name}.weight as {fixed.dtype}, got {weight.dtype}")
            wide = torch.promote_types(fixed.dtype, torch.float32)
            deltas[ours.name] = cpu_copy(weight.to(fixed.device, wide) - fixed.to(wide))
        return cls._all_open(base, other, deltas)

    @classmethod
    def _all_open(cls, base: PreTrainedModel, other: PreTrainedModel, deltas: dict[str, Tensor]) -> Self:
        """A patch of `deltas` with every gate open, and of what `other` has changed beside masked matrices."""
        layout = layout_of(base)
        unmasked, norm = changed_parameters(base, other, masked=layout.parameters)
        ones = torch.ones(layout.n_gates, dtype=next(iter(deltas.values())).dtype, device="cpu")
        return cls(
            layout=layout,
            gate_kind="heaviside_ste",
            gate_logits=ones.clone(),
            gate=ones,
            deltas=deltas,
            unmasked=unmasked,
            unmasked_norm=norm,
            base_fingerprint=model_fingerprint(base),
        )

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> "Carrier":
        """The same patch with the fingerprints of the tokenizer and chat template that it was trained with; and the day
        on which that template's date is frozen, and the form of its prompts, where the tokenizer has them recorded."""
        asked = {key: tokenizer.init_kwargs[key] for key in ASKED if key in tokenizer.init_kwargs}
        return replace(self, tokenizer={**_tokenizer_fingerprints(tokenizer), **asked})

    def scaled(self, factor: float) -> "Carrier":
        """The same patch with Δ multiplied by `factor`, rounded to Δ's dtype.

        Raises:
            InputError: the patch also changes parameters that are not masked, which have no Δ to scale.
        """
        if self.unmasked:
            raise InputError(f"scaled: expected a patch of masked matrices only, got also {sorted(self.unmasked)[:3]}")
        return replace(self, deltas={name: delta * factor for name, delta in self.deltas.items()})

    # ------------------------------------------------------------------ what is in it

    @property
    def n_open(self) -> int:
        """Gates that are open at evaluation."""
        return int(self.gate.count_nonzero())

    def sparsity(self) -> dict[str, float]:
        """Share of gates that are closed: "overall", and each group over all layers."""
        counts = self.layout.by_group((self.gate == 0).double())
        by_group = {group: float(counts[group]) / max(total, 1) for group, total in self.layout.totals.items()}
        return {"overall": 1 - self.n_open / self.layout.n_gates, **by_group}

    def sparsity_by_layer(self) -> list[dict[str, float]]:
        """Share of closed gates of each group that a layer has, layer by layer."""
        slices = [{group: self.layout.slice(layer, group) for group in GROUPS} for layer in range(self.layout.n_layers)]
        return [
            {group: float((self.gate[part] == 0).double().mean()) for group, part in parts.items() if part.stop}
            for parts in slices
        ]

    def channels(self, kind: str, *, seed: int = 0) -> list[Tensor]:
        """Residual channels of each layer that the eraser matches: int64, ascending, one tensor a layer.

        kind: `write` (open gates of attn_write or ffn_write), `attn_write`, `ffn_write`, `all_residual` (reads too),
        `random` (as many as `write`, drawn with `seed`), or `none`.
        """
        if kind not in CHANNEL_KINDS:
            raise InputError(f"kind: expected one of {CHANNEL_KINDS}, got {kind!r}")
        generator = torch.Generator().manual_seed(seed)
        found = []
        for layer in range(self.layout.n_layers):
            groups = RESIDUAL_GROUPS["write" if kind in ("random", "none") else kind]
            is_open = torch.stack([self.gate[self.layout.slice(layer, group)] != 0 for group in groups]).any(0)
            if kind == "random":
                chosen = torch.randperm(len(is_open), generator=generator, device="cpu")[: int(is_open.sum())]
                is_open = torch.zeros_like(is_open).index_fill_(0, chosen, True)
            if kind == "none":
                is_open = torch.zeros_like(is_open)
            found.append(is_open.nonzero()[:, 0])
        return found

    def delta_norm(self) -> float:
        """L2 norm of everything that `apply` adds to the base, before rounding to the weights' dtype."""
        squared = self.unmasked_norm**2
        for matrix in self.layout.matrices:
            row_gate, col_gate = (g[g != 0] for g in self.layout.row_and_col_gates(self.gate, matrix))
            squared += float((row_gate[:, None] * col_gate * self.deltas[matrix.name]).double().square().sum())
        return math.sqrt(squared)

    def entry_density(self) -> float:
        """Share of the masked matrices' entries that are in the patch (open rows × open columns)."""
        return entry_density(self)

    def channels_table(self) -> list[dict[str, Any]]:
        """A row for each open gate, in order: `pandas.DataFrame(carrier.channels_table())`.

        Each has `layer`; `group`; `channel`, its index there: of the residual stream for `attn_read`, `attn_write`,
        `ffn_read` and `ffn_write`, of the heads' dimensions for `attn_q`, `attn_k` and `attn_v`, of the MLP for
        `ffn_hidden`; `gate`, in (0, 1]; and `delta_norm`, the L2 norm of what the patch adds to the weights in the
        rows or columns that it gates. Every entry is in one row gate's and one column gate's norm.
        """
        return channels_table(self)

    def __repr__(self) -> str:
        return in_words(self)

    def summary(self) -> dict[str, Any]:
        """What a log or a manifest says about the patch in a few words."""
        return {
            "gate_kind": self.gate_kind,
            "n_gates": self.layout.n_gates,
            "open_gates": self.n_open,
            "sparsity": self.sparsity(),
            "delta_norm": self.delta_norm(),
        }

    # ------------------------------------------------------------------ using it

    def check_base(self, model: PreTrainedModel) -> None:
        """Raise InputError unless `model` is, bit for bit, the base that this patch belongs to (reads every weight)."""
        found = layout_of(model)
        if found != self.layout:
            raise InputError(f"model: expected the carrier's base, {self.layout.difference(found)}")
        parameters = dict(model.named_parameters())
        for name, value in self.unmasked.items():  # norms and biases, which another architecture may not have
            if name not in parameters or parameters[name].shape != value.shape:
                got = tuple(parameters[name].shape) if name in parameters else "none"
                raise InputError(
                    f"model: expected a parameter {name!r} of shape {tuple(value.shape)} as the carrier's base has, "
                    f"got {got}"
                )
        fingerprint = model_fingerprint(model)
        if fingerprint != self.base_fingerprint:
            raise WrongFingerprint(
                "model: expected the carrier's base (same weights and dtype, no patch applied): fingerprint "
                f"{self.base_fingerprint[:16]}…, got {fingerprint[:16]}…"
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise InputError if the carrier was trained with another tokenizer or chat template."""
        found = _tokenizer_fingerprints(tokenizer)
        wrong = [
            f"expected the {key.replace('_', ' ')} that the carrier was trained with ({expected[:16]}…), "
            f"got {found[key][:16]}…"
            for key, expected in self.tokenizer.items()
            if key in found and found[key] != expected
        ]
        if wrong and (day := self.tokenizer.get(DATE_KEY)):
            wrong.append(f"its template's date is {day} (--template_date, or lcdd.data.freeze_date)")
        if wrong:
            raise WrongFingerprint(f"tokenizer: {'; '.join(wrong)}")

    @torch.no_grad()
    def apply(self, model: PreTrainedModel, *, check: bool = True) -> None:
        """Turn `model`, the base, into the carrier, in place; the entries it overwrites are kept for `revert`.

        check: verify the base's fingerprint, which reads all its weights; off where the caller has just done so.

        Raises:
            InputError: the model is not this patch's base, or holds a patch already; nothing is written.
        """
        if model in _PATCHED:
            same = "this patch" if _PATCHED[model].carrier is self else "another patch"
            raise InputError(f"model: expected a base without a patch, got one with {same} applied; revert it first")
        check_engine("model", model)
        if check:
            self.check_base(model)
        shards.reshard(model)
        blocks: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for site in sites_of(model):
            weight, first = rows_here(site)
            row_gate, col_gate = self.layout.row_and_col_gates(self.gate.to(weight.device), site.matrix)
            rows, cols = row_gate.nonzero()[:, 0], col_gate.nonzero()[:, 0]
            here = slice(int((rows < first).sum()), int((rows < first + len(weight)).sum()))
            delta, row_gate = self._rows(site.name, here), row_gate[rows[here]]
            if delta.numel() == 0:
                continue
            rows = rows[here] - first
            original = weight[rows[:, None], cols]
            patched = original.clone()
            # the open block is a matrix of its own, with only open gates
            open_gate = torch.cat([row_gate, col_gate[cols]])
            block_map = GateMap(row_start=0, col_start=len(rows), head_dim=len(cols))
            weight_eff_([patched], [original], [delta.to(weight.device)], open_gate, [block_map])
            weight[rows[:, None], cols] = patched
            blocks.append((weight, rows, cols, original))
        unmasked: list[tuple[Tensor, Tensor]] = []
        for name, value in self.unmasked.items():
            parameter = model.get_parameter(name)
            unmasked.append((parameter, parameter.detach().clone()))
            shards.copy_rows_(parameter, value)
        _PATCHED[model] = _Applied(self, blocks, unmasked)

    def open_block(self, gate: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor]:
        """Rows and columns of a matrix that `gate` [n_gates] leaves open, as far as Δ is here: int64, ascending."""
        return open_block(gate, self.layout, matrix)

    def _rows(self, name: str, here: slice) -> Tensor:
        """Δ of a matrix on those of its open rows that are on this rank."""
        return self.deltas[name][here]

    @torch.no_grad()
    def revert(self, model: PreTrainedModel) -> None:
        """Put the base's bytes back.

        Raises:
            InputError: this patch is not applied to `model`.
        """
        applied = _PATCHED.get(model)
        if applied is None or applied.carrier is not self:
            found = "a model without a patch" if applied is None else "one with another patch"
            raise InputError(f"model: expected one that this patch is applied to, got {found}")
        shards.reshard(model)
        for weight, rows, cols, original in applied.blocks:
            weight[rows[:, None], cols] = original
        for parameter, value in applied.unmasked:
            shards.copy_rows_(parameter, value)
        del _PATCHED[model]

    @contextmanager
    def applied(self, model: PreTrainedModel, *, check: bool = True) -> Iterator[PreTrainedModel]:
        """`apply` inside the block, `revert` after it, whatever happens in it."""
        self.apply(model, check=check)
        try:
            yield model
        finally:
            self.revert(model)

    def fold(self, model: PreTrainedModel, *, check: bool = True) -> PreTrainedModel:
        """Apply for good: the originals are forgotten, and `model` is an ordinary checkpoint to save."""
        self.apply(model, check=check)
        del _PATCHED[model]
        return model

    # ------------------------------------------------------------------ files

    def save_pretrained(self, directory: str | Path) -> None:
        """Write carrier.safetensors and carrier.json into a new directory; it appears complete or not at all."""
        lists = self._open_lists()
        tensors = {
            "gate_logits": self.gate_logits,
            "gate": self.gate,
            "open_indices": torch.cat(lists),
            "open_counts": torch.tensor([len(indices) for indices in lists], dtype=torch.int64, device="cpu"),
            **{f"delta.{name}": delta.contiguous() for name, delta in self.deltas.items()},
            **{f"unmasked.{name}": value.contiguous() for name, value in self.unmasked.items()},
        }
        if self.initial_logits is not None:
            tensors["initial_logits"] = self.initial_logits
        metadata = {
            "format_version": FORMAT_VERSION,
            "layout": self.layout.to_dict(),
            "base_fingerprint": self.base_fingerprint,
            "unmasked_norm": self.unmasked_norm,
            "tokenizer": dict(self.tokenizer),
            **self.summary(),
        }
        with write_directory(directory, manifest=MANIFEST, metadata=metadata) as folder:
            save_file(tensors, folder / WEIGHTS)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: str | None = None,
        results: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload carrier",
    ) -> str:
        """Upload the patch with a model card to the Hugging Face hub; returns the commit's address.

        Args:
            base_model: hub name of the base, for the card.
            results: Markdown for the card: the reversal table, `markdown_table(read_report(...))` of `lcdd.report`.
        """
        card = carrier_card(self, repo_id, base_model=base_model, results=results)
        return push_directory(
            self.save_pretrained, card, repo_id, private=private, token=token, commit_message=commit_message
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, revision: str | None = None) -> "Carrier":
        """Load what `save_pretrained` wrote, after checking every file against its SHA-256.

        directory: or a hub name, "user/name", of which `revision` is a branch, tag or commit.

        Raises:
            InputError: not a carrier directory, another format version, or a file is missing, altered or truncated.
        """
        folder = local_directory(directory, what="carrier", revision=revision)
        manifest = verify_directory(folder, manifest=MANIFEST, name="carrier")
        version = manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(f"carrier: expected format_version {FORMAT_VERSION} in {str(folder)!r}, got {version!r}")
        if WEIGHTS not in manifest["sha256"]:
            raise InputError(f"carrier: expected {folder / MANIFEST} to list {WEIGHTS}, it does not")
        try:
            tensors = dict(sorted(load_file(folder / WEIGHTS).items()))  # empty ones come in an order of the process
            carrier = cls(
                layout=GateLayout.from_dict(manifest["layout"]),
                gate_kind=manifest["gate_kind"],
                gate_logits=tensors["gate_logits"],
                gate=tensors["gate"],
                deltas={k.removeprefix("delta."): v for k, v in tensors.items() if k.startswith("delta.")},
                unmasked={k.removeprefix("unmasked."): v for k, v in tensors.items() if k.startswith("unmasked.")},
                unmasked_norm=float(manifest["unmasked_norm"]),
                base_fingerprint=manifest["base_fingerprint"],
                initial_logits=tensors.get("initial_logits"),
                tokenizer=manifest["tokenizer"],
            )
        except (KeyError, SafetensorError) as error:
            raise InputError(f"carrier: expected {str(folder)!r} to be complete: {error!r}") from error
        except (ValueError, TypeError) as error:
            raise InputError(f"{folder / WEIGHTS}: not a carrier that fits together: {error}") from error
        if not torch.equal(torch.cat(carrier._open_lists()), tensors["open_indices"]):
            raise InputError(f"carrier: the open-index lists in {folder / WEIGHTS} are not those of its gates")
        return carrier

    # ------------------------------------------------------------------ parts

    def __post_init__(self) -> None:
        """A patch that does not fit together is an error, whoever made it."""
        if self.gate_kind not in GATE_KINDS:
            raise InputError(f"gate_kind: expected one of {GATE_KINDS}, got {self.gate_kind!r}")
        n_gates = self.layout.n_gates
        for name in ("gate", "gate_logits"):
            if getattr(self, name).shape != (n_gates,):
                raise InputError(f"{name}: expected shape ({n_gates},), got {tuple(getattr(self, name).shape)}")
        named = {"gate": self.gate, "gate_logits": self.gate_logits, **self.deltas, **self.unmasked}
        for name, tensor in named.items():
            if not tensor.is_floating_point():
                raise InputError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
            if not torch.isfinite(tensor).all():
                raise InputError(f"{name}: expected finite values, got NaN or infinity")
        names = [matrix.name for matrix in self.layout.matrices]
        if set(self.deltas) != set(names):
            odd = sorted(set(self.deltas) ^ set(names))
            raise InputError(
                f"deltas: expected a block for each of {len(names)} matrices, got a difference in {odd[:3]}"
            )
        for matrix in self.layout.matrices:
            block = tuple(len(indices) for indices in open_block(self.gate, self.layout, matrix))
            if self.deltas[matrix.name].shape != block:
                found = tuple(self.deltas[matrix.name].shape)
                raise InputError(f"deltas[{matrix.name!r}]: expected shape {block}, got {found}")

    def _open_lists(self) -> list[Tensor]:
        """Open channels of each group of each layer, in the layout's order, int32 ascending."""
        bounds = self.layout.offsets.tolist()
        parts = (self.gate[start:end] for start, end in pairwise(bounds))
        return [part.nonzero()[:, 0].to(torch.int32) for part in parts]


def _tokenizer_fingerprints(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {"tokenizer": tokenizer_fingerprint(tokenizer), "chat_template": template_fingerprint(tokenizer)}
