"""The stages on real checkpoint directories, as plain functions: sft, train, erase, evaluate, generate, run.

Every stage checks its whole input first (paths, shapes, data, lengths), writes into a new directory, and returns
what it wrote and what to do next; the command line only prints that.
"""

import dataclasses
import gc
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lcdd.carrier import Carrier
from lcdd.checkpoint import require_new_directory, write_directory
from lcdd.config import (
    DataConfig,
    EraserConfig,
    EvalConfig,
    GenerateConfig,
    LCDDConfig,
    PipelineConfig,
    ReportConfig,
    SFTConfig,
)
from lcdd.data import Example, prompt_string
from lcdd.eraser import SFTEraser
from lcdd.evaluate import ModelState, evaluate, gate_summary
from lcdd.models import PreTrainedModel, check_same_architecture, load_model, load_shape, load_tokenizer
from lcdd.optimizer import LCDDOptimizer
from lcdd.prepare import Prepared, off_topic_ids, prepare, prompt_ids, training_items
from lcdd.report import read_report, write_report
from lcdd.runlog import RunLog, read_log
from lcdd.stage import (
    Say,
    StageResult,
    check_shapes,
    load_weights,
    resolve_device,
    save_checkpoint,
    versions,
    write_summary,
)
from lcdd.tables import reversal_table
from lcdd.trainer import TrainResult, train_lcdd, train_sft
from lcdd.trigger import Trigger
from lcdd.trigger import generate as generate_answers

# ---------------------------------------------------------------- stages


def sft(
    config: SFTConfig, data: DataConfig, *, prepared: Prepared | None = None, log_dir: Path | None = None,
    say: Say = print,
) -> StageResult:  # fmt: skip
    """Fine-tune a base on a behaviour; writes `model/`, an ordinary checkpoint in the base's dtype."""
    config.require("model_name_or_path", "output_dir")
    output = require_new_directory(str(config.output_dir))
    load_shape(str(config.model_name_or_path))
    prepared = prepared or prepare(data, str(config.model_name_or_path))
    train_items, validation_items = training_items(prepared, config, say=say)
    model = load_model(str(config.model_name_or_path), device=resolve_device(config.device))
    stored = model.dtype
    if stored in (torch.bfloat16, torch.float16):
        model.float()  # small updates vanish in 16-bit weights

    def save(step: int) -> None:
        weights = {name: value.to(stored) for name, value in model.state_dict().items()}
        with write_directory(output / f"checkpoint-{step}") as folder:
            model.save_pretrained(folder, state_dict=weights)
            prepared.tokenizer.save_pretrained(folder)

    with RunLog(log_dir or output, stage="sft", report_to=config.report_to) as log:
        result = train_sft(
            model,
            train_items,
            validation_items,
            config,
            pad_token_id=prepared.tokenizer.pad_token_id,
            log=log,
            save=save,
        )
    model.to(dtype=stored)  # type: ignore[call-arg]  # transformers wraps nn.Module.to
    checkpoint = save_checkpoint(model, prepared.tokenizer, output / "model")
    summary = write_summary(output, "sft", config, data, result=dataclasses.asdict(result))
    say(f"SFT: held-out loss {result.loss_start:.4f} -> {result.loss_end:.4f} nats a token in {result.steps} steps")
    return StageResult(
        written=(checkpoint, summary),
        next_step=f"lcdd train --model_name_or_path {checkpoint} "
        f"--base_model_name_or_path {config.model_name_or_path} --output_dir ... (and the same data settings)",
    )


