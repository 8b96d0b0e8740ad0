"""`lcdd run`: all stages on one checkpoint directory, each checked before the first one starts.

Every stage checks its whole input first (paths, shapes, data, lengths), writes into a new directory, and returns
what it wrote and what to do next; the command line only prints that.
"""

import gc
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lcdd.carrier import Carrier
from lcdd.checkpoint import differences
from lcdd.commands.audit import audit
from lcdd.commands.days import day_of_model, day_of_run
from lcdd.commands.erase import _eraser_prompts, erase
from lcdd.commands.eval import eval_, text_and_harness
from lcdd.commands.ledger import Ledger, has_run
from lcdd.commands.reporting import open_page
from lcdd.commands.sft import sft
from lcdd.commands.stage import Say, StageResult, _silent, check_shapes, resolve_device, settle_precision, tell
from lcdd.commands.train import train
from lcdd.config import PipelineConfig, TrainConfig
from lcdd.data import Prepared, off_topic_ids, prepare, prompt_ids, training_items
from lcdd.errors import InputError, TrainingStopped
from lcdd.models import skeleton
from lcdd.report import Stages, read_report
from lcdd.trainer import total_steps


def run(config: PipelineConfig, *, say: Say = tell) -> StageResult:
    """SFT, LCDD, eraser, controls and evaluation in one directory; everything is checked before the first stage."""
    config.require("base_model_name_or_path", "output_dir")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("run: expected one process, got torchrun's several; run `lcdd sft` and `lcdd train` under it")
    config = settle_precision(config)
    base, sft_model = str(config.base_model_name_or_path), config.sft_model_name_or_path
    resumed = has_run(Path(str(config.output_dir)), resume=config.resume)
    if sft_model is not None:
        check_shapes(base, sft_model, ("base", "sft"))
    skeleton(base)
    prepared = prepare(config.data, base, template_date=day_of_run(config) or day_of_model(sft_model))
    _check_stages(config, prepared)
    return _Pipeline(config, prepared, resumed, say).run()


