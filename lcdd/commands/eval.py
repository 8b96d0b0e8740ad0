"""The evaluation stage on real checkpoints: reversal table, perplexities, utility, and the report made of them."""

import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from lcdd.carrier import Carrier
from lcdd.checkpoint import read_log, require_new_directory, versions
from lcdd.commands.belonging import load_base
from lcdd.commands.stage import Say, StageResult, check_shapes, load_weights
from lcdd.config import DataConfig, EvalConfig
from lcdd.data import Prepared, off_topic_ids, prepare, prompt_ids
from lcdd.eraser import Trigger
from lcdd.errors import InputError
from lcdd.evaluate import (
    Harness,
    ModelState,
    PatchSource,
    evaluate,
    gate_summary,
    parse_tasks,
    patched_states,
    perplexity,
    read_texts,
    utility,
    windows,
)
from lcdd.models import PreTrainedModel, PreTrainedTokenizerBase
from lcdd.report import reversal_table, write_report

UTILITY_STATES = ("base", "base+trigger", "sft", "carrier", "carrier+trigger")
"""States whose utility is measured: each with and without the carrier's trigger where that means anything."""


def eval_(
    config: EvalConfig, data: DataConfig, *, prepared: Prepared | None = None, say: Say = print,
    context: dict[str, Any] | None = None,
) -> StageResult:  # fmt: skip
    """The reversal table on held-out prompts; writes report.json and report.html.

    Args:
        context: a pipeline's `config` and `timings`; the output directory may then hold the stages' own.
    """
    config.require("base_model_name_or_path", "sft_model_name_or_path", "carrier", "output_dir")
    output = Path(str(config.output_dir)) if context else require_new_directory(str(config.output_dir))
    check_shapes(config.base_model_name_or_path, config.sft_model_name_or_path, ("base", "sft"))
    carrier = Carrier.from_pretrained(str(config.carrier))
    prepared = prepared or prepare(data, str(config.base_model_name_or_path))
    prompts, others = (
        ids(prepared, config.split, limit=config.num_prompts, max_length=config.max_prompt_length)
        for ids in (prompt_ids, off_topic_ids)
    )
    text, harness = text_and_harness(config, prepared)
    paths = {"carrier": config.trigger, "sft": config.sft_trigger, "matched_norm": config.matched_norm_trigger}
    triggers = {name: Trigger.from_pretrained(path) for name, path in paths.items() if path}
    findings = findings_of(str(config.carrier))
    start = time.perf_counter()
    base, carrier, overrides = load_base(
        config.base_model_name_or_path, config, carrier, prepared.tokenizer, triggers.values()
    )
    patches: dict[str, PatchSource] = {"carrier": carrier, **dense_patches(base, config)}
    states = _states(base, patches, triggers, config, special=prepared.tokenizer.all_special_ids)
    settings: dict[str, Any] = {
        "matches": prepared.behavior.matches,
        "measures": prepared.behavior.measures,
        "max_new_tokens": config.max_new_tokens,
        "batch_size": config.per_device_eval_batch_size,
        "kl_prompts": config.kl_prompts,
        "progress": True,
    }
    found = evaluate(base, prepared.tokenizer, prompts, states, **settings)
    if others:
        found["off_topic"] = evaluate(base, prepared.tokenizer, others, states, **settings)["models"]
    found |= _text_and_tasks(base, prepared.tokenizer, states, text, harness, config)
    context = context or {"config": {"eval": config.to_dict(), "data": data.to_dict()}, "timings": {}}
    content = {
        "behavior": prepared.behavior.name,
        "seed": config.seed,
        "split": config.split,
        "versions": versions(),
        "fingerprints": {"base": carrier.base_fingerprint, **carrier.tokenizer},
        "overrides": overrides,
        "sparsity": carrier.sparsity(),
        "sparsity_by_layer": carrier.sparsity_by_layer(),
        "gates": gate_summary(carrier),
        "findings": findings,
        "curves": curves_of(config),
        **found,
        **context,
        "timings": {**context["timings"], "eval": round(time.perf_counter() - start, 2)},
    }
    write_report(output, content)
    say(reversal_table(content))
    return StageResult(
        written=(output / "report.json", output / "report.html"), next_step=f"open {output / 'report.html'}"
    )


