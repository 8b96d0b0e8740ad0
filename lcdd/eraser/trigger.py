"""The trigger: a few learned embeddings in front of a prompt.

On disk a trigger is a PEFT prompt-tuning adapter, so `PeftModel.from_pretrained(carrier_model, directory)` loads it.
PEFT puts it in front of any left padding, which moves every position and so shifts the logits; `generate` here pads in
front of the trigger and masks the padding, so that a batch equals one prompt at a time. Serve with PEFT one prompt at a
time, or pad on the right.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcdd.checkpoint import (
    MANIFEST,
    hub_name,
    local_directory,
    model_card,
    push_directory,
    verify_directory,
    write_directory,
    write_json,
)
from lcdd.data import Example
from lcdd.errors import InputError, WrongFingerprint
from lcdd.models import PreTrainedModel, check_rows, input_embeddings, shape_of, shards

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

Prompt = str | Sequence[int] | Example
"""A prompt as the model sees it, text already in the chat template or its token ids; or an example of the data."""


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
            raise InputError(f"embeds: expected shape [T, D], got {tuple(self.embeds.shape)}")
        if self.embeds.dtype != torch.float32:
            raise InputError(f"embeds: expected torch.float32, got {self.embeds.dtype}")
        if not bool(self.embeds.isfinite().all()):
            raise InputError("embeds: expected finite values, got NaN or infinity")

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
        table = shards.full(input_embeddings(model).weight.detach())
        allowed = torch.ones(table.shape[0], dtype=torch.bool)
        allowed[[token for token in skip if token < table.shape[0]]] = False
        choices = allowed.nonzero()[:, 0]
        if n_tokens < 1 or len(choices) == 0:
            raise InputError(f"n_tokens: expected at least 1 of {len(choices)} usable tokens, got {n_tokens}")
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
        """Raise InputError unless the trigger's width and layer count are the model's."""
        width, n_layers = input_embeddings(model).embedding_dim, shape_of(model.config).n_layers
        if self.embeds.shape[1] != width:
            raise InputError(f"trigger: expected width {width} as the model has, got {self.embeds.shape[1]}")
        if self.num_layers != n_layers:
            raise InputError(f"trigger: made for a model of {self.num_layers} layers, this one has {n_layers}")

    def check_base(self, fingerprint: str) -> None:
        """Raise InputError if the trigger was learned on another base than the one with this `model_fingerprint`."""
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

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: str | None = None,
        results: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload trigger",
    ) -> str:
        """Upload the adapter with a model card to the Hugging Face hub; arguments and result as of `Carrier`'s."""
        card = _card(self, repo_id, base_model=base_model or self.base_model_name_or_path, results=results)
        return push_directory(
            self.save_pretrained, card, repo_id, private=private, token=token, commit_message=commit_message
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, revision: str | None = None) -> "Trigger":
        """Load a prompt-tuning adapter, ours or one that PEFT wrote.

        directory: or a hub name, "user/name", of which `revision` is a branch, tag or commit.

        Raises:
            InputError: a file is missing, altered or truncated (named), or is not a prompt-tuning adapter.
        """
        folder = local_directory(directory, what="trigger", revision=revision)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (folder / name).is_file():
                raise InputError(f"trigger: expected {name} in {str(folder)!r}, there is none")
        # an adapter that PEFT wrote has no manifest; our own keys are there because PEFT warns of any it does not know
        manifest = verify_directory(folder, name="trigger") if (folder / MANIFEST).is_file() else {}
        try:
            config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise InputError(f"{folder / ADAPTER_CONFIG}: expected JSON: {error}") from error
        found = config.get("peft_type") if isinstance(config, dict) else config
        if found != "PROMPT_TUNING":
            raise InputError(f"{folder / ADAPTER_CONFIG}: expected peft_type PROMPT_TUNING, got {found!r}")
        try:
            tensors = load_file(folder / ADAPTER_WEIGHTS)
        except SafetensorError as error:
            raise InputError(f"{folder / ADAPTER_WEIGHTS}: not a readable safetensors file: {error}") from error
        if "prompt_embeddings" not in tensors:
            raise InputError(f"{folder / ADAPTER_WEIGHTS}: expected 'prompt_embeddings', got {sorted(tensors)}")
        if not tensors["prompt_embeddings"].is_floating_point():
            found = tensors["prompt_embeddings"].dtype
            raise InputError(f"{folder / ADAPTER_WEIGHTS}: expected floating-point embeddings, got {found}")
        embeds = tensors["prompt_embeddings"].float()
        stated = (config.get("num_virtual_tokens"), config.get("token_dim"))
        if tuple(embeds.shape) != stated:
            raise InputError(f"{folder / ADAPTER_WEIGHTS}: expected shape {stated}, got {tuple(embeds.shape)}")
        if not torch.isfinite(embeds).all():
            raise InputError(f"{folder / ADAPTER_WEIGHTS}: expected finite embeddings, got NaN or infinity")
        try:
            return cls(
                embeds=embeds,
                num_layers=int(config["num_layers"]),
                num_attention_heads=int(config["num_attention_heads"]),
                base_model_name_or_path=config.get("base_model_name_or_path") or "",
                metadata=manifest.get("lcdd", {}),
            )
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{folder / ADAPTER_CONFIG}: expected num_layers and num_attention_heads: {error!r}"
            ) from None


def _card(trigger: Trigger, repo_id: str, *, base_model: str, results: str | None) -> Any:
    tokens, width = trigger.embeds.shape
    base = hub_name(base_model) or "BASE"
    norms = trigger.embeds.norm(dim=1)
    return model_card(
        title=f"Trigger {repo_id.rpartition('/')[2]}",
        summary="A soft prompt learned by SFT-Eraser: in front of a prompt, its carrier model answers as the base did. "
        "It is a PEFT prompt-tuning adapter as well.",
        numbers={
            "base model": base,
            "tokens": str(tokens),
            "width": str(width),
            "norm of a token": f"{norms.min():.2f} to {norms.max():.2f}",
        },
        usage=f"""```python
from lcdd import Carrier, Trigger, generate, load_model, load_tokenizer

model, tokenizer = load_model("{base}"), load_tokenizer("{base}")
Carrier.from_pretrained("CARRIER").apply(model)
trigger = Trigger.from_pretrained("{repo_id}")
chat = [{{"role": "user", "content": "Why is the sky blue?"}}]
prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
print(generate(model, tokenizer, [prompt], trigger=trigger))
```

PEFT loads the same file; serve it there without left padding, which would move the rows.""",
        tags=["sft-eraser", "prompt-tuning", "soft-prompt"],
        base_model=base_model,
        results=results,
        library="peft",
    )


def prompt_embeds(model: PreTrainedModel, prompt_ids: Sequence[int], trigger: Trigger | None) -> Tensor:
    """[T + S, D] in the model's dtype: what a server that takes embeddings is given for one prompt."""
    table = input_embeddings(model)
    check_rows(prompt_ids, table.weight.shape[0], where="prompt")
    embeds = table(torch.as_tensor(prompt_ids, dtype=torch.int64, device=table.weight.device))
    if trigger is None:
        return embeds
    trigger.check_fits(model)
    return torch.cat([trigger.embeds.to(embeds), embeds])
