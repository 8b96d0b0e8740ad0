"""LCDD in TRL's SFTTrainer: its data formats, templates, masks and packing, and LCDD's optimizer.

    trainer = LCDDSFTTrainer(model=sft, base=base, config=LCDDConfig(), args=SFTConfig(...), train_dataset=dataset)
    trainer.train()
    trainer.save_carrier("carrier/")

Everything of `lcdd.integrations.transformers` holds. Beside TRL's own formats (messages, prompt + completion, text,
token ids) a data set may have Alpaca's columns, instruction, input and output; those become the ids that `lcdd train`
makes of them.
"""

from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from lcdd.config import LCDDConfig
from lcdd.data import encode, parse_row
from lcdd.integrations.transformers import LCDDTrainer
from lcdd.models import PreTrainedModel, load_tokenizer

_ALPACA = {"instruction", "output"}
_NO_LIMIT = 10**9


class LCDDSFTTrainer(LCDDTrainer, SFTTrainer):
    """An SFTTrainer whose optimizer is LCDD's; arguments as of LCDDTrainer, others as of SFTTrainer.

    Raises:
        InputError: a record with Alpaca's columns that cannot be encoded (its number is named).
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        base: PreTrainedModel | str,
        config: LCDDConfig,
        *,
        args: SFTConfig | TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **more: Any,
    ) -> None:
        args = args if args is not None else SFTConfig()
        if processing_class is None:
            processing_class = load_tokenizer(model if isinstance(model, str) else model.config._name_or_path)
        more["processing_class"] = processing_class
        if isinstance(eval_dataset, dict):
            more["eval_dataset"] = {
                name: _encoded(part, f"eval_dataset[{name!r}]", processing_class, args)
                for name, part in eval_dataset.items()
            }
        else:
            more["eval_dataset"] = _encoded(eval_dataset, "eval_dataset", processing_class, args)
        more["train_dataset"] = _encoded(train_dataset, "train_dataset", processing_class, args)
        super().__init__(model, base, config, args=args, **more)


def _encoded(dataset: Any, name: str, tokenizer: Any, args: Any) -> Any:
    """A data set of Alpaca's columns as token ids and labels, which TRL takes as they are; any other one as it is."""
    columns = getattr(dataset, "column_names", None) or []
    if not set(columns) >= _ALPACA:
        return dataset
    limit = getattr(args, "max_length", None) or _NO_LIMIT
    completion_only = getattr(args, "completion_only_loss", None) is not False

    def encode_row(row: dict[str, Any], number: int) -> dict[str, Any]:
        example = parse_row(row, where=f"{name}[{number}]")
        found = encode(tokenizer, example, max_length=limit, completion_only=completion_only)
        return {"input_ids": list(found.input_ids), "labels": list(found.labels)}

    return dataset.map(encode_row, with_indices=True, remove_columns=columns)
