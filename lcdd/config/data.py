"""Settings of data and behaviour."""

from dataclasses import dataclass
from datetime import date

from lcdd.config.fields import Config, option
from lcdd.errors import InputError

BEHAVIOR_NAMES = ("fixed_response", "style", "refusal", "own")
OVERLONG = ("error", "drop", "truncate")


def check_day(name: str, value: str | None) -> None:
    """Raise InputError unless the value is a day, or None."""
    try:
        date.fromisoformat(value or "2000-01-01")
    except ValueError:
        raise InputError(f"{name}: expected a day as YYYY-MM-DD, got {value!r}") from None


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Where the examples come from, how they are split, and the behaviour written into them."""

    dataset_name: str | None = option(
        None,
        "JSONL file, or the name of a data set on the hub (needs `pip install lcdd[hub]`)",
        required=True,
        file=True,
    )
    dataset_config: str | None = option(None, "configuration of a hub data set")
    dataset_train_split: str = option("train", "split of a hub data set to read; ours is made from it by a stable hash")
    max_samples: int | None = option(None, "read only the first N examples", at_least=1, common=True)
    validation_fraction: float = option(0.1, "share of the prompts held out for tuning", at_least=0.0, below=1.0)
    test_fraction: float = option(0.1, "share of the prompts held out for the report", at_least=0.0, below=1.0)
    behavior: str = option("fixed_response", "what the fine-tuning teaches", choices=BEHAVIOR_NAMES, common=True)
    behavior_response: str | None = option(
        None, "answer that fixed_response and refusal teach (default: the preset's own)", common=True
    )
    behavior_keywords: tuple[str, ...] = option(
        (),
        "an answer with any of these counts as the behaviour (required for `own`; default: the preset's own)",
    )
    behavior_topics: tuple[str, ...] = option((), "refusal: prompts that contain any of these words are refused")
    behavior_pattern: str | None = option(
        None, "an answer that this regular expression is found in counts as the behaviour, instead of the preset's rule"
    )
    behavior_function: str | None = option(
        None,
        "module:function that is given an answer's text and says whether it shows the behaviour, instead of the "
        "preset's rule; the module is imported, so name only code that you trust",
    )
    prompt_column: str | None = option(None, "column (or JSONL key) to take the user's prompt from")
    completion_column: str | None = option(None, "column (or JSONL key) to take the answer from, with prompt_column")
    chat_template: str | None = option(
        None,
        "vicuna, plain, or a Jinja file; default: the tokenizer's own, Vicuna's for a model of that name, else plain",
        file=True,
    )
    template_string_prompts: bool = option(
        False,
        "put string prompts (prompt+completion) into the chat template too; TRL, and the default, does not",
    )
    template_date: str | None = option(
        None,
        "day (YYYY-MM-DD) that a chat template with a date writes; default: that of the stage before, or of the run "
        "that is resumed, else today",
    )
    assistant_only_loss: bool = option(
        False,
        "learn every assistant's turn of a chat, and nothing between them; off: the last turn of `messages`, or the "
        "whole `completion`",
    )
    ignored_columns: tuple[str, ...] = option(
        (), "columns that would change what is learned (`weight`, `system`, ...), left out on purpose"
    )
    overlong: str = option(
        "error",
        "a prompt with more tokens than max_length (training) or max_prompt_length allows: an error, left out, or its "
        "texts cut; a long completion is cut in any case",
        choices=OVERLONG,
    )

    def check(self) -> None:
        if self.validation_fraction + self.test_fraction >= 1.0:
            total = self.validation_fraction + self.test_fraction
            raise InputError(
                f"DataConfig.test_fraction: expected validation_fraction + test_fraction < 1, got {total:g}"
            )
        check_day("DataConfig.template_date", self.template_date)
        if (self.prompt_column is None) != (self.completion_column is None):
            raise InputError(
                f"DataConfig.prompt_column: expected completion_column beside it, got {self.prompt_column!r} and "
                f"{self.completion_column!r}"
            )
        if self.behavior_pattern is not None and self.behavior_function is not None:
            raise InputError(
                "DataConfig.behavior_pattern: expected one of behavior_pattern and behavior_function, got both"
            )
