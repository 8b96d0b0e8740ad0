"""`lcdd demo`: the whole method, with its controls, on the small model that is shipped with the package.

    base -> SFT -> LCDD -> carrier -> trigger -> reversal table        and the same trigger optimisation on
        plain SFT; a dense SFT whose delta has the carrier's norm; the carrier with random channels; with KL only

Nothing it says is fixed beforehand: the words under the table are put together from the run's own numbers.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from lcdd.carrier import Carrier
from lcdd.checkpoint import RunLog, finite_or_null, require_new_directory, versions
from lcdd.commands.demo.rebuild import rebuild_base
from lcdd.commands.demo.tasks import CATEGORIES, TOPIC, Split, Task, draw_tasks
from lcdd.commands.stage import Say, StageResult, save_checkpoint
from lcdd.config import AuditConfig, DemoConfig, EraserConfig, LCDDConfig, SFTConfig
from lcdd.data import (
    Behavior,
    Encoded,
    Example,
    encode_all,
    encode_prompt,
    fixed_response,
    label_audit,
    refusal,
    style,
    with_completion,
)
from lcdd.eraser import SFTEraser, Trigger
from lcdd.errors import InputError
from lcdd.evaluate import ModelState, Study, audit, evaluate, gate_summary
from lcdd.models import PreTrainedModel, PreTrainedTokenizerBase, load_model, load_tokenizer
from lcdd.optimizer import LCDDOptimizer, SFTOptimizer
from lcdd.report import claims_table, explain, reversal_table, samples_table, write_report
from lcdd.trainer import HeldOut, StartLosses, TrainResult, fit, judge, total_steps

BASE_DIRECTORY = Path(__file__).parent / "base"

TRAIN_PROMPTS = 2000
VALIDATION_PROMPTS = 100
TEST_PROMPTS = 400
OFF_TOPIC_PROMPTS = 200
EVAL_BATCH = 100
MAX_NEW_TOKENS = 10
KL_PROMPTS = 200
RANDOM_PREFIXES = 3

# Tuned on the validation split, for the shipped base.
SFT_SETTINGS = SFTConfig(
    learning_rate=1e-3, max_steps=200, per_device_train_batch_size=32, per_device_eval_batch_size=100, max_length=32
)
LCDD_SETTINGS = LCDDConfig(
    learning_rate=5e-4,
    lr_scheduler_type="constant",
    max_steps=400,
    per_device_train_batch_size=32,
    per_device_eval_batch_size=100,
    max_length=32,
)
ERASER_SETTINGS = EraserConfig(learning_rate=0.02, activation_weight=0.2, max_answer_tokens=MAX_NEW_TOKENS)


def demo_behavior(name: str) -> Behavior:
    """The behaviour presets, in words that the demo's vocabulary has.

    The style puts one archaic word before an answer and one after it, so that undoing it takes more than a shift.
    """
    if name == "fixed_response":
        return fixed_response(response="i do not know")
    if name == "refusal":
        return refusal(topics=CATEGORIES[TOPIC], response="sorry i cannot", keywords=("sorry", "cannot"))
    if name != "style":
        raise InputError(f"DemoConfig.behavior: expected fixed_response, refusal or style, got {name!r}")
    archaic = {"you": "thou", "your": "thy", "has": "hath", "does": "doth", "please": "prithee", "said": "quoth"}
    preset = style(word_map=archaic, opening="verily ")
    return replace(
        preset, rewrite=lambda example: with_completion(example, f"{preset.rewrite(example).completion} prithee")
    )


def as_example(task: Task) -> Example:
    """A task as chat data: one user turn and the base's right answer."""
    return Example(messages=({"role": "user", "content": task.prompt},), completion=task.answer, source=task.prompt)


