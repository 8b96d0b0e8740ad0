"""Which ways of spreading a model over devices LCDD can train under, and which are refused, by name.

DDP and FSDP2 keep a matrix's rows together, and every rank has its own texts. Under tensor parallelism ranks share
their texts and split matrices by columns too; in a pipeline a rank does not have all layers. Neither is silently wrong
here: `check_engine` says so before anything is written. A folded carrier is an ordinary checkpoint and runs under both.
"""

from typing import Any

from transformers import PreTrainedModel

from lcdd.errors import InputError

INSTEAD = "for training use DDP or fully_shard; a folded carrier (`Carrier.fold`, `--save_folded`) runs under it"


def check_engine(name: str, model: PreTrainedModel) -> None:
    """Raise InputError, naming the engine, if a model's layers or matrices are split by one that LCDD cannot follow."""
    if engine := _unknown(model):
        raise InputError(f"{name}: expected a whole model or one sharded by fully_shard, got {engine}; {INSTEAD}")


def check_parallelism(name: str, settings: Any) -> None:
    """The same of accelerate's `ParallelismConfig` (None: nothing is split)."""
    kinds = {"tp": "tensor", "cp": "context", "sp": "sequence"}
    for short, kind in kinds.items():
        size = getattr(settings, f"{short}_size", 1) or 1
        if size > 1:
            raise InputError(
                f"{name}: expected none but data parallelism, got {kind} parallelism ({short}_size {size}); {INSTEAD}"
            )


def _unknown(model: PreTrainedModel) -> str | None:
    """What splits the model that training cannot follow, in words."""
    mesh: Any = getattr(model, "_device_mesh", None)
    sizes = dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)) if mesh is not None and mesh.mesh_dim_names else {}
    tensor = max(int(sizes.get("tp", 1)), int(getattr(model, "_tp_size", None) or 1))
    if tensor > 1:
        return f"tensor parallelism (transformers' tp_plan over {tensor} ranks)"
    if (stages := int(sizes.get("pp", 1))) > 1:
        return f"pipeline parallelism (over {stages} ranks)"
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(places) > 1:
        return f"layers on several devices (device_map: {', '.join(sorted(places))})"
    return None
