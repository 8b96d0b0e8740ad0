"""Settings of what is done with a carrier and a trigger once they are there: evaluate, audit, generate, report."""

from dataclasses import dataclass

from lcdd.config.fields import Config, option
from lcdd.errors import InputError

DEVICE_HELP = "cpu, cuda, cuda:1, ...; auto: the first GPU if there is one"
BF16_HELP = "use the weights in bfloat16; off: the checkpoint's own dtype"
FINGERPRINT_HELP = (
    "go on although carrier or trigger belong to another base, tokenizer or chat template; the differences are recorded"
)
MAX_SEED = 10**9
BASE_HELP = "the base model: a checkpoint directory or a hub name"
SFT_HELP = "the SFT model: a checkpoint directory or a hub name"
AUDIT_PARTS = ("necessity", "sufficiency", "triggers", "masks", "dense")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Config):
    """Reversal table on held-out prompts: behaviour rate, base match, exact KL (method, section 5)."""

    base_model_name_or_path: str | None = option(None, BASE_HELP, required=True)
    sft_model_name_or_path: str | None = option(None, SFT_HELP, required=True)
    carrier: str | None = option(None, "carrier directory", required=True)
    trigger: str | None = option(None, "trigger directory, learned on the carrier")
    sft_trigger: str | None = option(None, "control: trigger directory, learned on the SFT model")
    matched_norm_model_name_or_path: str | None = option(
        None, "control: checkpoint of a dense SFT whose delta has the carrier's norm (sft --max_delta_norm)"
    )
    matched_norm_trigger: str | None = option(None, "control: trigger directory, learned on that checkpoint")
    output_dir: str | None = option(None, "new or empty directory for report.json and report.html", required=True)
    split: str = option("test", "held-out split to report on", choices=("validation", "test"))
    num_prompts: int = option(200, "prompts of that split to answer, at most", at_least=1)
    max_new_tokens: int = option(64, "tokens of an answer, at most", at_least=1)
    max_prompt_length: int = option(512, "longest prompt in tokens; a longer one is an error", at_least=1)
    per_device_eval_batch_size: int = option(32, "prompts answered at once", at_least=1)
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
    fingerprint_override: bool = option(False, FINGERPRINT_HELP)
    bf16: bool = option(False, BF16_HELP)
    device: str = option("auto", DEVICE_HELP)
    seed: int = option(0, "seed of the random prefixes", at_least=0, at_most=MAX_SEED)

    def check(self) -> None:
        if self.matched_norm_trigger is not None and self.matched_norm_model_name_or_path is None:
            raise InputError(
                "EvalConfig.matched_norm_trigger: expected matched_norm_model_name_or_path beside it, got nothing"
            )


@dataclass(frozen=True, kw_only=True)
class AuditConfig(Config):
    """Controls of a carrier and its trigger, trained with the settings in the summary.json beside each of them."""

    base_model_name_or_path: str | None = option(None, BASE_HELP, required=True)
    sft_model_name_or_path: str | None = option(None, SFT_HELP, required=True)
    carrier: str | None = option(None, "carrier directory, as `lcdd train` left it", required=True)
    trigger: str | None = option(None, "trigger directory, as `lcdd erase` left it", required=True)
    sft_trigger: str | None = option(None, "trigger directory, learned on the SFT model; learned if not given")
    matched_norm_model_name_or_path: str | None = option(
        None, "checkpoint of a dense SFT whose delta has the carrier's norm (sft --max_delta_norm)"
    )
    matched_norm_trigger: str | None = option(
        None, "trigger directory, learned on that checkpoint; learned if not given"
    )
    output_dir: str | None = option(None, "new or empty directory for report.json and report.html", required=True)
    parts: tuple[str, ...] = option(
        AUDIT_PARTS, "what to audit; necessity trains nothing, masks and dense train the most", choices=AUDIT_PARTS
    )
    split: str = option("test", "held-out split to report on", choices=("validation", "test"))
    num_prompts: int = option(200, "prompts of that split to answer, at most", at_least=1)
    max_new_tokens: int = option(64, "tokens of an answer, at most", at_least=1)
    max_prompt_length: int = option(512, "longest prompt in tokens; a longer one is an error", at_least=1)
    per_device_eval_batch_size: int = option(32, "prompts answered at once", at_least=1)
    random_draws: int = option(3, "random masks, channels and prefixes that are pooled", at_least=1)
    fingerprint_override: bool = option(False, FINGERPRINT_HELP)
    bf16: bool = option(False, BF16_HELP)
    device: str = option("auto", DEVICE_HELP)
    seed: int = option(0, "seed of everything random in the controls", at_least=0, at_most=MAX_SEED)

    def check(self) -> None:
        if self.matched_norm_trigger is not None and self.matched_norm_model_name_or_path is None:
            raise InputError(
                "AuditConfig.matched_norm_trigger: expected matched_norm_model_name_or_path beside it, got nothing"
            )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Config):
    """Answers of a model, optionally with a carrier applied and a trigger prepended."""

    base_model_name_or_path: str | None = option(
        None, "the model that answers: the base, or any checkpoint where no carrier is given", required=True
    )
    carrier: str | None = option(None, "carrier directory to apply")
    trigger: str | None = option(None, "trigger directory to prepend")
    prompt: tuple[str, ...] = option((), "one or more prompts", required=True)
    stream: bool = option(False, "print each answer token by token")
    chat_template: str | None = option(
        None,
        "vicuna, plain, or a Jinja file; default: the tokenizer's own, Vicuna's for a model of that name, else plain",
    )
    max_new_tokens: int = option(128, "tokens of an answer, at most", at_least=1)
    fingerprint_override: bool = option(False, FINGERPRINT_HELP)
    bf16: bool = option(False, BF16_HELP)
    device: str = option("auto", DEVICE_HELP)

    def check(self) -> None:
        for text in self.prompt:
            if not text.strip():
                raise InputError(f"GenerateConfig.prompt: expected text in every prompt, got {text!r}")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Config):
    """Render report.html again from report.json (and log.jsonl beside it)."""

    output_dir: str | None = option(None, "run directory that holds report.json", required=True)