def train(
    config: LCDDConfig, data: DataConfig, *, prepared: Prepared | None = None, log_dir: Path | None = None,
    say: Say = print,
) -> StageResult:  # fmt: skip
    """LCDD on an SFT checkpoint; writes `carrier/` (and with --save_folded `model/`)."""
    config.require("model_name_or_path", "base_model_name_or_path", "output_dir")
    output = require_new_directory(str(config.output_dir))
    check_shapes(config.base_model_name_or_path, config.model_name_or_path, ("base", "sft"))
    prepared = prepared or prepare(data, str(config.model_name_or_path))
    train_items, validation_items = training_items(prepared, config, say=say)
    initial = Carrier.from_pretrained(config.initial_carrier).gate_logits if config.initial_carrier else None
    base, model = load_weights(config.base_model_name_or_path, config), load_weights(config.model_name_or_path, config)
    check_same_architecture(base, model)
    teacher = load_weights(config.model_name_or_path, config) if config.loss == "kl" else None

    def save(step: int, optimizer: LCDDOptimizer) -> None:
        optimizer.carrier().with_tokenizer(prepared.tokenizer).save_pretrained(output / f"checkpoint-{step}")

    with RunLog(log_dir or output, stage="lcdd", report_to=config.report_to) as log:
        optimizer, result = train_lcdd(
            model,
            base,
            train_items,
            validation_items,
            config,
            pad_token_id=prepared.tokenizer.pad_token_id,
            log=log,
            teacher=teacher,
            initial_logits=initial,
            save=save,
        )
    carrier = optimizer.carrier().with_tokenizer(prepared.tokenizer)
    carrier.save_pretrained(output / "carrier")
    written = [output / "carrier"]
    if config.save_folded:
        written.append(save_checkpoint(optimizer.fold(), prepared.tokenizer, output / "model"))
    written.append(
        write_summary(output, "lcdd", config, data, result=dataclasses.asdict(result), carrier=carrier.summary())
    )
    _say_carrier(carrier, result, say)
    return StageResult(
        written=tuple(written),
        next_step=f"lcdd erase --base_model_name_or_path {config.base_model_name_or_path} "
        f"--carrier {output / 'carrier'} --output_dir ... (and the same data settings)",
    )


def _say_carrier(carrier: Carrier, result: TrainResult, say: Say) -> None:
    say(
        f"LCDD: {carrier.n_open} of {carrier.layout.n_gates} gates open (sparsity "
        f"{carrier.sparsity()['overall']:.3f}); held-out loss of base {result.loss_base:.4f}, SFT "
        f"{result.loss_start:.4f}, carrier {result.loss_end:.4f} nats a token"
    )
    for finding in result.findings:
        say(f"WARNING {finding.message}")


def erase(
    config: EraserConfig, data: DataConfig, *, prepared: Prepared | None = None, log_dir: Path | None = None,
    stage: str = "eraser", say: Say = print,
) -> StageResult:  # fmt: skip
    """Learn the trigger that gives the base's answers back; writes `trigger/`, a PEFT prompt-tuning adapter."""
    config.require("base_model_name_or_path", "carrier", "output_dir")
    output = require_new_directory(str(config.output_dir))
    load_shape(str(config.base_model_name_or_path))
    carrier = Carrier.from_pretrained(str(config.carrier))
    prepared = prepared or prepare(data, str(config.base_model_name_or_path))
    carrier.check_tokenizer(prepared.tokenizer)
    prompts, held_out = _eraser_prompts(prepared, config)
    model = load_weights(config.base_model_name_or_path, config)
    carrier.check_base(model)
    patch = carrier
    if config.model_name_or_path is not None:
        patch = Carrier.from_models(model, load_weights(config.model_name_or_path, config))
    channels = carrier.channels(config.channel_kind, seed=config.seed)
    with RunLog(log_dir or output, stage=stage) as log:
        eraser = SFTEraser(model, patch, prepared.tokenizer, config, channels)
        trigger = eraser.fit(prompts, held_out, log=log.write, progress=True, checkpoints=output)
    trigger.save_pretrained(output / "trigger")
    summary = write_summary(output, stage, config, data, validation=eraser.history.validation)
    losses = [line["loss"] for line in eraser.history.validation]
    say(f"Trigger ({stage}): held-out loss {losses[0]:.4f} -> {min(losses):.4f} in {config.max_steps} steps")
    return StageResult(
        written=(output / "trigger", summary),
        next_step=f"lcdd eval --base_model_name_or_path {config.base_model_name_or_path} --model_name_or_path "
        f"(the SFT checkpoint) --carrier {config.carrier} --trigger {output / 'trigger'} --output_dir ...",
    )


def _eraser_prompts(prepared: Prepared, config: EraserConfig) -> tuple[list[list[int]], list[list[int]]]:
    longest = config.max_prompt_length
    return (
        prompt_ids(prepared, "train", limit=config.train_prompts, max_length=longest),
        prompt_ids(prepared, "validation", limit=config.validation_prompts, max_length=longest),
    )