def text_and_harness(config: EvalConfig, prepared: Prepared) -> tuple[list[list[int]], Harness | None]:
    """The held-out text in windows of tokens (none: empty), and the tasks' harness (None: no tasks).

    Raises:
        InputError: the text cannot be read, a task is unknown, or lm-evaluation-harness is not installed.
    """
    text: list[list[int]] = []
    if config.perplexity_text:
        text = windows(prepared.tokenizer, read_texts(config.perplexity_text), length=config.perplexity_tokens)
    return text, Harness(parse_tasks(config.tasks)) if config.tasks else None


def dense_patches(base: PreTrainedModel, config: Any) -> dict[str, PatchSource]:
    """The SFT model's patch and the matched-norm one's, each made when it is needed: they do not fit side by side."""
    paths = {"sft": config.sft_model_name_or_path, "matched_norm": config.matched_norm_model_name_or_path}

    def source(path: str) -> PatchSource:
        return lambda: Carrier.from_models(base, load_weights(path, config))

    return {name: source(path) for name, path in paths.items() if path}


def _text_and_tasks(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    states: dict[str, ModelState],
    text: list[list[int]],
    harness: Harness | None,
    config: EvalConfig,
) -> dict[str, Any]:
    """Perplexity of every state with at most one trigger, and utility of `UTILITY_STATES`, where they are asked for."""
    found: dict[str, Any] = {}
    single = {name: state for name, state in states.items() if len(state.triggers) < 2}
    if not text and harness is None:
        return found
    with closing(patched_states(base, single)) as runs:
        for name, _ in runs:
            trigger = single[name].triggers[0] if single[name].triggers else None
            size = config.per_device_eval_batch_size
            if text:
                row = perplexity(base, text, trigger=trigger, batch_size=size)
                found.setdefault("perplexity", {})[name] = row
            if harness is not None and name in UTILITY_STATES:
                found.setdefault("utility", {})[name] = utility(
                    base, tokenizer, config.tasks, trigger=trigger, batch_size=size, limit=config.tasks_limit,
                    runner=harness,
                )  # fmt: skip
    return found


def _states(
    base: PreTrainedModel,
    patches: dict[str, PatchSource],
    triggers: dict[str, Trigger],
    config: EvalConfig,
    *,
    special: list[int],
) -> dict[str, ModelState]:
    """The rows of the reversal table that the given patches and triggers allow."""
    states = {"base": ModelState()}
    for name in ("sft", "carrier", "matched_norm"):
        if name in patches:
            states[name] = ModelState(patch=patches[name])
    for name, trigger in triggers.items():
        states[f"{name}+trigger"] = ModelState(patch=patches[name], triggers=(trigger,))
    if "carrier" in triggers:
        seeds = range(config.seed, config.seed + config.random_prefixes)
        junk = tuple(Trigger.random_like(base, triggers["carrier"], seed=seed, skip=special) for seed in seeds)
        states["carrier+random_prefix"] = ModelState(patch=patches["carrier"], triggers=junk)
        states["base+random_prefix"] = ModelState(triggers=junk)
        states["base+trigger"] = ModelState(triggers=(triggers["carrier"],))
    return states


def curves_of(config: Any) -> list[dict[str, Any]]:
    """The logs that lie beside what is evaluated (or, in a pipeline, in its directory)."""
    paths = (
        config.sft_model_name_or_path, config.carrier, config.trigger, config.sft_trigger, config.matched_norm_trigger
    )  # fmt: skip
    folders = [Path(str(config.output_dir)), *(Path(path).parent for path in paths if path)]
    logs = dict.fromkeys(folder / "log.jsonl" for folder in folders)
    return [line for log in logs if log.is_file() for line in read_log(log)]


def findings_of(carrier: str) -> list[dict[str, Any]]:
    """What `train` found wrong with the carrier, from the summary beside it."""
    path = Path(carrier).parent / "summary.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(content, dict):
        raise InputError(f"carrier: expected a JSON object in {str(path)!r}, got {type(content).__name__}")
    return content.get("result", {}).get("findings", [])
