"""A tokenizer against the embedding table of its model: ids that have a row, rows that have a token."""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from lcdd.errors import InputError
from lcdd.models.sites import input_embeddings

logger = logging.getLogger(__name__)

MEDIA = ("image", "boi", "eoi", "video", "audio", "boa", "eoa")
"""How the roles of tokens begin that stand for pictures and sounds: text models keep them without a row."""


def check_ids(tokenizer: Any, n_rows: int, *, where: str) -> None:
    """Raise InputError unless every token of `tokenizer` has one of the `n_rows` rows of the embedding table.

    Placeholders of pictures and sounds need none: no text is made of them (`check_rows` refuses one that is).
    """
    media = {str(token) for role, token in tokenizer.special_tokens_map.items() if role.startswith(MEDIA)}
    beyond = {token: row for token, row in tokenizer.get_vocab().items() if row >= n_rows and token not in media}
    if beyond:
        some = ", ".join(f"{token!r} = {row}" for token, row in sorted(beyond.items(), key=lambda item: item[1])[:3])
        raise InputError(
            f"tokenizer: expected ids below the model's {n_rows} embedding rows (vocab_size) in {where}, got "
            f"{len(beyond)} beyond: {some}; resize the model's embeddings, or take the tokens out of the tokenizer"
        )


def check_rows(ids: Sequence[int], n_rows: int, *, where: str) -> None:
    """Raise InputError unless every one of some token ids is below `n_rows`."""
    if (highest := max(ids, default=0)) >= n_rows:
        raise InputError(f"{where}: expected token ids below the model's {n_rows} embedding rows, got {int(highest)}")


def token_rows(tokenizer: Any, model: PreTrainedModel) -> list[int]:
    """Rows of the model's embedding table that a token has, in order: vocabularies are padded to round numbers."""
    n_rows = input_embeddings(model).weight.shape[0]
    return sorted({row for row in tokenizer.get_vocab().values() if row < n_rows})


def rows_never_drawn(tokenizer: Any, model: PreTrainedModel) -> list[int]:
    """Rows that stand for no text: special tokens, and rows that no token has. Random triggers are made of others."""
    special = {row for row, token in tokenizer.added_tokens_decoder.items() if token.special}
    drawn = set(token_rows(tokenizer, model)) - special - set(tokenizer.all_special_ids)
    return [row for row in range(input_embeddings(model).weight.shape[0]) if row not in drawn]


def agree_on_end(model: PreTrainedModel, tokenizer: Any) -> None:
    """Let answers of `model` end where training ends them, at the tokenizer's end token, wherever else they end too.

    Programs that generate go by the generation_config.json that is saved with the model.
    """
    end, settings = tokenizer.eos_token_id, model.generation_config
    stated = settings.eos_token_id if settings is not None else None
    ends = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if settings is None or end is None or end in ends:
        return
    logger.warning("tokenizer and model do not agree on the end token: %d and %s; answers end at either", end, stated)
    settings.eos_token_id = [*ends, end] if ends else end
