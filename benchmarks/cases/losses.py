"""Cross-entropy and KL from hidden states at a real vocabulary: logits stored whole, or in chunks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Place, name_of
from benchmarks.harness import Case, Check, Cost, Lane, Workload, relative_error
from lcdd_kernels import linear_cross_entropy, linear_kl

VOCABULARY, WIDTH = 151936, 1024  # Qwen3-0.6B


def whole(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """As transformers has it: logits, upcast to float32."""
    return F.cross_entropy((hidden @ head.t()).float(), labels, reduction="sum")


def chunked(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, head, labels, reduction="sum")


def whole_kl(hidden: Tensor, head: Tensor, reference: Tensor) -> Tensor:
    """KL(reference ‖ hidden), both under one head."""
    ours, theirs = ((h @ head.t()).float().log_softmax(-1) for h in (hidden, reference))
    return F.kl_div(ours, theirs, reduction="sum", log_target=True)


def chunked_kl(hidden: Tensor, head: Tensor, reference: Tensor) -> Tensor:
    return linear_kl(hidden, head, ref_hidden=reference, ref_weight=head, reduction="sum")


def cross_entropy(place: Place) -> Case:
    """Loss and gradient to the hidden states, frozen head."""
    return _case(place, "cross-entropy", whole, chunked)


def kl(place: Place) -> Case:
    """The same of the KL to a reference's hidden states."""
    return _case(place, "KL", whole_kl, chunked_kl)


def _case(place: Place, name: str, whole: Callable[..., Tensor], chunked: Callable[..., Tensor]) -> Case:
    vocab, width = (257, 32) if place.tiny else (VOCABULARY, WIDTH)
    tokens = {"tiny": 12, "cpu": 512, "gpu": 4096}[place.size]

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(4)
        hidden = torch.randn(tokens, width, generator=generator).to(place.dtype).to(place.device)
        head = (0.02 * torch.randn(vocab, width, generator=generator)).to(place.dtype).to(place.device)
        labels = torch.randint(vocab, (tokens,), generator=generator).to(place.device)
        if name == "KL":
            near = hidden.detach() + 0.1 * torch.randn(tokens, width, generator=generator).to(hidden)
            return hidden.requires_grad_(True), head, near
        return hidden.requires_grad_(True), head, labels

    def build(function: Callable[..., Tensor]) -> Workload:
        hidden, head, target = inputs()

        def run() -> None:
            hidden.grad = None
            function(hidden, head, target).backward()

        cost = Cost(flops=4.0 * tokens * vocab * width)  # logits and their gradient to the hidden states
        return Workload(run=run, cost=cost, tokens=tokens, weights=[head, hidden])

    def verify() -> list[Check]:
        hidden, head, target = inputs()
        # what is right, in float32: rounded logits put a floor under a small KL
        right = whole(hidden.float(), head.float(), target.float() if target.is_floating_point() else target)
        expected = [right.detach(), *torch.autograd.grad(right, hidden)]
        ours = chunked(hidden, head, target)
        found = [ours.detach(), *torch.autograd.grad(ours, hidden)]
        limit = 2e-2 if place.dtype == torch.bfloat16 else 1e-4
        names = ("loss", "gradient of the hidden states")
        return [Check(n, relative_error(a, b), limit) for n, a, b in zip(names, found, expected, strict=True)]

    lanes = [
        Lane(provider="plain", build=lambda: build(whole), exempt="the definition"),
        Lane(provider="lcdd", build=lambda: build(chunked), verify=verify),
    ]
    params = {"vocabulary": vocab, "width": width, "tokens": tokens, "dtype": name_of(place.dtype)}
    return Case(name=name, params=params, lanes=lanes, floor="plain", memory=True, budget_s=8.0, min_rounds=3)
