"""SFT-Eraser: learns the trigger that gives the base's behaviour back (method, section 4).

One copy of the weights. With the base in it, the targets are computed once: the mean residual of the prompts' last
token on the carrier's channels, the base's own greedy answers, and its final hidden states where its next-token
distributions are wanted (D numbers a position, not V; the head is the base's, so they are exact). Then the carrier is
applied and only the trigger learns:

    L = a · mean_layers MSE( mean_batch h_l(P ⊕ x)[last token, C_l],  mean_prompts h_l^base(x)[last token, C_l] )
      + b · KL( base(x) ‖ carrier(P ⊕ x) )                      mean over the prompts' last k positions
      + b' · KL( base(x ⊕ y) ‖ carrier(P ⊕ x ⊕ y) )             mean over the tokens of the base's own answers y
      + c · mean_tokens ‖P_t‖²

A batch is padded on the right: causal attention then needs no mask, and padding changes nothing. Prompts of very
different length run in separate forwards.

Shapes: B prompts in a batch, T trigger tokens, S prompt and answer tokens, D model width, L layers, R rows (positions).
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lcdd.carrier import Carrier
from lcdd.config import EraserConfig
from lcdd.models import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    backbone,
    decoder_layers,
    head_weight,
    input_embeddings,
)
from lcdd.schedules import schedule
from lcdd.trigger import (
    Prompt,
    Trigger,
    embed_with_trigger,
    encode_prompts,
    evaluation_mode,
    generate_ids,
    length_batches,
    right_padded,
)
from lcdd_kernels import channel_match, linear_kl

logger = logging.getLogger(__name__)

LONGEST_TO_SHORTEST = 1.6
"""Within one forward: a batch whose lengths differ by more runs in several, instead of over padding."""
CHUNK = 64
"""Prompts in one forward, at most (of the held-out prompts, which are one batch)."""


@dataclass(frozen=True, eq=False)
class EraserPrompt:
    """One prompt and what the base says about it.

    prompt, answer: token ids; the answer is the base's own, greedy.
    tail: the base's final hidden states [min(k, len(prompt)), D] at the prompt's last positions.
    responses: the same [len(answer), D] at the positions that predict the answer's tokens.
    """

    prompt: list[int]
    answer: list[int]
    tail: Tensor
    responses: Tensor


@dataclass(frozen=True, eq=False)
class EraserTargets:
    """What the trigger is to bring about.

    prompts: the training prompts.
    match: base mean of the last token's residual on the channels, layer after layer, float32 [sum n_l].
    """

    prompts: list[EraserPrompt]
    match: Tensor


@dataclass(frozen=True, eq=False)
class EraserLoss:
    """The loss of a batch and its terms, unweighted scalars (a term with weight 0 is not computed and reads 0)."""

    total: Tensor
    match: Tensor
    tail_kl: Tensor
    answer_kl: Tensor
    l2: Tensor

    def log(self) -> dict[str, float]:
        parts = torch.stack([self.total, self.match, self.tail_kl, self.answer_kl, self.l2]).detach().tolist()
        return dict(zip(("loss", "match", "tail_kl", "answer_kl", "l2"), parts, strict=True))


@dataclass
class EraserHistory:
    """Every optimisation step's terms and the held-out losses, for the log and the report."""

    steps: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Part:
    """One forward's share of a loss: last tokens' residuals (L tensors [B, D]) and summed KLs."""

    layers: list[Tensor]
    tail_kl: Tensor
    answer_kl: Tensor


