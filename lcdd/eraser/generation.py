"""How models answer, with and without a trigger in front of the prompt; batches equal one prompt at a time.

Shapes: B prompts, T trigger tokens, S prompt (and answer) tokens, D model width, V vocabulary.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcdd.data import Example, encode_prompt, text_ids
from lcdd.eraser.trigger import Prompt, Trigger, prompt_embeds
from lcdd.errors import InputError
from lcdd.models import PreTrainedModel, PreTrainedTokenizerBase, backbone, input_embeddings, shards
from lcdd.report import Bar

if TYPE_CHECKING:
    from lcdd.eraser.prefix import PrefixPatch


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of prompts, by the one function that training has them from.

    An example is asked as it was trained on. Text is taken as it is: what a chat template wrote has its special tokens
    already, plain text gets what the tokenizer puts in front of it (`lcdd.data.text_ids`).
    """
    encoded = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, Example):
            encoded.append(encode_prompt(tokenizer, prompt))
            continue
        ids = text_ids(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise InputError(f"prompts[{index}]: expected at least one token, got none")
        encoded.append(ids)
    return encoded


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    trigger: Trigger | None = None,
    prefix: "PrefixPatch | None" = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: bool = False,
) -> list[str]:
    """Greedy answers as text without special tokens, in the order of `prompts`; settings as of `generate_ids`."""
    answers = generate_ids(
        model,
        tokenizer,
        encode_prompts(tokenizer, prompts),
        trigger=trigger,
        prefix=prefix,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    return decode(tokenizer, answers)


@torch.no_grad()
def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    trigger: Trigger | None = None,
    prefix: "PrefixPatch | None" = None,
    max_new_tokens: int = 64,
) -> Iterator[str]:
    """The greedy answer to one prompt, piece by piece as it comes; the pieces together are the answer's text.

    A piece is held back while it ends inside a character of several tokens. Whoever stops listening stops the model.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    _, ends = _greedy(model, tokenizer, max_new_tokens)
    (ids,) = encode_prompts(tokenizer, [prompt])
    _check_switch(model, [ids], trigger, prefix)
    warn_of_length(model, [ids], n_virtual=_rows(trigger), max_new_tokens=max_new_tokens)
    behind = len(prefix.token_ids) if prefix is not None else 0
    inputs: dict[str, Any] = {"inputs_embeds": prompt_embeds(model, ids[behind:], trigger)[None]}
    answer: list[int] = []
    cache: Any = prefix.cache_of(1) if prefix is not None else None
    shown = ""
    with evaluation_mode(model):
        while len(answer) < max_new_tokens and not (answer and answer[-1] in ends):
            output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token, cache = output.logits[:, -1].argmax(-1), output.past_key_values
            answer.append(int(token))
            inputs = {"input_ids": token[:, None]}
            text = _text(tokenizer, answer)
            # a replacement character at the end is a character that is not complete yet
            if text.startswith(shown) and not text.endswith("\ufffd") and len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
    text = _text(tokenizer, answer)
    if len(text) > len(shown):
        yield text[len(shown) :]


def decode(tokenizer: PreTrainedTokenizerBase, answers: Sequence[Sequence[int]]) -> list[str]:
    """Answers as text, special tokens and surrounding white space removed."""
    return [_text(tokenizer, ids).strip() for ids in answers]


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    trigger: Trigger | None = None,
    prefix: "PrefixPatch | None" = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: bool = False,
    over_ranks: bool = False,
) -> list[list[int]]:
    """Greedy answers as token ids, each up to and including its end token where it has one.

    Padding goes in front of the trigger and is masked, and positions start at the first real token, so that an answer
    does not depend on what else is in its batch. Behind a prefix prompts of one length run together, unpadded.

    Args:
        trigger, prefix: the off switch, of which there is one at most: learned embeddings in front of each prompt, or
            the base's keys and values on the tokens that each prompt begins with.
        over_ranks: called on every rank alike, each answers its share of the same batches that one rank would make, and
            all get all answers.
    """
    _check_switch(model, prompts, trigger, prefix)
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    settings, ends = _greedy(model, tokenizer, max_new_tokens)
    warn_of_length(model, prompts, n_virtual=_rows(trigger), max_new_tokens=max_new_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    batches, fillers = list(length_batches([len(ids) for ids in prompts], batch_size)), 0
    if prefix is not None:
        batches = [list(same) for batch in batches for _, same in groupby(batch, key=lambda i: len(prompts[i]))]
    if over_ranks:
        batches, fillers = _shared_out(batches, model)
    in_step = over_ranks and shards.holds_shards(model)  # every rank takes part in each forward, to the longest answer
    greedily: Any = model.generate  # transformers types it as a module's attribute
    bar = Bar(sum(map(len, batches[: len(batches) - fillers])), "answers", hidden=not progress)
    with evaluation_mode(model), _generation_settings(model, settings), bar:
        for number, indices in enumerate(batches):
            chosen = [prompts[i] for i in indices]
            if prefix is None:
                embeds, mask = _left_padded(model, chosen, trigger)
                output = greedily(inputs_embeds=embeds, attention_mask=mask, synced_gpus=in_step)
            else:  # given token ids, transformers answers with them in front
                output = greedily(**prefix.inputs(chosen), synced_gpus=in_step)[:, len(chosen[0]) :]
            if number >= len(batches) - fillers:
                continue
            for index, ids in zip(indices, output.tolist(), strict=True):
                stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
                answers[index] = ids[:stop]
            bar.update(len(indices))
    return shards.merged(answers) if over_ranks else answers


def _shared_out(batches: list[list[int]], model: PreTrainedModel) -> tuple[list[list[int]], int]:
    """This rank's batches, and how many at their end are fillers: all ranks of a sharded model have as many."""
    mine = batches[shards.rank() :: shards.world_size()]
    fillers = -(-len(batches) // shards.world_size()) - len(mine) if shards.holds_shards(model) else 0
    return mine + batches[:1] * fillers, fillers


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, so that little of a batch is padding."""
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1, got {batch_size}")
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def right_padded(sequences: Sequence[Sequence[int]], *, device: torch.device | str) -> Tensor:
    """Token ids [B, S], zeros after each sequence's end.

    Under causal attention no token sees what comes after it, so a forward over these needs no mask, and what it
    gives at a real position is what the sequence gives alone.
    """
    width = max(len(ids) for ids in sequences)
    return torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in sequences], device=device)


def embed_with_trigger(model: PreTrainedModel, ids: Tensor, embeds: Tensor | None) -> Tensor:
    """[B, T + S, D] in the model's dtype: trigger embeddings [T, D], then those of `ids` [B, S]."""
    tokens = input_embeddings(model)(ids)
    if embeds is None:
        return tokens
    return torch.cat([embeds.to(tokens).expand(ids.shape[0], -1, -1), tokens], dim=1)


@torch.no_grad()
def response_hidden(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    trigger: Trigger | None = None,
    batch_size: int = 32,
) -> list[Tensor]:
    """Final hidden states [len(answer), D] that predict each answer's tokens, teacher-forced, one tensor a prompt.

    Row j of a prompt predicts answer token j: row 0 is read at the prompt's last token.
    """
    embeds = None if trigger is None else trigger.embeds
    offset = 0 if embeds is None else embeds.shape[0]
    device = input_embeddings(model).weight.device
    sequences = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    with evaluation_mode(model):
        for indices in length_batches([len(ids) for ids in sequences], batch_size):
            ids = right_padded([sequences[i] for i in indices], device=device)
            inputs = embed_with_trigger(model, ids, embeds)
            hidden = backbone(model)(inputs_embeds=inputs, use_cache=False).last_hidden_state
            for row, index in enumerate(indices):
                first = offset + len(prompts[index]) - 1
                found[index] = hidden[row, first : first + len(answers[index])].clone()
    return found


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """`model.eval()` inside; as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check_switch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], trigger: Trigger | None, prefix: "PrefixPatch | None"
) -> None:
    if trigger is not None and prefix is not None:
        raise InputError("prefix: expected one off switch, a trigger or a prefix, got both")
    if trigger is not None:
        trigger.check_fits(model)
    if prefix is not None:
        prefix.check_fits(model, prompts)


def _left_padded(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], trigger: Trigger | None
) -> tuple[Tensor, Tensor]:
    """Embeddings [B, T + S, D] with zero rows in front, and their attention mask."""
    together = [token for ids in prompts for token in ids]  # of a sharded model one collective, on every rank
    tokens = prompt_embeds(model, together, None)
    n_virtual, width = _rows(trigger), max(map(len, prompts)) + _rows(trigger)
    embeds = tokens.new_zeros(len(prompts), width, tokens.shape[1])
    mask = torch.zeros(len(prompts), width, dtype=torch.int64, device=embeds.device)
    for index, row in enumerate(tokens.split([len(ids) for ids in prompts])):
        start = width - len(row)
        embeds[index, start:] = row
        mask[index, start - n_virtual :] = 1
        if trigger is not None:
            embeds[index, start - n_virtual : start] = trigger.embeds.to(row)
    return embeds, mask


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> tuple[Any, set[int]]:
    """Greedy generation settings, and the end tokens of model and tokenizer."""
    stated = model.generation_config.eos_token_id
    ends = set(stated if isinstance(stated, list) else [] if stated is None else [stated])
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    settings = type(model.generation_config)(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    return settings, ends


def _rows(trigger: Trigger | None) -> int:
    return 0 if trigger is None else trigger.embeds.shape[0]


def warn_of_length(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, n_virtual: int, max_new_tokens: int
) -> None:
    """Warn if an answer may go on beyond the positions that the model was made for: it computes there, but not well.

    No error: answers often end before, and scaled rotary embeddings reach further than the config says.
    """
    longest = max((len(ids) for ids in prompts), default=0)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and n_virtual + longest + max_new_tokens > limit:
        warnings.warn(
            f"{n_virtual} trigger tokens, a prompt of {longest} and {max_new_tokens} new tokens are more "
            f"than the model's max_position_embeddings = {limit}; answers beyond it are not to be relied on",
            stacklevel=3,
        )


@contextmanager
def _generation_settings(model: PreTrainedModel, settings: Any) -> Iterator[None]:
    """`settings` instead of the checkpoint's own, which `generate` would fill the gaps from (a repetition penalty)."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own
