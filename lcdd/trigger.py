"""The trigger: a few learned embeddings in front of a prompt, and how models are run with and without one.

On disk a trigger is a PEFT prompt-tuning adapter, so `PeftModel.from_pretrained(carrier_model, directory)` loads it.
PEFT puts it in front of any left padding, which moves every position and so shifts the logits; `generate` here pads in
front of the trigger and masks the padding, so that a batch equals one prompt at a time. Serve with PEFT one prompt at a
time, or pad on the right.

Shapes: B prompts, T trigger tokens, S prompt (and answer) tokens, D model width, V vocabulary.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from lcdd.checkpoint import MANIFEST, WrongFingerprint, verify_directory, write_directory, write_json
from lcdd.models import PreTrainedModel, PreTrainedTokenizerBase, backbone, input_embeddings, shape_of

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

Prompt = str | Sequence[int]
"""A prompt as the model sees it: text already in the chat template, or its token ids."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Trigger:
    """Trigger embeddings and where they belong.

    embeds: float32 [T, D], on the CPU.
    num_layers, num_attention_heads: of the model it was made for (PEFT wants them).
    base_model_name_or_path: what PEFT shows as the base.
    metadata: our own keys, saved in manifest.json (base fingerprint, losses, settings).
    """

    embeds: Tensor
    num_layers: int
    num_attention_heads: int
    base_model_name_or_path: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.embeds.ndim != 2 or self.embeds.numel() == 0:
            raise ValueError(f"embeds: expected shape [T, D], got {tuple(self.embeds.shape)}")
        if self.embeds.dtype != torch.float32:
            raise ValueError(f"embeds: expected torch.float32, got {self.embeds.dtype}")
        if not bool(self.embeds.isfinite().all()):
            raise ValueError("embeds: expected finite values, got NaN or infinity")

    @classmethod
    def for_model(
        cls, model: PreTrainedModel, embeds: Tensor, *, metadata: Mapping[str, Any] | None = None
    ) -> "Trigger":
        """A trigger of `embeds` [T, D] that belongs to `model`."""
        shape = shape_of(model.config)
        trigger = cls(
            embeds=embeds.detach().to("cpu", torch.float32).contiguous(),
            num_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            base_model_name_or_path=str(model.config._name_or_path or ""),
            metadata=dict(metadata or {}),
        )
        trigger.check_fits(model)
        return trigger

    @classmethod
    def random_tokens(cls, model: PreTrainedModel, n_tokens: int, *, seed: int, skip: Sequence[int] = ()) -> "Trigger":
        """Embeddings of `n_tokens` random real tokens (never one of `skip`): an eraser's start, and the control."""
        table = input_embeddings(model).weight.detach()
        allowed = torch.ones(table.shape[0], dtype=torch.bool)
        allowed[[token for token in skip if token < table.shape[0]]] = False
        choices = allowed.nonzero()[:, 0]
        if n_tokens < 1 or len(choices) == 0:
            raise ValueError(f"n_tokens: expected at least 1 of {len(choices)} usable tokens, got {n_tokens}")
        generator = torch.Generator().manual_seed(seed)
        tokens = choices[torch.randint(len(choices), (n_tokens,), generator=generator)]
        return cls.for_model(model, table[tokens.to(table.device)], metadata={"tokens": tokens.tolist(), "seed": seed})

    @classmethod
    def random_like(
        cls, model: PreTrainedModel, trigger: "Trigger", *, seed: int, skip: Sequence[int] = ()
    ) -> "Trigger":
        """Random real tokens scaled to the norms of `trigger`'s: the control of the same length and size."""
        drawn = cls.random_tokens(model, trigger.embeds.shape[0], seed=seed, skip=skip)
        norms = trigger.embeds.norm(dim=1, keepdim=True)
        embeds = drawn.embeds * (norms / drawn.embeds.norm(dim=1, keepdim=True).clamp_min(1e-12))
        return cls.for_model(model, embeds, metadata=drawn.metadata)

    def check_fits(self, model: PreTrainedModel) -> None:
        """Raise ValueError unless the trigger's width and layer count are the model's."""
        shape = shape_of(model.config)
        if self.embeds.shape[1] != shape.d_model:
            raise ValueError(f"trigger: expected width {shape.d_model} as the model has, got {self.embeds.shape[1]}")
        if self.num_layers != shape.n_layers:
            raise ValueError(f"trigger: made for a model of {self.num_layers} layers, this one has {shape.n_layers}")

    def check_base(self, fingerprint: str) -> None:
        """Raise ValueError if the trigger was learned on another base than the one with this `model_fingerprint`."""
        expected = self.metadata.get("base_fingerprint")
        if expected not in (None, fingerprint):
            raise WrongFingerprint(
                f"trigger: expected the base that it was learned on, of fingerprint {str(expected)[:16]}…, "
                f"got one of {fingerprint[:16]}…"
            )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the adapter, load it back and compare.

        Raises:
            OSError: what was read back is not what was written.
        """
        with write_directory(directory, metadata={"lcdd": dict(self.metadata)}) as folder:
            save_file({"prompt_embeddings": self.embeds}, folder / ADAPTER_WEIGHTS)
            config = {
                "peft_type": "PROMPT_TUNING",
                "task_type": "CAUSAL_LM",
                "inference_mode": True,
                "prompt_tuning_init": "RANDOM",
                "num_virtual_tokens": self.embeds.shape[0],
                "token_dim": self.embeds.shape[1],
                "num_transformer_submodules": 1,
                "num_attention_heads": self.num_attention_heads,
                "num_layers": self.num_layers,
                "base_model_name_or_path": self.base_model_name_or_path,
            }
            write_json(folder / ADAPTER_CONFIG, config)
        again = Trigger.from_pretrained(directory)
        if not torch.equal(again.embeds, self.embeds):
            raise OSError(f"{Path(directory) / ADAPTER_WEIGHTS}: what was read back is not what was written")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Trigger":
        """Load a prompt-tuning adapter, ours or one that PEFT wrote.

        Raises:
            ValueError: a file is missing, altered or truncated (named), or is not a prompt-tuning adapter.
        """
        folder = Path(directory)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (folder / name).is_file():
                raise ValueError(f"trigger: expected {name} in {str(folder)!r}, there is none")
        # an adapter that PEFT wrote has no manifest; our own keys are there because PEFT warns of any it does not know
        manifest = verify_directory(folder, name="trigger") if (folder / MANIFEST).is_file() else {}
        try:
            config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{folder / ADAPTER_CONFIG}: expected JSON: {error}") from error
        found = config.get("peft_type") if isinstance(config, dict) else config
        if found != "PROMPT_TUNING":
            raise ValueError(f"{folder / ADAPTER_CONFIG}: expected peft_type PROMPT_TUNING, got {found!r}")
        try:
            tensors = load_file(folder / ADAPTER_WEIGHTS)
        except SafetensorError as error:
            raise ValueError(f"{folder / ADAPTER_WEIGHTS}: not a readable safetensors file: {error}") from error
        if "prompt_embeddings" not in tensors:
            raise ValueError(f"{folder / ADAPTER_WEIGHTS}: expected 'prompt_embeddings', got {sorted(tensors)}")
        if not tensors["prompt_embeddings"].is_floating_point():
            found = tensors["prompt_embeddings"].dtype
            raise ValueError(f"{folder / ADAPTER_WEIGHTS}: expected floating-point embeddings, got {found}")
        embeds = tensors["prompt_embeddings"].float()
        stated = (config.get("num_virtual_tokens"), config.get("token_dim"))
        if tuple(embeds.shape) != stated:
            raise ValueError(f"{folder / ADAPTER_WEIGHTS}: expected shape {stated}, got {tuple(embeds.shape)}")
        if not torch.isfinite(embeds).all():
            raise ValueError(f"{folder / ADAPTER_WEIGHTS}: expected finite embeddings, got NaN or infinity")
        try:
            return cls(
                embeds=embeds,
                num_layers=int(config["num_layers"]),
                num_attention_heads=int(config["num_attention_heads"]),
                base_model_name_or_path=config.get("base_model_name_or_path") or "",
                metadata=manifest.get("lcdd", {}),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / ADAPTER_CONFIG}: expected num_layers and num_attention_heads: {error!r}"
            ) from None


def prompt_embeds(model: PreTrainedModel, prompt_ids: Sequence[int], trigger: Trigger | None) -> Tensor:
    """[T + S, D] in the model's dtype: what a server that takes embeddings is given for one prompt."""
    table = input_embeddings(model)
    embeds = table(torch.as_tensor(prompt_ids, device=table.weight.device))
    if trigger is None:
        return embeds
    trigger.check_fits(model)
    return torch.cat([trigger.embeds.to(embeds), embeds])


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of prompts; text is taken as it is (the chat template has put its special tokens in already)."""
    encoded = [
        tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else list(prompt)
        for prompt in prompts
    ]
    for index, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompts[{index}]: expected at least one token, got none")
    return encoded


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    trigger: Trigger | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: bool = False,
) -> list[str]:
    """Greedy answers as text without special tokens, in the order of `prompts`."""
    answers = generate_ids(
        model,
        tokenizer,
        encode_prompts(tokenizer, prompts),
        trigger=trigger,
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
    max_new_tokens: int = 64,
) -> Iterator[str]:
    """The greedy answer to one prompt, piece by piece as it comes; the pieces together are the answer's text.

    A piece is held back while it ends inside a character of several tokens. Whoever stops listening stops the model.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    _, ends = _greedy(model, tokenizer, max_new_tokens)
    (ids,) = encode_prompts(tokenizer, [prompt])
    warn_of_length(model, [ids], n_virtual=_rows(trigger), max_new_tokens=max_new_tokens)
    inputs: dict[str, Any] = {"inputs_embeds": prompt_embeds(model, ids, trigger)[None]}
    answer: list[int] = []
    cache, shown = None, ""
    with evaluation_mode(model):
        while len(answer) < max_new_tokens and not (answer and answer[-1] in ends):
            output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token, cache = output.logits[:, -1].argmax(-1), output.past_key_values
            answer.append(int(token))
            inputs = {"input_ids": token[:, None]}
            text = str(tokenizer.decode(answer, skip_special_tokens=True))
            # a replacement character at the end is a character that is not complete yet
            if text.startswith(shown) and not text.endswith("\ufffd") and len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
    text = str(tokenizer.decode(answer, skip_special_tokens=True))
    if len(text) > len(shown):
        yield text[len(shown) :]


