"""The evaluation stage on real checkpoints: reversal table, perplexities, utility, and the report made of them."""

import time
from contextlib import closing
from pathlib import Path
from typing import Any

from lcdd.carrier import Carrier
from lcdd.checkpoint import require_new_directory, versions
from lcdd.commands.belonging import load_base
from lcdd.commands.reporting import curves_of, dense_patches, findings_of, finished, given_triggers, used
from lcdd.commands.stage import Say, StageResult, _silent, check_shapes, sharding, tell
from lcdd.config import DataConfig, EvalConfig
from lcdd.data import DATE_KEY, Prepared, off_topic_ids, prepare, prompt_ids
from lcdd.errors import InputError
from lcdd.evaluate import (
    Harness,
    ModelState,
    describe,
    evaluate,
    parse_tasks,
    patched_states,
    perplexity,
    read_texts,
    reversal_states,
    utility,
    windows,
)
from lcdd.models import PreTrainedModel, PreTrainedTokenizerBase, process_group, rows_never_drawn, shards
from lcdd.report import assemble

UTILITY_STATES = ("base", "base+trigger", "sft", "carrier", "carrier+trigger")
"""States whose utility is measured: each with and without the carrier's trigger where that means anything."""


def eval_(
    config: EvalConfig, data: DataConfig, *, prepared: Prepared | None = None, say: Say = tell,
    context: dict[str, Any] | None = None,
) -> StageResult:  # fmt: skip
    """The reversal table on held-out prompts; writes report.json and report.html.

    Args:
        context: a pipeline's `config` and `timings`; the output directory may then hold the stages' own.
    """
    with process_group(config.device, timeout=config.ddp_timeout):
        return _eval(config, data, prepared, say if shards.rank() == 0 else _silent, context)


def _eval(
    config: EvalConfig, data: DataConfig, prepared: Prepared | None, say: Say, context: dict[str, Any] | None
) -> StageResult:  # fmt: skip
    config.require("base_model_name_or_path", "sft_model_name_or_path", "carrier", "output_dir")
    output = Path(str(config.output_dir)) if context else require_new_directory(str(config.output_dir))
    check_shapes(config.base_model_name_or_path, config.sft_model_name_or_path, ("base", "sft"))
    carrier = Carrier.from_pretrained(str(config.carrier))
    prepared = prepared or prepare(
        data, str(config.base_model_name_or_path), template_date=carrier.tokenizer.get(DATE_KEY)
    )
    prompts, others = (
        ids(prepared, config.split, limit=config.num_prompts, max_length=config.max_prompt_length)
        for ids in (prompt_ids, off_topic_ids)
    )
    if config.tasks and shards.world_size() > 1:
        raise InputError("tasks: expected none on several ranks: lm-evaluation-harness runs on one")
    shards.check_agreement(settings=config.lasting(), data=[prompts, others], versions=versions(), gates=carrier.gate)
    text, harness = text_and_harness(config, prepared)
    triggers = given_triggers(config)
    findings = findings_of(str(config.carrier))
    start = time.perf_counter()
    shard = sharding(config)
    base, carrier, overrides = load_base(
        config.base_model_name_or_path, config, carrier, prepared.tokenizer, triggers.values(), shard=shard
    )
    dense = dense_patches(base, config, overrides, shard=shard)
    states = reversal_states(
        base,
        {"sft": dense.pop("sft"), "carrier": carrier, **dense},
        triggers,
        seed=config.seed,
        draws=config.random_prefixes,
        special=rows_never_drawn(prepared.tokenizer, base),
    )
    found = _answers(base, prepared, prompts, others, states, config)
    found |= _text_and_tasks(base, prepared.tokenizer, states, text, harness, config)
    if shards.rank() > 0:
        return StageResult(written=(), next_step="")
    context = context or {"config": {"eval": config.to_dict(), "data": data.to_dict()}, "timings": {}}
    audited = {"audit": context["audit"]} if "audit" in context else {}
    content = assemble(
        describe(carrier),
        found | audited,
        behavior=prepared.behavior.name,
        seed=config.seed,
        split=config.split,
        config=context["config"],
        timings={**context["timings"], "eval": round(time.perf_counter() - start, 2)},
        findings=findings,
        overrides=overrides,
        curves=curves_of(config),
        use=used(config),
    )
    return finished(output, content, say)


def _answers(
    base: PreTrainedModel,
    prepared: Prepared,
    prompts: list[list[int]],
    others: list[list[int]],
    states: dict[str, ModelState],
    config: EvalConfig,
) -> dict[str, Any]:
    """The reversal table, and the same on prompts that the behaviour is not asked for on."""
    behavior = prepared.behavior
    settings: dict[str, Any] = {
        "matches": behavior.matches,
        "measures": behavior.measures,
        "max_new_tokens": config.max_new_tokens,
        "batch_size": config.per_device_eval_batch_size,
        "kl_prompts": config.kl_prompts,
        "progress": shards.rank() == 0,
        "over_ranks": True,
    }
    found = evaluate(base, prepared.tokenizer, prompts, states, **settings)
    if others:
        found["off_topic"] = evaluate(base, prepared.tokenizer, others, states, **settings)["models"]
    return found


def text_and_harness(config: EvalConfig, prepared: Prepared) -> tuple[list[list[int]], Harness | None]:
    """The held-out text in windows of tokens (none: empty), and the tasks' harness (None: no tasks).

    Raises:
        InputError: the text cannot be read, a task is unknown, or lm-evaluation-harness is not installed.
    """
    text: list[list[int]] = []
    if config.perplexity_text:
        text = windows(prepared.tokenizer, read_texts(config.perplexity_text), length=config.perplexity_tokens)
    return text, Harness(parse_tasks(config.tasks)) if config.tasks else None


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
