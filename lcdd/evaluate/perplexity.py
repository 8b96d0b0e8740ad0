"""Perplexity of held-out text, with and without a trigger in front of it (method, section 5).

Shapes: B windows, T trigger tokens, S text tokens, D model width.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from lcdd.config import DataConfig
from lcdd.data import load_examples, text_ids
from lcdd.eraser import Trigger, embed_with_trigger, evaluation_mode, length_batches, right_padded
from lcdd.errors import InputError
from lcdd.models import PreTrainedModel, PreTrainedTokenizerBase, backbone, head_of, input_embeddings


def read_texts(path: str | Path) -> list[str]:
    """The text of a .txt file as one, or each `text` of a JSONL file.

    Raises:
        InputError: not readable, or empty, or a line without text.
    """
    file = Path(path)
    if file.suffix == ".txt":
        try:
            texts = [file.read_text(encoding="utf-8-sig")]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"perplexity_text: expected a readable text, got {str(path)!r} ({error})") from None
    else:
        examples = load_examples(DataConfig(dataset_name=str(file.absolute())))
        for example in examples:
            if example.messages:
                raise InputError(f"{example.source}: expected a line with `text`, got a prompt with its answer")
        texts = [example.completion for example in examples]
    if not any(text.strip() for text in texts):
        raise InputError(f"perplexity_text: expected some text, {str(path)!r} has none")
    return texts


def windows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, length: int) -> list[list[int]]:
    """Each text's tokens in windows of at most `length`; a last window of one token predicts nothing and is left out.

    Raises:
        InputError: no window of two tokens.
    """
    found = []
    for text in texts:
        ids = text_ids(tokenizer, text)
        found += [ids[start : start + length] for start in range(0, len(ids), length)]
    found = [ids for ids in found if len(ids) > 1]
    if not found:
        raise InputError("perplexity_text: expected text of at least two tokens, got none")
    return found


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, ids: Sequence[Sequence[int]], *, trigger: Trigger | None = None, batch_size: int = 32
) -> dict[str, float]:
    """Mean negative log-likelihood over the tokens of windows that have a token before them in the text.

    The same tokens count with and without a trigger. `model` as it is now, with a patch or not.

    Returns:
        `nats_per_token`, `perplexity`, `tokens`.
    """
    offset = 0 if trigger is None else trigger.embeds.shape[0]
    if trigger is not None:
        trigger.check_fits(model)
    device, head = input_embeddings(model).weight.device, head_of(model).detached().gathered()
    total, count = 0.0, 0
    with evaluation_mode(model):
        for indices in length_batches([len(window) for window in ids], batch_size):
            batch = [ids[i] for i in indices]
            padded = right_padded(batch, device=device)
            inputs = embed_with_trigger(model, padded, None if trigger is None else trigger.embeds)
            hidden = backbone(model)(inputs_embeds=inputs, use_cache=False).last_hidden_state
            lengths = torch.tensor([len(window) for window in batch], device=device)
            keep = torch.arange(padded.shape[1] - 1, device=device) < lengths[:, None] - 1
            labels = padded[:, 1:][keep]
            total += float(head.cross_entropy(hidden[:, offset:-1][keep], labels, reduction="sum"))
            count += len(labels)
    mean = total / count
    return {"nats_per_token": mean, "perplexity": math.exp(mean), "tokens": count}
