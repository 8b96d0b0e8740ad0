"""What the project knows about transformers models: loading, sites, gate geometry, shards and ranks."""

from transformers.cache_utils import Cache

from lcdd.models.adapters import LoRALayers, find_adapter
from lcdd.models.architecture import Architecture, Layer, Masked
from lcdd.models.blocks import Sharding
from lcdd.models.costs import (
    Parametrization,
    adamw_bytes,
    grad_stats_bytes,
    layer_activations,
    loss_bytes,
    refresh_bytes,
    stack_activations,
    step_flops,
)
from lcdd.models.engines import check_engine, check_parallelism
from lcdd.models.foreign import in_words, take_from_base_, unmasked_changes
from lcdd.models.head import Head, head_of
from lcdd.models.layout import GROUPS, GateLayout, Matrix, Run, Weave, base_group
from lcdd.models.loading import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    hide_progress_bars,
    hub_commit,
    load_model,
    load_model_type,
    load_tokenizer,
    new_model,
    save_model,
    skeleton,
    skeleton_of,
)
from lcdd.models.packed_rows import (
    PackedRows,
    can_share_prefix,
    common_prefix,
    packed_attention_in,
    packs,
    why_not_packed,
)
from lcdd.models.parallel import Replicated, process_group, share
from lcdd.models.precision import computes_in, warn_of_emulation
from lcdd.models.probe import Ends, probe
from lcdd.models.saving import save_weights
from lcdd.models.shards import full, local
from lcdd.models.sites import (
    ModelShape,
    Site,
    backbone,
    check_same_architecture,
    decoder_layers,
    feed_forwards,
    head_weight,
    input_embeddings,
    layout_of,
    shape_of,
    sites_of,
    structure_of,
    unmasked_parameters,
)
from lcdd.models.vocabulary import agree_on_end, check_rows, rows_never_drawn, token_rows

__all__ = [
    "GROUPS",
    "Architecture",
    "Cache",
    "Ends",
    "GateLayout",
    "Head",
    "Layer",
    "LoRALayers",
    "Masked",
    "Matrix",
    "ModelShape",
    "PackedRows",
    "Parametrization",
    "PreTrainedModel",
    "PreTrainedTokenizerBase",
    "Replicated",
    "Run",
    "Sharding",
    "Site",
    "Weave",
    "adamw_bytes",
    "agree_on_end",
    "backbone",
    "base_group",
    "can_share_prefix",
    "check_engine",
    "check_parallelism",
    "check_rows",
    "check_same_architecture",
    "common_prefix",
    "computes_in",
    "decoder_layers",
    "feed_forwards",
    "find_adapter",
    "full",
    "grad_stats_bytes",
    "head_of",
    "head_weight",
    "hide_progress_bars",
    "hub_commit",
    "in_words",
    "input_embeddings",
    "layer_activations",
    "layout_of",
    "load_model",
    "load_model_type",
    "load_tokenizer",
    "local",
    "loss_bytes",
    "new_model",
    "packed_attention_in",
    "packs",
    "probe",
    "process_group",
    "refresh_bytes",
    "rows_never_drawn",
    "save_model",
    "save_weights",
    "shape_of",
    "share",
    "sites_of",
    "skeleton",
    "skeleton_of",
    "stack_activations",
    "step_flops",
    "structure_of",
    "take_from_base_",
    "token_rows",
    "unmasked_changes",
    "unmasked_parameters",
    "warn_of_emulation",
    "why_not_packed",
]