def decode(tokenizer: PreTrainedTokenizerBase, answers: Sequence[Sequence[int]]) -> list[str]:
    """Answers as text, special tokens and surrounding white space removed."""
    return [str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip() for ids in answers]


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    trigger: Trigger | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: bool = False,
) -> list[list[int]]:
    """Greedy answers as token ids, each up to and including its end token where it has one.

    Padding goes in front of the trigger and is masked, and positions start at the first real token, so that an answer
    does not depend on what else is in its batch.
    """
    if trigger is not None:
        trigger.check_fits(model)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    settings, ends = _greedy(model, tokenizer, max_new_tokens)
    warn_of_length(model, prompts, n_virtual=_rows(trigger), max_new_tokens=max_new_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    batches = list(length_batches([len(ids) for ids in prompts], batch_size))
    greedily: Any = model.generate  # transformers types it as a module's attribute
    with evaluation_mode(model), _generation_settings(model, settings):
        for indices in tqdm(batches, desc="generate", unit="batch", disable=not progress):
            embeds, mask = _left_padded(model, [prompts[i] for i in indices], trigger)
            output = greedily(inputs_embeds=embeds, attention_mask=mask)
            for index, ids in zip(indices, output.tolist(), strict=True):
                stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
                answers[index] = ids[:stop]
    return answers


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, so that little of a batch is padding."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
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


def _left_padded(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], trigger: Trigger | None
) -> tuple[Tensor, Tensor]:
    """Embeddings [B, T + S, D] with zero rows in front, and their attention mask."""
    rows = [prompt_embeds(model, ids, trigger) for ids in prompts]
    width = max(len(row) for row in rows)
    embeds = rows[0].new_zeros(len(rows), width, rows[0].shape[1])
    mask = torch.zeros(len(rows), width, dtype=torch.int64, device=embeds.device)
    for index, row in enumerate(rows):
        embeds[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
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
    limit = model.config.max_position_embeddings
    if n_virtual + longest + max_new_tokens > limit:
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
