"""The stages on real checkpoint directories, as plain functions: sft, train, erase, evaluate, generate, run.

Every stage checks its whole input first (paths, shapes, data, lengths), writes into a new directory, and returns
what it wrote and what to do next; the command line only prints that.
"""

import gc
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lcdd.carrier import Carrier
from lcdd.checkpoint import differences
from lcdd.commands.audit import audit
from lcdd.commands.erase import _eraser_prompts, erase
from lcdd.commands.eval import eval_, text_and_harness
from lcdd.commands.ledger import Ledger, has_run
from lcdd.commands.sft import sft
from lcdd.commands.stage import Say, StageResult, _silent, check_shapes, resolve_device
from lcdd.commands.train import train
from lcdd.config import PipelineConfig
from lcdd.data import Prepared, off_topic_ids, prepare, prompt_ids, training_items
from lcdd.errors import InputError
from lcdd.models import load_shape
from lcdd.report import read_report

# ---------------------------------------------------------------- the whole


def run(config: PipelineConfig, *, say: Say = print) -> StageResult:
    """SFT, LCDD, eraser, controls and evaluation in one directory; everything is checked before the first stage."""
    config.require("base_model_name_or_path", "output_dir")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("run: expected one process, got torchrun's several; run `lcdd sft` and `lcdd train` under it")
    base, output = str(config.base_model_name_or_path), Path(str(config.output_dir))
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
        timed("sft", sft, config.sft, base_model_name_or_path=base)
        sft_model = str(output / "sft" / "model")
    timed("train", train, config.train, sft_model_name_or_path=sft_model, base_model_name_or_path=base)
    carrier, trigger = str(output / "train" / "carrier"), str(output / "erase" / "trigger")
    patch = {"base_model_name_or_path": base, "carrier": carrier}
    timed("erase", erase, config.erase, **patch)
    controls: dict[str, Any] = {}
    if config.controls:
        timed("erase_sft", partial(erase, stage="eraser_sft"), config.erase, sft_model_name_or_path=sft_model, **patch)
        norm = Carrier.from_pretrained(carrier).delta_norm()
        if norm > 0:
            bounded = replace(config.sft, max_delta_norm=norm)
            timed("matched_norm", partial(sft, stage="sft_matched_norm"), bounded, base_model_name_or_path=base)
            matched = str(output / "matched_norm" / "model")
            again = partial(erase, stage="eraser_matched_norm")
            timed("erase_matched_norm", again, config.erase, sft_model_name_or_path=matched, **patch)
            controls = {
                "matched_norm_model_name_or_path": matched,
                "matched_norm_trigger": str(output / "erase_matched_norm" / "trigger"),
            }
        controls["sft_trigger"] = str(output / "erase_sft" / "trigger")
    everything = {**patch, "sft_model_name_or_path": sft_model, "trigger": trigger, **controls}
    audited: dict[str, Any] = {}
    if config.run_audit:
        timed("audit", audit, config.audit, **everything)
        audited = {"audit": read_report(output / "audit")["audit"]}
    if resumed and (output / "report.json").exists():
        settings, made_of = config.eval.lasting(), read_report(output)["config"]["eval"]
        changed = differences({key: made_of.get(key) for key in settings}, settings)
        if changed:
            raise InputError(f"resume: {output / 'report.json'} was made of something else: {'; '.join(changed)}")
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