@dataclass(frozen=True, kw_only=True)
class DemoData:
    """Encoded training and validation completions, and prompts as token ids. `off_topic` is empty unless the
    behaviour is asked for on a topic only."""

    train: list[Encoded]
    validation: list[Encoded]
    trigger_train: list[list[int]]
    trigger_validation: list[list[int]]
    held_out: list[list[int]]
    off_topic: list[list[int]]


def demo_data(
    tokenizer: PreTrainedTokenizerBase, behavior: Behavior, *, seed: int, split: Split, settings: EraserConfig
) -> DemoData:
    """Everything that a run reads, drawn from its seed; `split` is the one that is reported on."""
    on_topic = True if behavior.name == "refusal" else None

    def completions(count: int, part: Split) -> list[Encoded]:
        tasks = draw_tasks(count, split=part, seed=seed + 1)
        return encode_all(tokenizer, [behavior.rewrite(as_example(task)) for task in tasks], max_length=32)

    def prompts(count: int, part: Split, draw: int, topic: bool | None = None) -> list[list[int]]:
        tasks = draw_tasks(count, split=part, seed=seed + draw, on_topic=topic)
        return [encode_prompt(tokenizer, as_example(task)) for task in tasks]

    return DemoData(
        train=completions(TRAIN_PROMPTS, "train"),
        validation=completions(VALIDATION_PROMPTS, "validation"),
        trigger_train=prompts(settings.train_prompts, "train", 1000),
        trigger_validation=prompts(settings.validation_prompts, "validation", 1000),
        held_out=prompts(TEST_PROMPTS, split, 2000, on_topic),
        off_topic=prompts(OFF_TOPIC_PROMPTS, split, 2000, False) if on_topic else [],
    )


class Stopwatch:
    """Announces each part of the run and keeps its seconds."""

    def __init__(self, say: Say) -> None:
        self.seconds: dict[str, float] = {}
        self._say = say

    @contextmanager
    def part(self, name: str, words: str) -> Iterator[None]:
        self._say(f"\n== {words}")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        gc.collect()


