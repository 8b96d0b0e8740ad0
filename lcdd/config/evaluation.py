"""Settings of what is done with a carrier and a trigger once they are there: evaluate, audit, generate, report."""

from dataclasses import dataclass

from lcdd.config.fields import Config, option
from lcdd.config.shared import (
    MAX_SEED,
    Answers,
    HeldOut,
    OfBase,
    OfSFT,
    OnDevice,
    Spread,
    WithCarrier,
    WithControls,
    Writes,
)
from lcdd.errors import InputError

AUDIT_PARTS = ("necessity", "sufficiency", "triggers", "masks", "dense")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Writes, HeldOut, WithControls, WithCarrier, Spread, OnDevice, OfSFT):
    """Reversal table on held-out prompts: behaviour rate, base match, exact KL (method, section 5)."""

    trigger: str | None = option(None, "trigger directory, learned on the carrier", common=True, path=True)
    kl_prompts: int = option(64, "prompts for the exact KLs", at_least=1)
    random_prefixes: int = option(3, "control: prefixes of random tokens, as long as the trigger", at_least=1)
    perplexity_text: str | None = option(
        None, "held-out text for perplexities: a .txt file, or JSONL with a `text` in each line"
    )
    perplexity_tokens: int = option(512, "the text is read in windows of this many tokens", at_least=2)
    tasks: tuple[str, ...] = option(
        (),
        "lm-evaluation-harness tasks (or their YAML files), with and without trigger: mmlu,hellaswag "
        "(needs `pip install lcdd[eval]`)",
    )
    tasks_limit: int | None = option(None, "examples of each task, at most", at_least=1)
    seed: int = option(0, "seed of the random prefixes", at_least=0, at_most=MAX_SEED)


@dataclass(frozen=True, kw_only=True)
class AuditConfig(Writes, HeldOut, WithControls, WithCarrier, Spread, OnDevice, OfSFT):
    """Controls of a carrier and its trigger, trained with the settings in the summary.json beside each of them."""

    trigger: str | None = option(None, "trigger directory, as `lcdd erase` left it", required=True, path=True)
    parts: tuple[str, ...] = option(
        AUDIT_PARTS, "what to audit; necessity trains nothing, masks and dense train the most", choices=AUDIT_PARTS
    )
    random_draws: int = option(3, "random masks, channels and prefixes that are pooled", at_least=1)
    seed: int = option(0, "seed of everything random in the controls", at_least=0, at_most=MAX_SEED)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Answers):
    """Answers of a model, optionally with a carrier applied and a trigger prepended."""

    prompt: tuple[str, ...] = option((), "one or more prompts", required=True)
    stream: bool = option(False, "print each answer token by token", common=True)

    def check(self) -> None:
        super().check()
        for text in self.prompt:
            if not text.strip():
                raise InputError(f"GenerateConfig.prompt: expected text in every prompt, got {text!r}")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(Answers):
    """Base, carrier and carrier with trigger side by side, on prompts that are typed or piped in, one a line."""

    carrier: str | None = option(None, "the carrier: a directory or a hub name", required=True)


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Writes, OfBase, OnDevice):
    """A carrier in a format that others load."""

    carrier: str | None = option(None, "the carrier: a directory or a hub name", required=True)
    format: str = option(
        "delta",
        "delta: safetensors by parameter name, to be added to the base's; peft: a LoRA adapter that is the open blocks "
        "exactly (needs `pip install lcdd[peft]`)",
        choices=("delta", "peft"),
        common=True,
    )


@dataclass(frozen=True, kw_only=True)
class ComposeConfig(Writes):
    """Several carriers of one base as one."""

    carriers: tuple[str, ...] = option((), "carriers that are added up: directories or hub names", required=True)
    without: tuple[str, ...] = option((), "carriers that are taken away: B - A", common=True)

    def check(self) -> None:
        super().check()
        if len(self.carriers) + len(self.without) < 2:
            raise InputError(
                f"ComposeConfig.carriers: expected at least two with those of without, got {self.carriers}"
            )


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Config):
    """Render report.html again from report.json (and log.jsonl beside it)."""

    output_dir: str | None = option(None, "run directory that holds report.json", required=True)
