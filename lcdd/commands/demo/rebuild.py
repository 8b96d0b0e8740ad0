"""Trains the demo's base model: `lcdd demo --rebuild_base`.

A Qwen3 of 0.41 M parameters learns the six tasks of `lcdd.demo_tasks` from scratch, deterministically from a seed, in
a few minutes on one core. Half of its batches have a junk prefix of 1 to 16 embeddings in front of the prompt: a base
that has never seen a prefix fails under any trigger, whatever the trigger says (method, section 6). The shipped
`lcdd/commands/demo/base` is what this writes with its default settings.

Shapes: B prompts, S tokens, T prefix tokens, D model width, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcdd.commands.demo.tasks import ASSISTANT, END, PAD, USER, VOCABULARY, Task, draw_tasks, token_ids, write_tokenizer
from lcdd.models import PreTrainedModel, backbone, head_weight, input_embeddings, new_model, save_model

IGNORE = -100
MAX_PREFIX = 16

MODEL_SETTINGS = {
    "model_type": "qwen3",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
    "bos_token_id": None,
    "eos_token_id": token_ids([END])[0],
    "pad_token_id": token_ids([PAD])[0],
}


@dataclass(frozen=True, kw_only=True)
class RebuildSettings:
    """How the shipped base was trained; anything else gives another base."""

    seed: int = 0
    steps: int = 2000
    warmup_steps: int = 100
    batch_size: int = 128
    train_prompts: int = 100_000
    plain_fraction: float = 0.15
    learning_rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


def encode_tasks(tasks: Sequence[Task]) -> tuple[Tensor, Tensor]:
    """Right-padded token ids and labels, int64 [B, S]; labels are IGNORE except on the answer and its end token."""
    rows = [
        (token_ids([USER, *task.prompt.split(), ASSISTANT]), token_ids([*task.answer.split(), END])) for task in tasks
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), token_ids([PAD])[0])
    labels = torch.full((len(rows), width), IGNORE)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def junk_prefix(table: Tensor, batch: int, length: int, *, generator: torch.Generator) -> Tensor:
    """Random prefixes [batch, length, D]: half Gaussian directions, half real tokens, of 0.25 to 2 times the median
    norm of the embedding table [V, D] (the padding token's row is zero and stays so)."""
    directions = torch.randn(batch, length, table.shape[1], generator=generator)
    tokens = table[torch.randint(len(table), (batch, length), generator=generator)]
    real = torch.rand(batch, 1, 1, generator=generator) < 0.5
    norms = 0.25 + 1.75 * torch.rand(batch, length, 1, generator=generator)
    return F.normalize(torch.where(real, tokens, directions), dim=-1) * norms * table.norm(dim=1).median()


def _answer_logits(model: PreTrainedModel, ids: Tensor, labels: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits [N, V] at the N positions that predict answer tokens, and those tokens [N]."""
    embeds = input_embeddings(model)(ids)
    skip = 0 if prefix is None else prefix.shape[1]
    if prefix is not None:
        embeds = torch.cat([prefix, embeds], dim=1)
    # right padding and causal attention: no mask is needed
    hidden = backbone(model)(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, skip:-1]
    wanted = labels[:, 1:] != IGNORE
    return F.linear(hidden[wanted], head_weight(model)), labels[:, 1:][wanted]


@torch.no_grad()
def exact_match(
    model: PreTrainedModel, tasks: Sequence[Task], *, prefix_length: int = 0, seed: int = 0, batch_size: int = 256
) -> float:
    """Share of tasks whose whole answer, end token included, the model gets right, under junk prefixes of a length.

    Right at every position given the right words before it, which for greedy answers is the same as right throughout.
    """
    generator = torch.Generator().manual_seed(seed)
    right = 0
    for start in range(0, len(tasks), batch_size):
        ids, labels = encode_tasks(tasks[start : start + batch_size])
        prefix = None
        if prefix_length:
            prefix = junk_prefix(input_embeddings(model).weight, len(ids), prefix_length, generator=generator)
        logits, wanted = _answer_logits(model, ids, labels, prefix)
        wrong = torch.zeros(labels[:, 1:].shape, dtype=torch.bool)
        wrong[labels[:, 1:] != IGNORE] = logits.argmax(-1) != wanted
        right += int((~wrong.any(1)).sum())
    return right / len(tasks)


def train_base(settings: RebuildSettings, *, log: Callable[[str], None]) -> PreTrainedModel:
    """Train the base from scratch; the same settings give the same model on the same machine."""
    model = new_model(MODEL_SETTINGS, seed=settings.seed)
    table = input_embeddings(model).weight
    tasks = draw_tasks(
        settings.train_prompts, split="train", seed=settings.seed, plain_fraction=settings.plain_fraction
    )
    ids, labels = encode_tasks(tasks)
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / settings.warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    held_out = draw_tasks(500, split="validation", seed=settings.seed)
    for step in range(1, settings.steps + 1):
        rows = torch.randint(len(ids), (settings.batch_size,), generator=generator)
        length = int(torch.randint(1, MAX_PREFIX + 1, (), generator=generator))
        junk = torch.rand((), generator=generator) < 0.5
        prefix = junk_prefix(table.detach(), settings.batch_size, length, generator=generator) if junk else None
        loss = F.cross_entropy(*_answer_logits(model, ids[rows], labels[rows], prefix))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == settings.steps:
            scores = [exact_match(model, held_out, prefix_length=n) for n in (0, 8)]
            log(
                f"base: step {step} of {settings.steps}, loss {loss.item():.5f}, held-out exact match "
                f"{scores[0]:.3f}, under junk prefixes of 8 tokens {scores[1]:.3f}"
            )
    return model.eval()


def rebuild_base(directory: Path, *, settings: RebuildSettings | None = None, log: Callable[[str], None]) -> None:
    """Train the base and write it, with its tokenizer, to a directory."""
    model = train_base(settings or RebuildSettings(), log=log)
    directory.mkdir(parents=True, exist_ok=True)
    save_model(model, None, directory)
    write_tokenizer(directory)