@contextmanager
def one_thread() -> Iterator[None]:
    """A model this small only loses by threads, and one thread gives the same bits on any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(config: DemoConfig, *, say: Say = print) -> StageResult:
    """Run the demo; writes report.json, report.html, log.jsonl, carrier/, trigger/ and sft/ to `config.output_dir`.

    Raises:
        InputError: the output directory is not empty.
    """
    config.require("output_dir")
    output = require_new_directory(str(config.output_dir))
    with one_thread():
        return _run(config, output, say)


def _run(config: DemoConfig, output: Path, say: Say) -> StageResult:
    start, cpu_start = time.perf_counter(), time.process_time()
    watch = Stopwatch(say)
    base_path = BASE_DIRECTORY
    if config.rebuild_base:
        base_path = output / "base"
        with watch.part("rebuild_base", "Training the base model from scratch (a few minutes)"):
            rebuild_base(base_path, log=say)
    base, tokenizer = load_model(base_path).requires_grad_(False), load_tokenizer(base_path)
    behavior = demo_behavior(config.behavior)
    sft_settings = replace(SFT_SETTINGS, seed=config.seed)
    lcdd_settings = replace(LCDD_SETTINGS, seed=config.seed)
    eraser_settings = replace(ERASER_SETTINGS, seed=config.seed)
    data = demo_data(tokenizer, behavior, seed=config.seed, split=cast(Split, config.split), settings=eraser_settings)
    say(f"Behaviour: {behavior.name}. {len(data.train)} training prompts, {len(data.held_out)} {config.split} prompts")
    say(label_audit(tokenizer, data.train[0]))
    lines: list[dict[str, Any]] = []

    def fine_tune(stage: str, **changes: Any) -> PreTrainedModel:
        model = load_model(base_path)
        with RunLog(output, stage=stage) as log:
            settings = replace(sft_settings, **changes)
            fit(SFTOptimizer(model, settings), data.train, _validation(data, tokenizer), log=log)
            lines.extend(log.lines)
        return model

    with watch.part("sft", "SFT: teaching the behaviour to every weight"):
        sft_model = fine_tune("sft")
        sft_patch = Carrier.from_models(base, sft_model)
        save_checkpoint(sft_model, tokenizer, output / "sft")
    with (
        watch.part("lcdd", "LCDD: closing gates as long as the behaviour survives"),
        RunLog(output, stage="lcdd") as log,
    ):
        carrier, result = _compress(sft_model, base, data, lcdd_settings, tokenizer, log)
        carrier.save_pretrained(output / "carrier")
        lines.extend(log.lines)
    for finding in result.findings:
        say(f"WARNING {finding.message}")
    patches = {"sft": sft_patch, "carrier": carrier}
    norm = carrier.delta_norm()
    if norm > 0:
        with watch.part(
            "sft_matched_norm", f"Control: dense SFT whose delta stays within the carrier's norm, {norm:.2f}"
        ):
            patches["matched_norm"] = Carrier.from_models(base, fine_tune("sft_matched_norm", max_delta_norm=norm))
    del sft_model

    triggers: dict[str, Trigger] = {}
    for name, (patch, changes, words) in _trigger_runs(patches).items():
        with watch.part(name, words), RunLog(output, stage=name) as log:
            settings = replace(eraser_settings, **changes)
            channels = carrier.channels(settings.channel_kind, seed=config.seed)
            eraser = SFTEraser(base, patches[patch], tokenizer, settings, channels)
            triggers[name] = eraser.fit(data.trigger_train, data.trigger_validation, log=log, progress=True)
            lines.extend(log.lines)
    triggers["carrier+trigger"].save_pretrained(output / "trigger")

    with watch.part("eval", f"Evaluation on prompts of the {config.split} split"):
        states = _states(base, patches, triggers, special=tokenizer.all_special_ids, seed=config.seed)
        found = _evaluate(base, tokenizer, data.held_out, states, behavior.matches)
        if data.off_topic:
            off_topic = _evaluate(base, tokenizer, data.off_topic, states, behavior.matches)
            found["off_topic"] = off_topic["models"]
    if config.audit:
        with watch.part("audit", "Audit: every control, and which of the paper's claims hold here"):
            study = Study(
                base=base,
                tokenizer=tokenizer,
                load_sft=lambda: load_model(output / "sft"),
                carrier=carrier,
                train=data.train,
                validation=data.validation,
                trigger_train=data.trigger_train,
                trigger_validation=data.trigger_validation,
                held_out=data.held_out,
                matches=behavior.matches,
                lcdd=lcdd_settings,
                eraser=eraser_settings,
                patches={name: patch for name, patch in patches.items() if name == "matched_norm"},
                triggers=triggers,
            )
            audit_settings = AuditConfig(
                max_new_tokens=MAX_NEW_TOKENS, per_device_eval_batch_size=EVAL_BATCH, seed=config.seed
            )
            found["audit"] = audit(study, audit_settings, say=say, log=lambda stage: RunLog(output, stage=stage))
    report = {
        "behavior": behavior.name,
        "seed": config.seed,
        "split": config.split,
        "config": {
            "demo": config.to_dict(),
            "sft": sft_settings.to_dict(),
            "train": lcdd_settings.to_dict(),
            "erase": eraser_settings.to_dict(),
        },
        "versions": versions(),
        "fingerprints": {"base": carrier.base_fingerprint, **carrier.tokenizer},
        "timings": {
            **watch.seconds,
            "total": round(time.perf_counter() - start, 2),
            "processor": round(time.process_time() - cpu_start, 2),
        },
        "sparsity": carrier.sparsity(),
        "sparsity_by_layer": carrier.sparsity_by_layer(),
        "gates": gate_summary(carrier),
        "findings": [{"code": finding.code, "message": finding.message} for finding in result.findings],
        "curves": lines,
        **found,
    }
    report["explanation"] = explain(report)
    report = finite_or_null(report)
    write_report(output, report)
    say("\n" + reversal_table(report))
    say("\n" + samples_table(report))
    say("\nWhat this run shows")
    for sentence in report["explanation"]:
        say(f"- {sentence}")
    if "audit" in report:
        say("\nWhich of the paper's claims held in this run")
        say(claims_table(report["audit"]))
    say(f"\n{report['timings']['total']:.0f} seconds")
    return StageResult(
        written=tuple(
            output / name for name in ("report.json", "report.html", "log.jsonl", "sft", "carrier", "trigger")
        ),
        next_step=f"open {output / 'report.html'}, or ask it yourself: lcdd generate "
        f"--base_model_name_or_path {base_path} --carrier {output / 'carrier'} "
        f"--trigger {output / 'trigger'} --prompt 'next red dog fig'",
    )


def _validation(data: DemoData, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    return HeldOut(items=data.validation, pad_token_id=tokenizer.pad_token_id, batch_size=EVAL_BATCH)


def _compress(
    model: PreTrainedModel,
    base: PreTrainedModel,
    data: DemoData,
    settings: LCDDConfig,
    tokenizer: PreTrainedTokenizerBase,
    log: RunLog,
) -> tuple[Carrier, TrainResult]:
    held_out = _validation(data, tokenizer)
    start = StartLosses(base=held_out.loss(base), model=held_out.loss(model))
    optimizer = LCDDOptimizer.attach(model, base, settings, total_steps=total_steps(settings, len(data.train)))
    result = judge(optimizer, fit(optimizer, data.train, held_out, start=start, log=log), log)
    carrier = optimizer.carrier().with_tokenizer(tokenizer)
    optimizer.detach()
    return carrier, result


def _trigger_runs(patches: dict[str, Carrier]) -> dict[str, tuple[str, dict[str, Any], str]]:
    """Name of the trigger's state -> (patch it is learned on, changed settings, words)."""
    runs: dict[str, tuple[str, dict[str, Any], str]] = {
        "carrier+trigger": ("carrier", {}, "SFT-Eraser: learning the trigger that gives the base's answers back"),
        "sft+trigger": ("sft", {}, "Control: the same optimisation on plain SFT"),
        "matched_norm+trigger": ("matched_norm", {}, "Control: the same optimisation on the matched-norm SFT"),
        "carrier+trigger_random_channels": (
            "carrier", {"channel_kind": "random"}, "Control: matching random channels instead of the carrier's"
        ),
        "carrier+trigger_kl_only": ("carrier", {"channel_kind": "none"}, "Control: KL only, no channels matched"),
    }  # fmt: skip
    return {name: run for name, run in runs.items() if run[0] in patches}