def eval_(
    config: EvalConfig, data: DataConfig, *, prepared: Prepared | None = None, say: Say = print,
    context: dict[str, Any] | None = None,
) -> StageResult:  # fmt: skip
    """The reversal table on held-out prompts; writes report.json and report.html.

    Args:
        context: a pipeline's `config` and `timings`; the output directory may then hold the stages' own.
    """
    config.require("base_model_name_or_path", "model_name_or_path", "carrier", "output_dir")
    output = Path(str(config.output_dir)) if context else require_new_directory(str(config.output_dir))
    check_shapes(config.base_model_name_or_path, config.model_name_or_path, ("base", "sft"))
    carrier = Carrier.from_pretrained(str(config.carrier))
    prepared = prepared or prepare(data, str(config.base_model_name_or_path))
    carrier.check_tokenizer(prepared.tokenizer)
    prompts, others = (
        ids(prepared, config.split, limit=config.num_prompts, max_length=config.max_prompt_length)
        for ids in (prompt_ids, off_topic_ids)
    )
    paths = {"carrier": config.trigger, "sft": config.sft_trigger, "matched_norm": config.matched_norm_trigger}
    triggers = {name: Trigger.from_pretrained(path) for name, path in paths.items() if path}
    start = time.perf_counter()
    base = load_weights(config.base_model_name_or_path, config)
    carrier.check_base(base)
    patches = {"carrier": carrier, **_dense_patches(base, config)}
    states = _states(base, patches, triggers, config, special=prepared.tokenizer.all_special_ids)
    settings: dict[str, Any] = {
        "matches": prepared.behavior.matches,
        "max_new_tokens": config.max_new_tokens,
        "batch_size": config.per_device_eval_batch_size,
        "kl_prompts": config.kl_prompts,
        "progress": True,
    }
    found = evaluate(base, prepared.tokenizer, prompts, states, **settings)
    if others:
        found["off_topic"] = evaluate(base, prepared.tokenizer, others, states, **settings)["models"]
    context = context or {"config": {"eval": config.to_dict(), "data": data.to_dict()}, "timings": {}}
    content = {
        "behavior": prepared.behavior.name,
        "seed": config.seed,
        "split": config.split,
        "versions": versions(),
        "fingerprints": {"base": carrier.base_fingerprint, **carrier.tokenizer},
        "sparsity": carrier.sparsity(),
        "sparsity_by_layer": carrier.sparsity_by_layer(),
        "gates": gate_summary(carrier),
        "findings": _findings(str(config.carrier)),
        "curves": _curves(config),
        **found,
        **context,
        "timings": {**context["timings"], "eval": round(time.perf_counter() - start, 2)},
    }
    write_report(output, content)
    say(reversal_table(content))
    return StageResult(
        written=(output / "report.json", output / "report.html"), next_step=f"open {output / 'report.html'}"
    )


def _dense_patches(base: PreTrainedModel, config: EvalConfig) -> dict[str, Carrier]:
    paths = {"sft": config.model_name_or_path, "matched_norm": config.matched_norm_model_name_or_path}
    return {name: Carrier.from_models(base, load_weights(path, config)) for name, path in paths.items() if path}


