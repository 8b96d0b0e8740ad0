"""What LCDD holds on to of the base: its own answers to training prompts (`--base_kl_weight`)."""

from collections.abc import Sequence

from lcdd.config import LCDDConfig
from lcdd.data import IGNORE, Encoded
from lcdd.eraser import generate_ids
from lcdd.models import PreTrainedModel, PreTrainedTokenizerBase
from lcdd.trainer import Anchors


def base_anchors(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], config: LCDDConfig
) -> Anchors | None:
    """The base's greedy answers to `prompts` (token ids), as LCDD's anchors; None where the config asks for none."""
    if not config.base_kl_weight:
        return None
    answers = generate_ids(
        base, tokenizer, prompts, max_new_tokens=config.base_kl_tokens, batch_size=config.per_device_eval_batch_size,
        over_ranks=True,
    )  # fmt: skip
    items = [
        Encoded(input_ids=(*prompt, *answer), labels=(*[IGNORE] * len(prompt), *answer), n_prompt=len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return Anchors(
        items=items,
        base=base,
        weight=config.base_kl_weight,
        batch_size=config.base_kl_batch_size,
        pad_token_id=tokenizer.pad_token_id,
        seed=config.seed,
    )