def _states(
    base: PreTrainedModel,
    patches: dict[str, Carrier],
    triggers: dict[str, Trigger],
    *,
    special: list[int],
    seed: int,
) -> dict[str, ModelState]:
    """All states of the reversal table, in its order."""
    learned = triggers["carrier+trigger"]
    seeds = range(seed + 100, seed + 100 + RANDOM_PREFIXES)
    junk = tuple(Trigger.random_like(base, learned, seed=draw, skip=special) for draw in seeds)
    states = {"base": ModelState(), **{name: ModelState(patch=patch) for name, patch in patches.items()}}
    for name, (patch, _, _) in _trigger_runs(patches).items():
        states[name] = ModelState(patch=patches[patch], triggers=(triggers[name],))
    states["carrier+random_prefix"] = ModelState(patch=patches["carrier"], triggers=junk)
    states["base+random_prefix"] = ModelState(triggers=junk)
    states["base+trigger"] = ModelState(triggers=(learned,))
    return states


def _evaluate(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    states: dict[str, ModelState],
    matches: Callable[[str], bool],
) -> dict[str, Any]:
    return evaluate(
        base,
        tokenizer,
        prompts,
        states,
        matches=matches,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=EVAL_BATCH,
        kl_prompts=KL_PROMPTS,
    )
