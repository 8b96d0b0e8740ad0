"""`lcdd demo`: the whole method, with its controls, on the small model that is shipped with the package.

    base -> SFT -> LCDD -> carrier -> trigger -> reversal table        and the same trigger optimisation on
        plain SFT; a dense SFT whose delta has the carrier's norm; the carrier with random channels; with KL only

Nothing it says is fixed beforehand: the words under the table are put together from the run's own numbers.
"""

import gc
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from lcdd.carrier import Carrier
from lcdd.checkpoint import RunLog, require_new_directory
from lcdd.commands.anchors import base_anchors
from lcdd.commands.belonging import learned_on
from lcdd.commands.demo.rebuild import rebuild_base
from lcdd.commands.demo.tasks import CATEGORIES, TOPIC, Split, Task, draw_tasks
from lcdd.commands.reporting import finished
from lcdd.commands.stage import Say, StageResult, save_checkpoint, tell
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
from lcdd.evaluate import Study, audit, describe, evaluate, reversal_states
from lcdd.models import PreTrainedModel, PreTrainedTokenizerBase, load_model, load_tokenizer, rows_never_drawn
from lcdd.optimizer import LCDDOptimizer, SFTOptimizer
from lcdd.report import Stages, assemble, samples_table
from lcdd.trainer import Finding, HeldOut, StartLosses, compress, fit, total_steps

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
    max_steps=400,
    per_device_train_batch_size=32,
    per_device_eval_batch_size=100,
    max_length=32,
)
ERASER_SETTINGS = EraserConfig(learning_rate=0.02, max_answer_tokens=MAX_NEW_TOKENS)


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


