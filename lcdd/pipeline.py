"""The stages on real checkpoint directories, as plain functions: sft, train, erase, evaluate, generate, run.

Every stage checks its whole input first (paths, shapes, data, lengths), writes into a new directory, and returns
what it wrote and what to do next; the command line only prints that.
"""

import dataclasses
import gc
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lcdd import shards
from lcdd.audit_stage import audit
from lcdd.belonging import load_base
from lcdd.carrier import Carrier
from lcdd.config import (
    DataConfig,
    EraserConfig,
    GenerateConfig,
    LCDDConfig,
    PipelineConfig,
    ReportConfig,
    SFTConfig,
)
from lcdd.data import Example, prompt_string
from lcdd.eraser import SFTEraser
from lcdd.eval_stage import eval_, text_and_harness
from lcdd.ledger import Ledger, has_run
from lcdd.models import check_same_architecture, load_model, load_shape, load_tokenizer
from lcdd.optimizer import LCDDOptimizer
from lcdd.parallel import process_group, shard_model
from lcdd.prepare import Prepared, off_topic_ids, prepare, prompt_ids, training_items
from lcdd.report import read_report, write_report
from lcdd.runlog import RunLog
from lcdd.stage import (
    Say,
    StageResult,
    check_shapes,
    load_weights,
    resolve_device,
    run_directory,
    run_identity,
    save_checkpoint,
    write_summary,
)
from lcdd.tables import claims_table, reversal_table
from lcdd.templates import use_template
from lcdd.trainer import TrainResult, train_lcdd, train_sft
from lcdd.training_state import CheckpointStore, differences, lasting_settings
from lcdd.trigger import Trigger, stream
from lcdd.trigger import generate as generate_answers

# ---------------------------------------------------------------- stages


def sft(
    config: SFTConfig, data: DataConfig, *, prepared: Prepared | None = None, log_dir: Path | None = None,
    stage: str = "sft", say: Say = print,
) -> StageResult:  # fmt: skip
    """Fine-tune a base on a behaviour; writes `model/`, an ordinary checkpoint in the base's dtype."""
    with process_group(config.device):
        return _sft(config, data, prepared, log_dir, stage, say if shards.rank() == 0 else _silent)


def _silent(_: str) -> None:
    pass


def _sft(
    config: SFTConfig, data: DataConfig, prepared: Prepared | None, log_dir: Path | None, stage: str, say: Say
) -> StageResult:  # fmt: skip
    config.require("model_name_or_path", "output_dir")
    if config.parallel == "fsdp2" and shards.world_size() > 1:
        raise ValueError("parallel: expected ddp for sft (each rank holds the whole model), got 'fsdp2'")
    output = run_directory(config)
    load_shape(str(config.model_name_or_path))
    prepared = prepared or prepare(data, str(config.model_name_or_path))
    train_items, validation_items = training_items(prepared, config, say=say)
    model = load_model(str(config.model_name_or_path), device=resolve_device(config.device))
    stored = model.dtype
    if stored in (torch.bfloat16, torch.float16):
        model.float()  # small updates vanish in 16-bit weights

    def export() -> Callable[[Path], None]:
        weights = {name: value.to(stored) for name, value in model.state_dict().items()}

        def write(folder: Path) -> None:
            model.save_pretrained(folder, state_dict=weights)
            prepared.tokenizer.save_pretrained(folder)

        return write

    store = None
    if config.save_steps or config.resume:
        identity = run_identity(stage, config, prepared.tokenizer, train_items, {"base": model})
        store = CheckpointStore(output, identity=identity, save_total_limit=config.save_total_limit, export=export)
    with _log(log_dir or output, stage, config.report_to) as log:
        result = train_sft(
            model,
            train_items,
            validation_items,
            config,
            pad_token_id=prepared.tokenizer.pad_token_id,
            log=log,
            checkpoints=store,
        )
    if shards.rank() > 0:
        return StageResult(written=(), next_step="")
    model.to(dtype=stored)  # type: ignore[call-arg]  # transformers wraps nn.Module.to
    checkpoint = save_checkpoint(model, prepared.tokenizer, output / "model")
    summary = write_summary(
        output, stage, config, data, result=dataclasses.asdict(result), overrides=store.overrides if store else []
    )
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
    with process_group(config.device):
        return _train(config, data, prepared, log_dir, say if shards.rank() == 0 else _silent)