class SFTEraser:
    """Optimises a trigger for a patched model.

    Args:
        model: the base model, unpatched; every parameter is left as it was found.
        patch: the carrier to reverse, or a dense patch (`Carrier.from_models`) for the plain-SFT control.
        tokenizer: for the end token of the base's answers and for prompts given as text.
        config: weights, steps and sizes.
        channels: per layer, int64 indices of the residual channels to match; the patch's own channels of
            `config.channel_kind` if None. An empty list everywhere switches the matching term off.

    Attributes:
        history: filled by `fit`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        patch: Carrier,
        tokenizer: PreTrainedTokenizerBase,
        config: EraserConfig,
        channels: Sequence[Tensor] | None = None,
    ) -> None:
        self.model, self.patch, self.tokenizer, self.config = model, patch, tokenizer, config
        self.history = EraserHistory()
        n_layers, width = len(decoder_layers(model)), input_embeddings(model).embedding_dim
        if channels is None:
            channels = patch.channels(config.channel_kind, seed=config.seed)
        if len(channels) != n_layers:
            raise ValueError(f"channels: expected one index list for each of {n_layers} layers, got {len(channels)}")
        for layer, indices in enumerate(channels):
            if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < width:
                raise ValueError(f"channels[{layer}]: expected indices from 0 to {width - 1}, got {indices.tolist()}")
        device = input_embeddings(model).weight.device
        self._channels = torch.cat([indices.to(device, torch.int32) for indices in channels])
        self._offsets = torch.tensor([0, *[len(indices) for indices in channels]]).cumsum(0)
        # the base's distributions need the base's head, also while a patch that changes the head is applied
        self._base_head = head_weight(model).detach()
        if any(model.get_parameter(name) is head_weight(model) for name in patch.unmasked):
            self._base_head = self._base_head.clone()

    def fit(
        self,
        train_prompts: Sequence[Prompt],
        validation_prompts: Sequence[Prompt],
        *,
        log: Callable[[dict[str, Any]], None] | None = None,
        progress: bool = False,
    ) -> Trigger:
        """Learn a trigger on `train_prompts` and return the one with the lowest loss on `validation_prompts`.

        Args:
            train_prompts, validation_prompts: chat-formatted text, or token ids.
            log: called with one line a step: step, loss and terms, validation_loss where it was computed.

        Raises:
            ValueError: no prompts, or a prompt longer than `config.max_prompt_length`.
            RuntimeError: the loss became NaN or infinite.
        """
        c = self.config
        train = self._encode(train_prompts, "train_prompts")
        held_out = self._encode(validation_prompts, "validation_prompts")
        self.patch.check_base(self.model)
        with _frozen(self.model):
            targets = self.targets(train, progress=progress)
            validation = self.targets(held_out, progress=progress).prompts
            with self.patch.applied(self.model, check=False):
                best, losses = self._optimise(targets, validation, log, progress)
        metadata = {
            "base_fingerprint": self.patch.base_fingerprint,
            "patch": self.patch.summary(),
            "validation_loss": losses,
            "learned_on": len(train),
            "config": c.to_dict(),
        }
        return Trigger.for_model(self.model, best, metadata=metadata)

    @torch.no_grad()
    def targets(self, prompts: Sequence[Sequence[int]], *, progress: bool = False) -> EraserTargets:
        """Run the (unpatched) base over `prompts`: its answers, hidden states and mean residuals."""
        c = self.config
        answers = generate_ids(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=c.max_answer_tokens,
            batch_size=c.per_device_train_batch_size,
            progress=progress,
        )
        found: list[EraserPrompt | None] = [None] * len(prompts)
        total = torch.zeros(self._channels.numel(), dtype=torch.float64, device=self._channels.device)
        for indices in length_batches([len(ids) for ids in prompts], c.per_device_train_batch_size):
            texts = [[*prompts[i], *answers[i][:-1]] for i in indices]
            ids = right_padded(texts, device=self._channels.device)
            last = torch.tensor([len(prompts[i]) - 1 for i in indices], device=ids.device)
            hidden, layers = _forward(self.model, input_embeddings(self.model)(ids), last)
            total += self._on_channels(layers).double().sum(0)
            for row, i in enumerate(indices):
                end = len(prompts[i])
                tail = hidden[row, max(0, end - c.kl_tail_tokens) : end].clone()
                responses = hidden[row, end - 1 : end - 1 + len(answers[i])].clone()
                found[i] = EraserPrompt(list(prompts[i]), answers[i], tail, responses)
        return EraserTargets([p for p in found if p is not None], (total / len(prompts)).float())

    def loss(self, embeds: Tensor, batch: Sequence[EraserPrompt], match_target: Tensor) -> EraserLoss:
        """The loss of trigger embeddings [T, D] on a batch, under the weights now in the model.

        Differentiable in `embeds`; computes only the terms whose weight is not 0. Prompts of different length run in
        separate forwards, but means are over the whole batch, so that the loss does not depend on how it was run.
        """
        c = self.config
        sizes = [len(p.prompt) + len(p.answer) + embeds.shape[0] for p in batch]
        parts = [self._run(embeds, [batch[i] for i in chunk]) for chunk in similar_lengths(sizes)]
        match = tail_kl = answer_kl = embeds.new_zeros(())
        if c.activation_weight > 0 and self._channels.numel():
            layers = [torch.cat(rows) for rows in zip(*(part.layers for part in parts), strict=True)]
            match = channel_match(layers, self._channels, self._offsets, match_target)
        if c.kl_weight > 0:
            tail_kl = sum((part.tail_kl for part in parts), tail_kl) / sum(len(p.tail) for p in batch)
        if c.answer_kl_weight > 0:
            answer_kl = sum((part.answer_kl for part in parts), answer_kl) / sum(len(p.responses) for p in batch)
        l2 = embeds.square().sum(1).mean()
        total = c.activation_weight * match + c.kl_weight * tail_kl + c.answer_kl_weight * answer_kl + c.l2_weight * l2
        return EraserLoss(total, match, tail_kl, answer_kl, l2)

    def _run(self, embeds: Tensor, batch: Sequence[EraserPrompt]) -> "_Part":
        """One forward over prompts (and answers, where they are wanted), padded on the right."""
        c, zero = self.config, embeds.new_zeros(())
        texts = [[*p.prompt, *p.answer[:-1]] if c.answer_kl_weight > 0 else p.prompt for p in batch]
        ids = right_padded(texts, device=embeds.device)
        last = torch.tensor([embeds.shape[0] + len(p.prompt) - 1 for p in batch], device=ids.device)
        hidden, layers = _forward(self.model, embed_with_trigger(self.model, ids, embeds), last)
        flat = hidden.flatten(0, 1)
        ends = [row * hidden.shape[1] + embeds.shape[0] + len(p.prompt) for row, p in enumerate(batch)]
        tail_kl = answer_kl = zero
        if c.kl_weight > 0:
            tail_kl = self._kl(
                flat, [end - len(p.tail) for end, p in zip(ends, batch, strict=True)], [p.tail for p in batch]
            )
        if c.answer_kl_weight > 0:
            answer_kl = self._kl(flat, [end - 1 for end in ends], [p.responses for p in batch])
        return _Part(layers, tail_kl, answer_kl)

    def max_norm(self) -> float:
        """Radius of the ball that every trigger embedding stays in."""
        if self.config.max_norm is not None:
            return self.config.max_norm
        norms = input_embeddings(self.model).weight.detach().float().norm(dim=1)
        return self.config.max_norm_ratio * float(norms.median())

    def _optimise(
        self,
        targets: EraserTargets,
        validation: list[EraserPrompt],
        log: Callable[[dict[str, Any]], None] | None,
        progress: bool,
    ) -> tuple[Tensor, float]:
        c, radius = self.config, self.max_norm()
        special = self.tokenizer.all_special_ids
        start = Trigger.random_tokens(self.model, c.num_virtual_tokens, seed=c.seed, skip=special)
        embeds = nn.Parameter(_projected(start.embeds.to(self._base_head.device), radius))
        optimizer = torch.optim.Adam([embeds], lr=c.learning_rate)
        factor = schedule(c.lr_scheduler_type, warmup=0, steps=c.max_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        batches = _epochs(targets.prompts, c.per_device_train_batch_size, seed=c.seed)
        best, best_loss = embeds.detach().clone(), self._held_out(embeds, validation, targets.match)
        self.history.validation.append({"step": 0, "loss": best_loss})
        bar = tqdm(range(1, c.max_steps + 1), desc="eraser", unit="step", disable=not progress)
        for step in bar:
            loss = self.loss(embeds, next(batches), targets.match)
            line = {"step": step, "learning_rate": scheduler.get_last_lr()[0], **loss.log()}
            if not math.isfinite(line["loss"]):
                raise RuntimeError(f"eraser: the loss became {line['loss']} at step {step}; lower --learning_rate")
            optimizer.zero_grad()
            loss.total.backward()
            if c.max_grad_norm:
                nn.utils.clip_grad_norm_([embeds], c.max_grad_norm)
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                embeds.copy_(_projected(embeds, radius))
            if step % c.eval_steps == 0 or step == c.max_steps:
                held_out = self._held_out(embeds, validation, targets.match)
                line["validation_loss"] = held_out
                self.history.validation.append({"step": step, "loss": held_out})
                bar.set_postfix(loss=f"{line['loss']:.3f}", held_out=f"{held_out:.3f}")
                if held_out < best_loss:
                    best, best_loss = embeds.detach().clone(), held_out
            self.history.steps.append(line)
            if log is not None:
                log(line)
        logger.info("eraser: best held-out loss %.4f after %d steps", best_loss, c.max_steps)
        return best, best_loss

    @torch.no_grad()
    def _held_out(self, embeds: Tensor, prompts: list[EraserPrompt], match_target: Tensor) -> float:
        """The loss of the held-out prompts as one batch."""
        return float(self.loss(embeds, prompts, match_target).total)

    def _kl(self, flat: Tensor, starts: list[int], references: list[Tensor]) -> Tensor:
        """Summed KL(base ‖ patched) over runs of positions of `flat` [B·S, D], each as long as its reference [n, D]."""
        rows = torch.cat([torch.arange(start, start + len(r)) for start, r in zip(starts, references, strict=True)])
        student = flat[rows.to(flat.device)]
        head = head_weight(self.model).detach()
        reference = torch.cat(references)
        return linear_kl(student, head, ref_hidden=reference, ref_weight=self._base_head, reduction="sum")

    def _on_channels(self, layers: list[Tensor]) -> Tensor:
        """Residuals [B, D] of each layer on its channels, side by side: [B, sum n_l]."""
        picked = self._channels.long().split(self._offsets.diff().tolist())
        return torch.cat([hidden[:, channels] for hidden, channels in zip(layers, picked, strict=True)], dim=1)

    def _encode(self, prompts: Sequence[Prompt], name: str) -> list[list[int]]:
        if not prompts:
            raise ValueError(f"{name}: expected at least one prompt, got none")
        encoded = encode_prompts(self.tokenizer, prompts)
        for index, ids in enumerate(encoded):
            if len(ids) > self.config.max_prompt_length:
                raise ValueError(
                    f"{name}[{index}]: expected at most max_prompt_length = {self.config.max_prompt_length} tokens, "
                    f"got {len(ids)}"
                )
        return encoded


def _forward(model: PreTrainedModel, embeds: Tensor, last: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Final hidden states [B, S, D], and after each layer the residual [B, D] at position last[b] of prompt b.

    Gathered in hooks, so that the gradient of a layer's matching term is made when the backward reaches that layer.
    """
    layers: list[Tensor] = []
    rows = torch.arange(len(last), device=last.device)

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        layers.append((output[0] if isinstance(output, tuple) else output)[rows, last])

    handles = [layer.register_forward_hook(keep) for layer in decoder_layers(model)]
    try:
        hidden = backbone(model)(inputs_embeds=embeds, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return hidden, layers


def _epochs(prompts: list[EraserPrompt], batch_size: int, *, seed: int) -> Iterator[list[EraserPrompt]]:
    """Batches for ever: every prompt once an epoch, in random order.

    Not sorted by length: a batch stands for all prompts in the matching term, and one of short prompts would not.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(prompts), generator=generator).tolist()
        for start in range(0, len(order), batch_size):
            yield [prompts[i] for i in order[start : start + batch_size]]


def similar_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in chunks, none with a length above `LONGEST_TO_SHORTEST` times its shortest, at most `CHUNK` each."""
    chunks: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        fits = chunks and lengths[index] <= LONGEST_TO_SHORTEST * lengths[chunks[-1][0]] and len(chunks[-1]) < CHUNK
        if fits:
            chunks[-1].append(index)
        else:
            chunks.append([index])
    return chunks


def _projected(embeds: Tensor, radius: float) -> Tensor:
    """Every row of `embeds` [T, D] scaled down to norm `radius` where it is longer."""
    norms = embeds.norm(dim=1, keepdim=True)
    return embeds * (radius / norms.clamp_min(radius))


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; as it was afterwards."""
    wanted = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    try:
        with evaluation_mode(model):
            yield
    finally:
        for parameter, flag in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)
