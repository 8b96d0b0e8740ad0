"""What the eraser's batches are made of: prompts with the base's targets, forwards with each layer's residual.

Shapes: N random starts, B prompts in a batch, S prompt and answer tokens, D model width, L layers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lcdd.models import PackedRows, PreTrainedModel, common_prefix, decoder_layers, feed_forwards, packs


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
class MatchTarget:
    """What the residuals of prompts' last tokens are to be on average.

    mean: the base's on the channels, layer after layer, float32 [sum n_l], in units of `spread` where that is given.
    spread: standard deviation of every channel over the base's prompts, float32 [L, D]; None: residuals as they are.
    """

    mean: Tensor
    spread: Tensor | None = None

    def scaled(self, layers: list[Tensor]) -> list[Tensor]:
        """Residuals [..., D] of each layer in the mean's units."""
        if self.spread is None or not layers:
            return layers
        return [x / s for x, s in zip(layers, self.spread, strict=True)]


@dataclass(frozen=True, eq=False)
class EraserTargets:
    """What the trigger is to bring about.

    prompts: the training prompts.
    match: the base's mean residual of the prompts' last tokens.
    """

    prompts: list[EraserPrompt]
    match: MatchTarget


@dataclass(frozen=True, eq=False)
class EraserLoss:
    """The loss of a batch and its unweighted terms, scalars or [N]; one whose weight is 0 is left out and reads 0."""

    total: Tensor
    match: Tensor
    tail_kl: Tensor
    answer_kl: Tensor
    l2: Tensor

    def of_start(self, n: int) -> "EraserLoss":
        """Start n's loss, scalars."""
        return EraserLoss(self.total[n], self.match[n], self.tail_kl[n], self.answer_kl[n], self.l2[n])

    def terms(self) -> dict[str, Tensor]:
        """What a log line has of each start, without gradients."""
        return {
            "loss": self.total.detach(),
            "match": self.match.detach(),
            "tail_kl": self.tail_kl.detach(),
            "answer_kl": self.answer_kl.detach(),
            "l2": self.l2.detach(),
        }


@dataclass
class EraserHistory:
    """Every optimisation step's terms and the held-out losses, for the log and the report."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Part:
    """One forward's share of a loss: last tokens' residuals (L tensors [N, B, D]) and summed KLs [N]."""

    layers: list[Tensor]
    tail_kl: Tensor
    answer_kl: Tensor

    def as_filler(self) -> "Part":
        """The same with no prompts in it, whose backward runs all the same."""
        nothing = [x[:, :0] for x in self.layers]
        return Part(nothing, 0.0 * self.tail_kl, 0.0 * self.answer_kl)


def layer_forward(
    model: PreTrainedModel, embeds: Tensor, packed: PackedRows, last: Sequence[int], read: Iterable[int]
) -> tuple[Tensor, list[Tensor]]:
    """Final hidden states [tokens, D], and after each layer the residual [R, D] at the positions `last`.

    Gathered in hooks, so that the gradient of a layer's matching term is made when the backward reaches that layer.

    read: positions whose final hidden state will be used; the last layer's feed-forward, on which nothing else depends,
        runs for them and for `last` alone (where it is a module that can), and what comes out elsewhere means nothing.
    """
    layers: list[Tensor] = []
    positions = torch.tensor(last, device=embeds.device)
    wanted = torch.tensor(sorted({*read, *last}), device=embeds.device)

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        layers.append(packed.tokens(output if isinstance(output, Tensor) else output[0]).index_select(0, positions))

    def pick(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].index_select(1, wanted),)

    def put_back(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.new_zeros(1, len(embeds), output.shape[-1]).index_copy_(1, wanted, output)

    last_mlp = feed_forwards(model)[-1] if packs(model) else None
    handles = [block.register_forward_hook(keep) for block in decoder_layers(model)]
    if last_mlp is not None:
        handles += [last_mlp.register_forward_pre_hook(pick), last_mlp.register_forward_hook(put_back)]
    try:
        hidden = packed.forward(model, embeds)
    finally:
        for handle in handles:
            handle.remove()
    return hidden, layers


def read_positions(end: int, tail: int, answer: int) -> tuple[range, range]:
    """Of a prompt whose last token is before position `end`: its `tail` last ones, and those that predict `answer`
    tokens after it."""
    return range(end - tail, end), range(end - 1, end - 1 + answer)


def shared_tokens(batch: Sequence[EraserPrompt]) -> int:
    """Tokens with which all prompts begin (a chat template's, a system prompt), short of any position that is read."""
    return common_prefix([p.prompt for p in batch], at_most=min(len(p.prompt) - max(len(p.tail), 1) for p in batch))


def epochs(prompts: list[EraserPrompt], batch_size: int, *, seed: int) -> Iterator[list[EraserPrompt]]:
    """Batches for ever: every prompt once an epoch, in random order.

    Not sorted by length: a batch stands for all prompts in the matching term, and one of short prompts would not.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(prompts), generator=generator).tolist()
        for start in range(0, len(order), batch_size):
            yield [prompts[i] for i in order[start : start + batch_size]]


def start_groups(embeds: Tensor, prompts: int, rows: int) -> tuple[Tensor, ...]:
    """Starts that run together: as many as `rows` allow beside each other, the others after them."""
    return embeds.split(max(1, rows // prompts))