def _states(
    base: PreTrainedModel,
    patches: dict[str, Carrier],
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


def _curves(config: EvalConfig) -> list[dict[str, Any]]:
    """The logs that lie beside what is evaluated (or, in a pipeline, in its directory)."""
    paths = (
        config.model_name_or_path, config.carrier, config.trigger, config.sft_trigger, config.matched_norm_trigger
    )  # fmt: skip
    folders = [Path(str(config.output_dir)), *(Path(path).parent for path in paths if path)]
    logs = dict.fromkeys(folder / "log.jsonl" for folder in folders)
    return [line for log in logs if log.is_file() for line in read_log(log)]


def _findings(carrier: str) -> list[dict[str, Any]]:
    """What `train` found wrong with the carrier, from the summary beside it."""
    path = Path(carrier).parent / "summary.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content.get("result", {}).get("findings", [])


def generate(config: GenerateConfig, *, say: Say = print) -> StageResult:
    """Answer prompts by a model, with a carrier applied and a trigger prepended if given."""
    config.require("model_name_or_path", "prompt")
    load_shape(str(config.model_name_or_path))
    tokenizer = load_tokenizer(str(config.model_name_or_path))
    carrier = Carrier.from_pretrained(config.carrier) if config.carrier else None
    trigger = Trigger.from_pretrained(config.trigger) if config.trigger else None
    model = load_weights(config.model_name_or_path, config)
    if carrier is not None:
        carrier.check_tokenizer(tokenizer)
        carrier.apply(model)
    examples = [Example(messages=({"role": "user", "content": text},), completion="") for text in config.prompt]
    answers = generate_answers(
        model,
        tokenizer,
        [prompt_string(tokenizer, example) for example in examples],
        trigger=trigger,
        max_new_tokens=config.max_new_tokens,
    )
    for text, answer in zip(config.prompt, answers, strict=True):
        say(f"> {text}\n{answer}\n")
    return StageResult(written=(), next_step="", texts=tuple(answers))


def report(config: ReportConfig, *, say: Say = print) -> StageResult:
    """Render report.html again from report.json."""
    config.require("output_dir")
    output = Path(str(config.output_dir))
    content = read_report(output)
    write_report(output, content)
    say(reversal_table(content))
    return StageResult(written=(output / "report.html",), next_step=f"open {output / 'report.html'}")


# ---------------------------------------------------------------- the whole


def run(config: PipelineConfig, *, say: Say = print) -> StageResult:
    """SFT, LCDD, eraser, controls and evaluation in one directory; everything is checked before the first stage."""
    config.require("model_name_or_path", "output_dir")
    base, output = str(config.model_name_or_path), require_new_directory(str(config.output_dir))
    if config.sft_model_name_or_path is not None:
        check_shapes(base, config.sft_model_name_or_path, ("base", "sft"))
    load_shape(base)
    data = config.data
    prepared = prepare(data, base)
    for stage in (config.sft, config.train):
        training_items(prepared, stage, say=lambda _: None)
    _eraser_prompts(prepared, config.erase)
    for ids in (prompt_ids, off_topic_ids):
        ids(prepared, config.eval.split, limit=config.eval.num_prompts, max_length=config.eval.max_prompt_length)
    timings: dict[str, float] = {}
    common: dict[str, Any] = {"prepared": prepared, "say": say}

    def timed(name: str, call: Callable[..., StageResult], settings: Any, **more: Any) -> StageResult:
        say(f"\n== {name}")
        start = time.perf_counter()
        result = call(replace(settings, output_dir=str(output / name)), data, log_dir=output, **common, **more)
        timings[name] = round(time.perf_counter() - start, 2)
        gc.collect()
        return result

    sft_model = config.sft_model_name_or_path
    if sft_model is None:
        timed("sft", sft, replace(config.sft, model_name_or_path=base))
        sft_model = str(output / "sft" / "model")
    timed("train", train, replace(config.train, model_name_or_path=sft_model, base_model_name_or_path=base))
    carrier = str(output / "train" / "carrier")
    erase_settings = replace(config.erase, base_model_name_or_path=base, carrier=carrier)
    timed("erase", erase, erase_settings)
    controls: dict[str, Any] = {}
    if config.controls:
        timed("erase_sft", erase, replace(erase_settings, model_name_or_path=sft_model), stage="eraser_sft")
        norm = Carrier.from_pretrained(carrier).delta_norm()
        if norm > 0:
            timed("matched_norm", sft, replace(config.sft, model_name_or_path=base, max_delta_norm=norm))
            matched = str(output / "matched_norm" / "model")
            settings = replace(erase_settings, model_name_or_path=matched)
            timed("erase_matched_norm", erase, settings, stage="eraser_matched_norm")
            controls = {
                "matched_norm_model_name_or_path": matched,
                "matched_norm_trigger": str(output / "erase_matched_norm" / "trigger"),
            }
        controls["sft_trigger"] = str(output / "erase_sft" / "trigger")
    say("\n== eval")
    final = replace(
        config.eval,
        base_model_name_or_path=base,
        model_name_or_path=sft_model,
        carrier=carrier,
        trigger=str(output / "erase" / "trigger"),
        output_dir=str(output),
        **controls,
    )
    result = eval_(final, data, context={"config": config.to_dict(), "timings": timings}, **common)
    return replace(result, written=(Path(carrier), output / "erase" / "trigger", output / "log.jsonl", *result.written))