@contextmanager
def one_thread() -> Iterator[None]:
    """A model this small only loses by threads, and one thread gives the same bits on any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(config: DemoConfig, *, say: Say = tell) -> StageResult:
    """Run the demo; writes report.json, report.html, log.jsonl, carrier/, trigger/ and sft/ to `config.output_dir`.

    Raises:
        InputError: the output directory is not empty.
    """
    config.require("output_dir")
    output = require_new_directory(str(config.output_dir))
    with one_thread():
        return _Demo(config, output, say).run()


class _Demo:
    """One run of the demo, stage by stage."""

    def __init__(self, config: DemoConfig, output: Path, say: Say) -> None:
        self.start = time.perf_counter(), time.process_time()
        self.config, self.output, self.say = config, output, say
        self.stages = Stages(_work(config))
        self.sft = replace(SFT_SETTINGS, seed=config.seed)
        self.lcdd = replace(LCDD_SETTINGS, seed=config.seed)
        self.eraser = replace(ERASER_SETTINGS, seed=config.seed)
        self.lines: list[dict[str, Any]] = []
        self.findings: tuple[Finding, ...] = ()

    def run(self) -> StageResult:
        with self.stages:
            self._prepare()
            patches = self._patches()
            triggers = self._triggers(patches)
            found = self._evaluate(patches, triggers)
            if self.config.audit:
                found["audit"] = self._audit(patches, triggers)
        return self._tell(patches["carrier"], found)

    @contextmanager
    def _stage(self, name: str, words: str) -> Iterator[None]:
        self.say(f"\n== {words}")
        with self.stages.running(name):
            yield
        gc.collect()

    def _prepare(self) -> None:
        """The base, the data and the settings of every stage."""
        config = self.config
        self.base_path = self._base_directory()
        self.base, self.tokenizer = load_model(self.base_path).requires_grad_(False), load_tokenizer(self.base_path)
        self.behavior = demo_behavior(config.behavior)
        split = cast(Split, config.split)
        self.data = demo_data(self.tokenizer, self.behavior, seed=config.seed, split=split, settings=self.eraser)
        self.say(
            f"Behaviour: {self.behavior.name}. {len(self.data.train)} training prompts, {len(self.data.held_out)} "
            f"{split} prompts"
        )
        self.say(label_audit(self.tokenizer, self.data.train[0]))

    # ------------------------------------------------------------------ stages

    def _base_directory(self) -> Path:
        if not self.config.rebuild_base:
            return BASE_DIRECTORY
        with self._stage("rebuild_base", "Training the base model from scratch (a few minutes)"):
            rebuild_base(self.output / "base", log=self.say)
        return self.output / "base"

    def _patches(self) -> dict[str, Carrier]:
        """SFT, the carrier and the matched-norm control, as patches of the base."""
        with self._stage("sft", "SFT: teaching the behaviour to every weight"):
            model = self._fine_tune("sft")
            patches = {"sft": Carrier.from_models(self.base, model)}
            save_checkpoint(model, self.tokenizer, self.output / "sft")
        with self._stage("lcdd", "LCDD: closing gates as long as the behaviour survives"):
            patches["carrier"] = self._compress(model)
            patches["carrier"].save_pretrained(self.output / "carrier")
        for finding in self.findings:
            self.say(f"WARNING {finding.message}")
        norm = patches["carrier"].delta_norm()
        if norm > 0:
            words = f"Control: dense SFT whose delta stays within the carrier's norm, {norm:.2f}"
            with self._stage("sft_matched_norm", words):
                matched = self._fine_tune("sft_matched_norm", max_delta_norm=norm)
                patches["matched_norm"] = Carrier.from_models(self.base, matched)
        return patches

    def _fine_tune(self, stage: str, **changes: Any) -> PreTrainedModel:
        model = load_model(self.base_path)
        with self._log(stage) as log:
            fit(SFTOptimizer(model, replace(self.sft, **changes)), self.data.train, self._validation(), log=log)
        return model

    def _compress(self, model: PreTrainedModel) -> Carrier:
        held_out, train = self._validation(), self.data.train
        with self._log("lcdd") as log:
            start = StartLosses(base=held_out.loss(self.base), model=held_out.loss(model))
            optimizer = LCDDOptimizer.attach(
                model, self.base, self.lcdd, total_steps=total_steps(self.lcdd, len(train))
            )
            anchors = base_anchors(self.base, self.tokenizer, self.data.trigger_train, self.lcdd)
            result = compress(optimizer, train, held_out, start=start, anchors=anchors, log=log)
        self.findings = result.findings
        carrier = optimizer.carrier().with_tokenizer(self.tokenizer)
        optimizer.detach()
        return carrier

    def _validation(self) -> HeldOut:
        return HeldOut(items=self.data.validation, pad_token_id=self.tokenizer.pad_token_id, batch_size=EVAL_BATCH)

    def _triggers(self, patches: dict[str, Carrier]) -> dict[str, Trigger]:
        """State -> its trigger, on the carrier and on every control."""
        triggers = {}
        for name, (patch, changes, words) in _trigger_runs(patches).items():
            with self._stage(name, words), self._log(name) as log:
                settings = replace(self.eraser, **changes)
                channels = patches["carrier"].channels(settings.channel_kind, seed=self.config.seed)
                eraser = SFTEraser(self.base, patches[patch], self.tokenizer, settings, channels)
                triggers[name] = eraser.fit(
                    self.data.trigger_train, self.data.trigger_validation, log=log, progress=True
                )
        learned_on(triggers["carrier+trigger"], self.base, patches["carrier"]).save_pretrained(self.output / "trigger")
        return triggers

    def _evaluate(self, patches: dict[str, Carrier], triggers: dict[str, Trigger]) -> dict[str, Any]:
        special = rows_never_drawn(self.tokenizer, self.base)
        settings: dict[str, Any] = {
            "matches": self.behavior.matches,
            "max_new_tokens": MAX_NEW_TOKENS,
            "batch_size": EVAL_BATCH,
            "kl_prompts": KL_PROMPTS,
            "progress": True,
        }
        with self._stage("eval", f"Evaluation on prompts of the {self.config.split} split"):
            states = reversal_states(
                self.base, patches, triggers, seed=self.config.seed, draws=RANDOM_PREFIXES, special=special
            )
            found = evaluate(self.base, self.tokenizer, self.data.held_out, states, **settings)
            if self.data.off_topic:
                others = evaluate(self.base, self.tokenizer, self.data.off_topic, states, **settings)
                found["off_topic"] = others["models"]
        return found

    def _audit(self, patches: dict[str, Carrier], triggers: dict[str, Trigger]) -> dict[str, Any]:
        data = self.data
        study = Study(
            base=self.base,
            tokenizer=self.tokenizer,
            load_sft=lambda: load_model(self.output / "sft"),
            carrier=patches["carrier"],
            train=data.train,
            validation=data.validation,
            trigger_train=data.trigger_train,
            trigger_validation=data.trigger_validation,
            held_out=data.held_out,
            matches=self.behavior.matches,
            lcdd=self.lcdd,
            eraser=self.eraser,
            patches={name: patch for name, patch in patches.items() if name == "matched_norm"},
            triggers=triggers,
        )
        settings = AuditConfig(
            max_new_tokens=MAX_NEW_TOKENS, per_device_eval_batch_size=EVAL_BATCH, seed=self.config.seed
        )
        with self._stage("audit", "Audit: every control, and which of the paper's claims hold here"):
            return audit(study, settings, say=self.say, log=lambda stage: RunLog(self.output, stage=stage))

    # ------------------------------------------------------------------ what came of it

    @contextmanager
    def _log(self, stage: str) -> Iterator[RunLog]:
        with RunLog(self.output, stage=stage) as log:
            yield log
        self.lines.extend(log.lines)

    def _tell(self, carrier: Carrier, found: dict[str, Any]) -> StageResult:
        wall, processor = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        settings = {"demo": self.config, "sft": self.sft, "train": self.lcdd, "erase": self.eraser}
        paths = {name: str((self.output / name).absolute()) for name in ("carrier", "trigger")}
        report = assemble(
            describe(carrier),
            found,
            behavior=self.behavior.name,
            seed=self.config.seed,
            split=self.config.split,
            config={name: section.to_dict() for name, section in settings.items()},
            timings={**self.stages.seconds, "total": round(wall, 2), "processor": round(processor, 2)},
            findings=[{"code": finding.code, "message": finding.message} for finding in self.findings],
            curves=self.lines,
            use={"base_model_name_or_path": str(self.base_path), **paths},
        )
        result = finished(self.output, report, self.say)
        self.say(f"\n{samples_table(report)}\n\n{report['timings']['total']:.0f} seconds")
        made = tuple(self.output / name for name in ("log.jsonl", "sft", "carrier", "trigger"))
        return replace(result, written=(*result.written, *made))


def _work(config: DemoConfig) -> dict[str, float]:
    """Each stage's share of the work, as it was measured once on a CPU: what the estimate of the whole goes by."""
    work = {"rebuild_base": 8.0} if config.rebuild_base else {}
    work |= {"sft": 1.0, "lcdd": 2.5, "sft_matched_norm": 1.0}
    work |= dict.fromkeys(_trigger_runs(("sft", "carrier", "matched_norm")), 1.0)
    return work | {"eval": 1.5} | ({"audit": 20.0} if config.audit else {})


def _trigger_runs(patches: Collection[str]) -> dict[str, tuple[str, dict[str, Any], str]]:
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
