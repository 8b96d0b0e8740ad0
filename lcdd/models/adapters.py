"""PEFT's adapters: one on disk becomes weights when it is loaded, and so do the low-rank layers that SFT may train.

PEFT itself reads, applies and merges; here is found out whether what it made can be trusted to be the model that the
adapter was. It is imported where it is used: `pip install lcdd[peft]`.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, find_adapter_config_file

from lcdd.errors import InputError
from lcdd.models import shards
from lcdd.models.probe import check_close, logits_of
from lcdd.models.sites import probe_ids, sites_of

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MORE_THAN_PRODUCTS = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "target_parameters", "layer_replication",
    "trainable_token_indices", "alora_invocation_tokens", "kasa_config", "monteclora_config", "velora_config",
    "arrow_config",
)  # fmt: skip
"""Settings of a LoRA that does something else, too."""
NEEDS_PEFT = "expected PEFT to be installed (pip install lcdd[peft])"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter's directory and what its adapter_config.json says."""

    folder: Path
    settings: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """PEFT's name for what it is: LORA, PROMPT_TUNING, ..."""
        return str(self.settings.get("peft_type"))

    @property
    def base(self) -> str:
        """Directory or hub name of the model that it was trained on."""
        return str(self.settings["base_model_name_or_path"])


def find_adapter(path: str | Path) -> Adapter | None:
    """The adapter in a directory or under a hub name; None if there is none.

    Raises:
        InputError: it cannot be read, names no base, or lies beside a whole model's weights.
    """
    try:
        file = find_adapter_config_file(str(path))
    except (OSError, ValueError):  # a file, or nothing that the hub could have: whoever reads its config says so
        file = None
    if file is None:
        return None
    where = f"{str(path)!r}: {SETTINGS}"
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"model: expected an adapter in {where}: is no JSON ({error})") from error
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not isinstance(base, str) or not base:
        raise InputError(
            f"model: expected base_model_name_or_path in {where}, the directory or hub name of the model that the "
            f"adapter was trained on, got {base!r}"
        )
    folder = Path(file).parent
    if whole := next(folder.glob("model*.safetensors"), None):
        raise InputError(f"model: expected an adapter or a whole model in {str(path)!r}, got both: {whole.name}")
    return Adapter(folder=folder, settings=settings)


# ---------------------------------------------------------------- an adapter becomes weights