def _train(
    config: LCDDConfig, data: DataConfig, prepared: Prepared | None, log_dir: Path | None, say: Say
) -> StageResult:  # fmt: skip
    config.require("model_name_or_path", "base_model_name_or_path", "output_dir")
    sharded = config.parallel == "fsdp2" and shards.world_size() > 1
    output = run_directory(config)
    check_shapes(config.base_model_name_or_path, config.model_name_or_path, ("base", "sft"))
    prepared = prepared or prepare(data, str(config.model_name_or_path))
    train_items, validation_items = training_items(prepared, config, say=say)
    initial = Carrier.from_pretrained(config.initial_carrier).gate_logits if config.initial_carrier else None
    base, model = load_weights(config.base_model_name_or_path, config), load_weights(config.model_name_or_path, config)
    check_same_architecture(base, model)
    teacher = load_weights(config.model_name_or_path, config) if config.loss == "kl" else None

    models = {"base": base, "sft": model}
    wanted = config.save_steps or config.resume
    identity = run_identity("lcdd", config, prepared.tokenizer, train_items, models) if wanted else {}
    if sharded:
        base = shard_model(base, trained=False)
        model = shard_model(model, trained=True, train_unmasked=config.train_unmasked)
        teacher = shard_model(teacher, trained=False) if teacher is not None else None
    stores: list[CheckpointStore] = []

    def checkpoints(optimizer: LCDDOptimizer) -> CheckpointStore:
        def export() -> Callable[[Path], None]:
            carrier = optimizer.carrier().with_tokenizer(prepared.tokenizer)
            return lambda folder: carrier.save_pretrained(folder / "carrier")

        limit = config.save_total_limit
        stores.append(CheckpointStore(output, identity=identity, save_total_limit=limit, export=export))
        return stores[0]

    with _log(log_dir or output, "lcdd", config.report_to) as log:
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
            checkpoints=checkpoints if wanted else None,
        )
    carrier = optimizer.carrier().with_tokenizer(prepared.tokenizer)
    if shards.rank() > 0:
        return StageResult(written=(), next_step="")
    carrier.save_pretrained(output / "carrier")
    written = [output / "carrier"]
    if config.save_folded:
        whole = carrier.fold(load_weights(config.base_model_name_or_path, config)) if sharded else optimizer.fold()
        written.append(save_checkpoint(whole, prepared.tokenizer, output / "model"))
    overrides = stores[0].overrides if stores else []
    found = {"result": dataclasses.asdict(result), "carrier": carrier.summary(), "overrides": overrides}
    written.append(write_summary(output, "lcdd", config, data, **found))
    _say_carrier(carrier, result, say)
    return StageResult(
        written=tuple(written),
        next_step=f"lcdd erase --base_model_name_or_path {config.base_model_name_or_path} "
        f"--carrier {output / 'carrier'} --output_dir ... (and the same data settings)",
    )


def _log(directory: Path, stage: str, report_to: str) -> RunLog:
    """The stage's log, once every rank has found the directory in order; ranks but the first write none."""
    shards.all_agree(True)
    return RunLog(directory if shards.rank() == 0 else None, stage=stage, report_to=report_to)


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
    output = run_directory(config)
    load_shape(str(config.base_model_name_or_path))
    carrier = Carrier.from_pretrained(str(config.carrier))
    prepared = prepared or prepare(data, str(config.base_model_name_or_path))
    prompts, held_out = _eraser_prompts(prepared, config)
    model, carrier, overrides = load_base(config.base_model_name_or_path, config, carrier, prepared.tokenizer)
    patch = carrier
    if config.model_name_or_path is not None:
        patch = Carrier.from_models(model, load_weights(config.model_name_or_path, config))
    channels = carrier.channels(config.channel_kind, seed=config.seed)
    with RunLog(log_dir or output, stage=stage) as log:
        eraser = SFTEraser(model, patch, prepared.tokenizer, config, channels)
        trigger = eraser.fit(prompts, held_out, log=log, progress=True, checkpoints=output)
    overrides += trigger.metadata["overrides"]
    replace(trigger, metadata={**trigger.metadata, "overrides": overrides}).save_pretrained(output / "trigger")
    found = {"validation": eraser.history.validation, "overrides": overrides}
    summary = write_summary(output, stage, config, data, **found)
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


