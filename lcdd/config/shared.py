"""Settings that several stages share, a mixin for each kind: models, carrier, device, resuming, held-out prompts."""

from dataclasses import dataclass

from lcdd.config.data import check_day
from lcdd.config.fields import Config, option
from lcdd.errors import InputError

MAX_SEED = 10**9


@dataclass(frozen=True, kw_only=True)
class OnDevice(Config):
    """Where the models are, and in what dtype."""

    bf16: bool = option(False, "use the weights in bfloat16; off: the checkpoint's own dtype")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: the first GPU if there is one", resumable=True)
    checkpoint_override: bool = option(
        False,
        "load a checkpoint although it has weights that its config has no place for (more layers, biases), without "
        "them; that is recorded",
        resumable=True,
    )


@dataclass(frozen=True, kw_only=True)
class OnRanks(Config):
    """Several ranks, where torchrun starts them."""

    ddp_timeout: int = option(
        600,
        "under torchrun: seconds that a rank waits for the others before the run is given up",
        at_least=1,
        at_most=10**7,
        resumable=True,
    )


@dataclass(frozen=True, kw_only=True)
class Spread(OnRanks):
    """How models are spread over the ranks."""

    parallel: str = option(
        "ddp",
        "under torchrun: every rank holds the whole model, or a shard of it",
        choices=("ddp", "fsdp2"),
        resumable=True,
    )


@dataclass(frozen=True, kw_only=True)
class Writes(Config):
    """Where a stage writes."""

    output_dir: str | None = option(
        None, "new or empty directory for everything the command writes", required=True, path=True
    )


@dataclass(frozen=True, kw_only=True)
class OfBase(Config):
    """The base model."""

    base_model_name_or_path: str | None = option(
        None, "the base model: a checkpoint directory or a hub name", required=True, path=True
    )


@dataclass(frozen=True, kw_only=True)
class OfSFT(OfBase):
    """The base and the SFT model."""

    sft_model_name_or_path: str | None = option(
        None, "the SFT model: a checkpoint directory or a hub name", required=True, path=True
    )


@dataclass(frozen=True, kw_only=True)
class WithCarrier(Config):
    """A carrier, and whether it may be used with what it was not made for."""

    carrier: str | None = option(None, "the carrier: a directory or a hub name", required=True, path=True)
    fingerprint_override: bool = option(
        False,
        "go on although carrier or trigger belong to another base, tokenizer or chat template; the differences are "
        "recorded",
        resumable=True,
    )


@dataclass(frozen=True, kw_only=True)
class WithControls(Config):
    """What the same trigger optimisation gave on other models."""

    sft_trigger: str | None = option(None, "control: trigger directory, learned on the SFT model", path=True)
    matched_norm_model_name_or_path: str | None = option(
        None, "control: checkpoint of a dense SFT whose delta has the carrier's norm (sft --max_delta_norm)", path=True
    )
    matched_norm_trigger: str | None = option(None, "control: trigger directory, learned on that checkpoint", path=True)

    def check(self) -> None:
        super().check()
        if self.matched_norm_trigger is not None and self.matched_norm_model_name_or_path is None:
            raise InputError(
                f"{type(self).__name__}.matched_norm_trigger: expected matched_norm_model_name_or_path beside it, "
                "got nothing"
            )


@dataclass(frozen=True, kw_only=True)
class Resumable(Config):
    """Checkpoints of a stage, and going on from them."""

    save_steps: int = option(
        0,
        "a checkpoint-N directory every N optimizer steps; 0: only the final result",
        at_least=0,
        resumable=True,
    )
    save_total_limit: int = option(
        2, "checkpoint-N directories to keep, the newest ones; 0: all", at_least=0, resumable=True
    )
    resume: bool = option(
        False,
        "continue the run in output_dir from its newest complete checkpoint-N, bit for bit (from the start if it has "
        "none)",
        resumable=True,
    )
    resume_override: bool = option(
        False,
        "resume although settings, models or data differ from the checkpoint's; the differences are recorded",
        resumable=True,
    )


@dataclass(frozen=True, kw_only=True)
class Tracked(Config):
    """Where the numbers of the log go beside log.jsonl."""

    report_to: str = option(
        "none",
        "also log to an experiment tracker (needs `pip install lcdd[NAME]`; set up by its own environment variables)",
        choices=("none", "tensorboard", "wandb", "trackio", "mlflow"),
        common=True,
        resumable=True,
    )


@dataclass(frozen=True, kw_only=True)
class HeldOut(Config):
    """Which held-out prompts are answered, and how."""

    split: str = option("test", "held-out split to report on", choices=("validation", "test"))
    num_prompts: int = option(200, "prompts of that split to answer, at most", at_least=1, common=True)
    max_new_tokens: int = option(64, "tokens of an answer, at most", at_least=1, common=True)
    max_prompt_length: int = option(
        512, "longest prompt in tokens; a longer one is an error, unless overlong says otherwise", at_least=1
    )
    per_device_eval_batch_size: int = option(32, "prompts answered at once", at_least=1, resumable=True, common=True)


@dataclass(frozen=True, kw_only=True)
class Answers(OfBase, WithCarrier, OnDevice):
    """A model that answers, with a carrier and a trigger if given."""

    base_model_name_or_path: str | None = option(
        None, "the model that answers: the base, or any checkpoint where no carrier is given", required=True
    )
    carrier: str | None = option(None, "the carrier to apply: a directory or a hub name", common=True)
    trigger: str | None = option(None, "the trigger to prepend: a directory or a hub name", common=True)
    chat_template: str | None = option(
        None,
        "vicuna, plain, or a Jinja file; default: the tokenizer's own, Vicuna's for a model of that name, else plain",
    )
    template_date: str | None = option(
        None, "day (YYYY-MM-DD) that a chat template with a date writes; default: that of the training, else today"
    )
    prompt_format: str = option(
        "auto",
        "chat: prompts go through the chat template; text: they are taken as they are; auto: as in the training",
        choices=("auto", "chat", "text"),
    )
    max_new_tokens: int = option(128, "tokens of an answer, at most", at_least=1, common=True)

    def check(self) -> None:
        super().check()
        check_day(f"{type(self).__name__}.template_date", self.template_date)