class _Pipeline:
    """The stages of one run, each in a directory of its own; finished ones are skipped when a run goes on."""

    def __init__(self, config: PipelineConfig, prepared: Prepared, resumed: bool, say: Say) -> None:
        self.config, self.resumed, self.say = config, resumed, say
        self.base, self.output = str(config.base_model_name_or_path), Path(str(config.output_dir))
        self.common: dict[str, Any] = {"prepared": prepared, "say": say}
        sft_model = config.sft_model_name_or_path
        given = {"base": self.base} | ({"sft": sft_model} if sft_model else {})
        self.ledger = Ledger(self.output, config.data, prepared, given)
        self.stages = Stages(_work(config, prepared))

    def run(self) -> StageResult:
        with self.stages:
            return self._run()

    def _run(self) -> StageResult:
        config = self.config
        sft_model = config.sft_model_name_or_path
        if sft_model is None:
            self._stage("sft", sft, config.sft, base_model_name_or_path=self.base)
            sft_model = self._path("sft", "model")
        models = {"base_model_name_or_path": self.base, "sft_model_name_or_path": sft_model}
        self._stage("train", train, config.train, **models)
        patch = {"base_model_name_or_path": self.base, "carrier": self._path("train", "carrier")}
        self._stage("erase", erase, config.erase, **patch)
        everything = {**models, **patch, "trigger": self._path("erase", "trigger")}
        if config.controls:
            everything |= self._controls(sft_model, patch)
        audited = {}
        if config.run_audit:
            self._stage("audit", audit, config.audit, **everything)
            audited = {"audit": read_report(self.output / "audit")["audit"]}
        return self._evaluate(everything, audited)

    def _controls(self, sft_model: str, patch: dict[str, str]) -> dict[str, str]:
        """The same trigger optimisation on plain SFT and on a dense SFT of the carrier's norm: where they lie."""
        config = self.config
        on_sft = partial(erase, stage="eraser_sft")
        self._stage("erase_sft", on_sft, config.erase, sft_model_name_or_path=sft_model, **patch)
        found = {"sft_trigger": self._path("erase_sft", "trigger")}
        norm = Carrier.from_pretrained(patch["carrier"]).delta_norm()
        if norm > 0:
            bounded = replace(config.sft, max_delta_norm=norm)
            matched_norm = partial(sft, stage="sft_matched_norm")
            self._stage("matched_norm", matched_norm, bounded, base_model_name_or_path=self.base)
            matched = self._path("matched_norm", "model")
            on_matched = partial(erase, stage="eraser_matched_norm")
            self._stage("erase_matched_norm", on_matched, config.erase, sft_model_name_or_path=matched, **patch)
            found |= {
                "matched_norm_model_name_or_path": matched,
                "matched_norm_trigger": self._path("erase_matched_norm", "trigger"),
            }
        return found

    def _path(self, stage: str, result: str) -> str:
        return str(self.output / stage / result)

    def _stage(self, name: str, call: Callable[..., StageResult], section: Any, **paths: str) -> None:
        seconds = self.ledger.seconds(name, section)
        if seconds is not None:
            self.say(f"\n== {name}: finished before")
            self.stages.finished_before(name, seconds)
            return
        self.say(f"\n== {name}")
        settings = replace(section, output_dir=str(self.output / name), **paths)
        if self.resumed and hasattr(section, "resume"):
            # the summary of one that ended just before the ledger knew
            (self.output / name / "summary.json").unlink(missing_ok=True)
            settings = replace(settings, resume=True)
        elif self.resumed:
            shutil.rmtree(self.output / name, ignore_errors=True)
        with self.stages.running(name):
            result = call(settings, self.config.data, log_dir=self.output, **self.common)
        if result.problem is not None:
            raise TrainingStopped(f"stopped after {name}: {result.problem}")
        self.ledger.add(name, section, result.written, seconds=self.stages.seconds[name])
        gc.collect()

    def _evaluate(self, paths: dict[str, Any], audited: dict[str, Any]) -> StageResult:
        section, report = self.config.eval, self.output / "report.json"
        if self.resumed and report.exists():
            settings, made_of = section.lasting(), read_report(self.output)["config"]["eval"]
            changed = differences({key: made_of.get(key) for key in settings}, settings)
            if changed:
                raise InputError(f"resume: {report} was made of something else: {'; '.join(changed)}")
            self.say("\n== eval: finished before")
            return StageResult(written=(), next_step=open_page(self.output))
        self.say("\n== eval")
        context = {"config": self.config.to_dict(), "timings": self.stages.seconds, **audited}
        final = replace(section, output_dir=str(self.output), **paths)
        with self.stages.running("eval"):
            result = eval_(final, self.config.data, context=context, **self.common)
        made = (Path(paths["carrier"]), Path(paths["trigger"]), self.output / "log.jsonl")
        return replace(result, written=(*made, *result.written))


def _work(config: PipelineConfig, prepared: Prepared) -> dict[str, float]:
    """Examples that go through a model forward and backward in each stage: what the estimate of the whole goes by."""
    n = len(prepared.splits.train)

    def training(section: TrainConfig) -> float:
        return total_steps(section, n) * section.per_device_train_batch_size * section.gradient_accumulation_steps

    erase, held_out = config.erase, min(config.eval.num_prompts, len(getattr(prepared.splits, config.eval.split)))
    erasing = float(erase.max_steps * erase.per_device_train_batch_size * erase.num_starts)
    work = {} if config.sft_model_name_or_path else {"sft": training(config.sft)}
    work |= {"train": training(config.train), "erase": erasing}
    if config.controls:
        work |= {"erase_sft": erasing, "matched_norm": training(config.sft), "erase_matched_norm": erasing}
    if config.run_audit:
        work["audit"] = 4 * training(config.train) + 8 * erasing
    return work | {"eval": 10.0 * held_out}


def _check_stages(config: PipelineConfig, prepared: Prepared) -> None:
    """Raise now what a later stage would raise about its settings and data."""
    audits: list[Any] = [config.audit] if config.run_audit else []
    for section in (config.sft, config.train, config.erase, config.eval, *audits):
        resolve_device(section.device)
    for stage in (config.sft, config.train):
        training_items(prepared, stage, say=_silent)
    for name in filter(None, (config.train.initial_carrier, *config.train.separate_from)):
        Carrier.from_pretrained(name)
    _eraser_prompts(prepared, config.erase)
    for held_out in (config.eval, *audits):
        prompt_ids(prepared, held_out.split, limit=held_out.num_prompts, max_length=held_out.max_prompt_length)
    longest = config.eval.max_prompt_length
    off_topic_ids(prepared, config.eval.split, limit=config.eval.num_prompts, max_length=longest)
    text_and_harness(config.eval, prepared)