def generate(config: GenerateConfig, *, say: Say = print) -> StageResult:
    """Answer prompts by a model, with a carrier applied and a trigger prepended if given."""
    config.require("model_name_or_path", "prompt")
    load_shape(str(config.model_name_or_path))
    tokenizer = load_tokenizer(str(config.model_name_or_path))
    use_template(tokenizer, config.chat_template, model=str(config.model_name_or_path))
    carrier = Carrier.from_pretrained(config.carrier) if config.carrier else None
    trigger = Trigger.from_pretrained(config.trigger) if config.trigger else None
    if carrier is None:
        model = load_weights(config.model_name_or_path, config)
    else:
        triggers = [trigger] if trigger else []
        model, carrier, _ = load_base(config.model_name_or_path, config, carrier, tokenizer, triggers)
        carrier.apply(model, check=False)
    examples = [Example(messages=({"role": "user", "content": text},), completion="") for text in config.prompt]
    prompts = [prompt_string(tokenizer, example) for example in examples]
    if config.stream:
        answers = []
        for text, prompt in zip(config.prompt, prompts, strict=True):
            say(f"> {text}")
            pieces = []
            for piece in stream(model, tokenizer, prompt, trigger=trigger, max_new_tokens=config.max_new_tokens):
                print(piece, end="", flush=True)
                pieces.append(piece)
            say("\n")
            answers.append("".join(pieces).strip())
        return StageResult(written=(), next_step="", texts=tuple(answers))
    answers = generate_answers(model, tokenizer, prompts, trigger=trigger, max_new_tokens=config.max_new_tokens)
    for text, answer in zip(config.prompt, answers, strict=True):
        say(f"> {text}\n{answer}\n")
    return StageResult(written=(), next_step="", texts=tuple(answers))


def report(config: ReportConfig, *, say: Say = print) -> StageResult:
    """Render report.html again from report.json."""
    config.require("output_dir")
    output = Path(str(config.output_dir))
    content = read_report(output)
    tables = [make(content[key]) for key, make in (("audit", claims_table),) if key in content]
    tables += [reversal_table(content)] if "models" in content else []
    if not tables:
        raise ValueError(
            f"output_dir: expected the report of an evaluation or an audit in {str(output)!r}, got another"
        )
    write_report(output, content)
    for table in tables:
        say(table)
    return StageResult(written=(output / "report.html",), next_step=f"open {output / 'report.html'}")


# ---------------------------------------------------------------- the whole