@torch.no_grad()
def merge(model: PreTrainedModel, adapter: Adapter, *, name: str) -> PreTrainedModel:
    """Make an adapter part of the weights of `model`, its base, in place; name: of the adapter, for messages.

    Raises:
        InputError: PEFT is not installed; the adapter's kind cannot be merged, its weights are not all there or of
            another model, or the merged model does not compute what the adapter does.
    """
    peft = needed_peft(f"to merge the adapter {name!r}")
    if not (adapter.folder / WEIGHTS).is_file() and not _fetched(name):
        raise InputError(f"model: expected {WEIGHTS} in the adapter {name!r}, found none; no other format is read")
    if adapter.settings.get("layer_replication"):
        raise InputError(f"model: expected an adapter with its base's layers, {name!r} replicates some of them")
    before = {key: (p.shape, p.dtype, p.requires_grad) for key, p in model.named_parameters()}
    ids, sharded = probe_ids(model), shards.holds_shards(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT warns of is checked below
        wrapped = peft.PeftModel.from_pretrained(model, str(adapter.folder))
        if not hasattr(wrapped.base_model, "merge_and_unload"):
            raise InputError(
                f"model: expected an adapter that can become part of the weights, got {name!r} of type {adapter.kind}"
                + (", which is put in front of a prompt" if wrapped.active_peft_config.is_prompt_learning else "")
            )
        loaded = wrapped.load_adapter(str(adapter.folder), adapter_name=wrapped.active_adapter)
        _check_keys(loaded, wrapped.base_model.prefix, name)
        expected = logits_of(wrapped, ids)
        merged: PreTrainedModel
        if sharded:
            shards.reshard(model)
            _add_rows(wrapped.base_model)
            merged = wrapped.base_model.unload()
        else:
            merged = wrapped.base_model.merge_and_unload(safe_merge=True)
    after = dict(merged.named_parameters())
    for key in sorted(before.keys() ^ after.keys()) or [k for k, p in after.items() if p.shape != before[k][0]]:
        raise InputError(
            f"model: expected an adapter that keeps its base's parameters, {name!r} adds, drops or resizes {key} (an "
            "own head where the base's is its embeddings, or rows for new tokens)"
        )
    for key, parameter in after.items():
        if not sharded:
            parameter.data = parameter.data.to(before[key][1])
        parameter.requires_grad_(before[key][2])
    check_close(f"merged logits of {name!r}", logits_of(merged, ids), expected, than="the adapter's")
    return merged


def can_merge_rows(adapter: Adapter) -> bool:
    """Whether all that an adapter does is to add products to weights, which each rank can do to its rows alone."""
    settings = adapter.settings
    kept = settings.get("init_lora_weights") in (True, False, None, "gaussian")  # the others rewrite the base's weights
    others = any(settings.get(name) for name in MORE_THAN_PRODUCTS) or settings.get("bias", "none") != "none"
    return adapter.kind == "LORA" and kept and not others


def _add_rows(tuner: nn.Module) -> None:
    """Add every layer's product to this rank's rows of its weight, in PEFT's arithmetic."""
    for layer in tuner.modules():
        for name in getattr(layer, "active_adapters", ()) if hasattr(layer, "get_delta_weight") else ():
            weight: Any = layer.get_base_layer().weight  # type: ignore[operator]
            delta = layer.get_delta_weight(name)  # type: ignore[operator]
            rows, first = shards.local(weight.detach()), shards.row_offset(weight)
            rows += delta[first : first + len(rows)].to(rows.dtype)


def _check_keys(loaded: Any, prefix: str, name: str) -> None:
    """Raise InputError unless an adapter's file has a weight for each of its layers, and no others."""
    missing = [key for key in loaded.missing_keys if prefix in key]
    for what, keys in (("has no place for", loaded.unexpected_keys), ("lacks", missing)):
        if keys:
            of_whom = "its base" if what == "has no place for" else "its file"
            raise InputError(
                f"model: expected weights in the adapter {name!r} that fit its base and its {SETTINGS}, {of_whom} "
                f"{what} {len(keys)} of them: {', '.join(sorted(keys)[:3])}"
            )


def _fetched(name: str) -> bool:
    """Whether the weights of an adapter on the hub are in the cache now, beside its settings."""
    if Path(name).is_dir():
        return False
    return cached_file(name, WEIGHTS, _raise_exceptions_for_missing_entries=False) is not None


def needed_peft(purpose: str) -> Any:
    """The package PEFT; InputError, with what it is needed for, where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise InputError(f"peft: {NEEDS_PEFT} {purpose}, got {error}") from error
    return peft


# ---------------------------------------------------------------- low-rank layers in training


class LoRALayers:
    """Low-rank layers on a model's masked layers, W + scale · B A, of which A and B train; the model keeps its class.

    Args:
        rank, alpha, dropout: as PEFT's r, lora_alpha and lora_dropout; scale is alpha / rank.
        targets: names of layers, or ends of such ("q_proj"); none: every masked layer. Experts that share one
            parameter are no layers.
        seed: of A; B is zero, so that the model is the base.

    Raises:
        InputError: PEFT is not installed, or a target is no masked layer.
    """

    def __init__(
        self, model: PreTrainedModel, *, rank: int, alpha: float, dropout: float, targets: Sequence[str], seed: int
    ) -> None:
        peft = needed_peft("for --use_peft")
        names = _chosen(model, targets)
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM",
            fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._tuner = peft.tuners.lora.LoraModel(model, {"default": config}, "default")
        self.model = model
        self.layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def delta_norm(self) -> float:
        """L2 norm of all weight changes together, from products of r rows and columns alone."""
        squared = 0.0
        for layer in self.layers.values():
            a, b = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
            squared += layer.scaling["default"] ** 2 * float(((b.T @ b) * (a @ a.T)).sum())
        return math.sqrt(max(squared, 0.0))

    @torch.no_grad()
    def scale_(self, factor: float) -> None:
        """Multiply every weight change by `factor`."""
        for layer in self.layers.values():
            layer.lora_B["default"].weight.mul_(factor)

    @torch.no_grad()
    def merged_state(self) -> dict[str, Tensor]:
        """The state dict that the model will have after `merge`; the model goes on unchanged."""
        state = {}
        for key, value in self.model.state_dict().items():
            if ".lora_" in key:
                continue
            path, _, last = key.rpartition(".base_layer.")
            if path in self.layers and last == "weight":
                value = value + self.layers[path].get_delta_weight("default")
            state[f"{path}.{last}" if path else key] = value
        return state

    def merge(self) -> None:
        """Make the products part of the weights; the model's layers are ordinary ones again."""
        self._tuner.merge_and_unload(safe_merge=True)


def _chosen(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Names of the masked layers that `targets` name."""
    modules = dict(model.named_modules())
    names = [site.name for site in sites_of(model) if isinstance(modules.get(site.name), nn.Linear | Conv1D)]
    if not names:
        raise InputError("use_peft: expected a model with masked linear layers, got one whose are experts alone")
    chosen = set()
    for target in targets:
        found = [name for name in names if name == target or name.endswith(f".{target}")]
        if not found:
            ends = sorted({name.rpartition(".")[2] for name in names})
            raise InputError(f"lora_target_modules: expected masked layers, some of {', '.join(ends)}, got {target!r}")
        chosen.update(found)
    return [name for name in names if not targets or name in chosen]