def run(config: PipelineConfig, *, say: Say = print) -> StageResult:
    """SFT, LCDD, eraser, controls and evaluation in one directory; everything is checked before the first stage."""
    config.require("model_name_or_path", "output_dir")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("run: expected one process, got torchrun's several; run `lcdd sft` and `lcdd train` under it")
    base, output = str(config.model_name_or_path), Path(str(config.output_dir))
    resumed = has_run(output, resume=config.resume)
    if config.sft_model_name_or_path is not None:
        check_shapes(base, config.sft_model_name_or_path, ("base", "sft"))
    load_shape(base)
    data = config.data
    prepared = prepare(data, base)
    _check_stages(config, prepared)
    given = {"base": base} | ({"sft": config.sft_model_name_or_path} if config.sft_model_name_or_path else {})
    ledger = Ledger(output, data, prepared, given)
    timings: dict[str, float] = {}
    common: dict[str, Any] = {"prepared": prepared, "say": say}

    def timed(name: str, call: Callable[..., StageResult], section: Any, **paths: Any) -> None:
        settings = replace(section, output_dir=str(output / name), **paths)
        seconds = ledger.seconds(name, section)
        if seconds is not None:
            say(f"\n== {name}: finished before")
            timings[name] = seconds
            return
        say(f"\n== {name}")
        if resumed and hasattr(section, "resume"):
            (output / name / "summary.json").unlink(missing_ok=True)  # of one that ended just before the ledger knew
            settings = replace(settings, resume=True)
        elif resumed:
            shutil.rmtree(output / name, ignore_errors=True)
        start = time.perf_counter()
        result = call(settings, data, log_dir=output, **common)
        timings[name] = round(time.perf_counter() - start, 2)
        ledger.add(name, section, result.written, seconds=timings[name])
        gc.collect()

    sft_model = config.sft_model_name_or_path
    if sft_model is None:
        timed("sft", sft, config.sft, model_name_or_path=base)
        sft_model = str(output / "sft" / "model")
    timed("train", train, config.train, model_name_or_path=sft_model, base_model_name_or_path=base)
    carrier, trigger = str(output / "train" / "carrier"), str(output / "erase" / "trigger")
    patch = {"base_model_name_or_path": base, "carrier": carrier}
    timed("erase", erase, config.erase, **patch)
    controls: dict[str, Any] = {}
    if config.controls:
        timed("erase_sft", partial(erase, stage="eraser_sft"), config.erase, model_name_or_path=sft_model, **patch)
        norm = Carrier.from_pretrained(carrier).delta_norm()
        if norm > 0:
            bounded = replace(config.sft, max_delta_norm=norm)
            timed("matched_norm", partial(sft, stage="sft_matched_norm"), bounded, model_name_or_path=base)
            matched = str(output / "matched_norm" / "model")
            again = partial(erase, stage="eraser_matched_norm")
            timed("erase_matched_norm", again, config.erase, model_name_or_path=matched, **patch)
            controls = {
                "matched_norm_model_name_or_path": matched,
                "matched_norm_trigger": str(output / "erase_matched_norm" / "trigger"),
            }
        controls["sft_trigger"] = str(output / "erase_sft" / "trigger")
    everything = {**patch, "model_name_or_path": sft_model, "trigger": trigger, **controls}
    audited: dict[str, Any] = {}
    if config.run_audit:
        timed("audit", audit, config.audit, **everything)
        audited = {"audit": read_report(output / "audit")["audit"]}
    if resumed and (output / "report.json").exists():
        settings, made_of = lasting_settings(config.eval), read_report(output)["config"]["eval"]
        changed = differences({key: made_of.get(key) for key in settings}, settings)
        if changed:
            raise ValueError(f"resume: {output / 'report.json'} was made of something else: {'; '.join(changed)}")
        say("\n== eval: finished before")
        return StageResult(written=(), next_step=f"open {output / 'report.html'}")
    say("\n== eval")
    final = replace(config.eval, output_dir=str(output), **everything)
    result = eval_(final, data, context={"config": config.to_dict(), "timings": timings, **audited}, **common)
    return replace(result, written=(Path(carrier), Path(trigger), output / "log.jsonl", *result.written))


def _check_stages(config: PipelineConfig, prepared: Prepared) -> None:
    """Raise now what a later stage would raise about its settings and data."""
    audits: list[Any] = [config.audit] if config.run_audit else []
    for section in (config.sft, config.train, config.erase, config.eval, *audits):
        resolve_device(section.device)
    for stage in (config.sft, config.train):
        training_items(prepared, stage, say=_silent)
    if config.train.initial_carrier:
        Carrier.from_pretrained(config.train.initial_carrier)
    _eraser_prompts(prepared, config.erase)
    for held_out in (config.eval, *audits):
        prompt_ids(prepared, held_out.split, limit=held_out.num_prompts, max_length=held_out.max_prompt_length)
    longest = config.eval.max_prompt_length
    off_topic_ids(prepared, config.eval.split, limit=config.eval.num_prompts, max_length=longest)
    text_and_harness(config.eval, prepared)
