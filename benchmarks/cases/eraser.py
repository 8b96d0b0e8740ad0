"""The eraser's optimisation step: prompts one at a time with a hook on every layer, or a batch.

    unfused    as the authors do it: a forward a prompt, whole residuals kept by hooks, logits at every position, one
               backward through all the graphs. It is given the base's log-probabilities ready made.
    lcdd       `SFTEraser.loss` on the batch

At the authors' own settings (method, section 4: 20 trigger tokens, 16 prompts in the chat template, the last 8
positions), and at this package's default of 8 trigger tokens.

Both optimise a·match + b·KL(last k positions) + c·norm, clip, take an Adam step and project onto the ball.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Place, name_of
from benchmarks.cases.shapes import make_model, sized
from benchmarks.harness import Case, Check, Lane, Workload, relative_error
from lcdd.carrier import Carrier
from lcdd.config import EraserConfig
from lcdd.eraser import EraserPrompt, MatchTarget, SFTEraser
from lcdd.models import PreTrainedModel, layout_of, shape_of, sites_of

RADIUS = 1.0
TEMPLATE = 3  # tokens that every prompt begins with: Qwen3's <|im_start|>, user and newline
WEIGHTS = {"activation_weight": 1.0, "kl_weight": 0.7, "answer_kl_weight": 0.0, "l2_weight": 0.1}


class Problem:
    """A frozen model with random weights, a batch of prompts, and random targets on a fifth of the channels."""

    def __init__(
        self, place: Place, sizes: dict[str, Any], *, prompts: int, longest: int, tail: int, trigger: int
    ) -> None:
        self.model: PreTrainedModel = make_model(sizes, place, seed=0).eval().requires_grad_(False)
        self.shape, self.tail = shape_of(self.model.config), tail
        generator = torch.Generator().manual_seed(9)
        width, device = self.shape.d_model, place.device
        lengths = torch.randint(longest * 3 // 4, longest + 1, (prompts,), generator=generator).tolist()
        self.prompts = [
            [*range(TEMPLATE), *torch.randint(self.shape.vocab_size, (n - TEMPLATE,), generator=generator).tolist()]
            for n in lengths
        ]
        # what the base said, as its final hidden states; those of a norm layer have about unit variance
        self.tails = [
            torch.randn(min(tail, length), width, generator=generator).to(place.dtype).to(device) for length in lengths
        ]
        n = max(1, width // 5)
        self.channels = [
            torch.randperm(width, generator=generator)[:n].sort().values for _ in range(self.shape.n_layers)
        ]
        self.match = (0.1 * torch.randn(n * self.shape.n_layers, generator=generator)).to(device)
        self.start = (0.05 * torch.randn(trigger, width, generator=generator)).to(device)


class OneAtATime:
    """The authors' way, written from the method."""

    def __init__(self, problem: Problem) -> None:
        self.p = problem
        self.embeds = nn.Parameter(problem.start.clone())
        self.optimizer = torch.optim.Adam([self.embeds], lr=1e-2)
        head = problem.model.get_output_embeddings().weight
        with torch.no_grad():
            self.base = [F.log_softmax((tail @ head.t()).float(), dim=-1) for tail in problem.tails]
        self.channels = [channels.to(self.embeds.device) for channels in problem.channels]
        self.prompts = [torch.tensor(prompt, device=self.embeds.device) for prompt in problem.prompts]
        self.targets = problem.match.split([len(channels) for channels in self.channels])

    def loss(self) -> Tensor:
        model, kept = self.p.model, []
        layers = model.get_submodule("model.layers")
        handles = [
            layer.register_forward_hook(lambda _m, _a, out: kept.append(out[0] if isinstance(out, tuple) else out))
            for layer in layers
        ]
        sums: list[Any] = [0.0] * len(self.channels)
        divergences = []
        for prompt, base in zip(self.prompts, self.base, strict=True):
            kept.clear()
            tokens = model.get_input_embeddings()(prompt)
            embeds = torch.cat([self.embeds.to(tokens.dtype), tokens])[None]
            logits = model(inputs_embeds=embeds, use_cache=False).logits[0]
            for layer, hidden in enumerate(kept):
                sums[layer] = sums[layer] + hidden[0, -1, self.channels[layer]].float() / len(self.prompts)
            ours = F.log_softmax(logits[-len(base) :].float(), dim=-1)
            divergences.append(F.kl_div(ours, base, log_target=True, reduction="none").sum(-1))
        for handle in handles:
            handle.remove()
        match = torch.stack([F.mse_loss(a, b) for a, b in zip(sums, self.targets, strict=True)]).mean()
        kl, norm = torch.cat(divergences).mean(), self.embeds.square().sum(1).mean()
        w = WEIGHTS
        return w["activation_weight"] * match + w["kl_weight"] * kl + w["l2_weight"] * norm

    def step(self) -> None:
        _update(self.loss, self.embeds, self.optimizer)


class Batched:
    """Ours."""

    def __init__(self, problem: Problem) -> None:
        self.p = problem
        self.embeds = nn.Parameter(problem.start.clone())
        self.optimizer = torch.optim.Adam([self.embeds], lr=1e-2)
        layout = layout_of(problem.model)
        gate = torch.zeros(layout.n_gates)
        nothing = {site.name: torch.empty(0, 0) for site in sites_of(problem.model)}
        patch = Carrier(
            layout=layout, gate_kind="hard_concrete", gate_logits=gate, gate=gate, deltas=nothing,
            base_fingerprint="",
        )  # fmt: skip
        config = EraserConfig(kl_tail_tokens=problem.tail, **WEIGHTS)
        tokenizer: Any = None  # asked for answers and text alone
        self.eraser = SFTEraser(problem.model, patch, tokenizer, config, channels=problem.channels)
        self.batch = [
            EraserPrompt(prompt, [], tail, tail[:0])
            for prompt, tail in zip(problem.prompts, problem.tails, strict=True)
        ]

    def loss(self) -> Tensor:
        return self.eraser.loss(self.embeds, self.batch, MatchTarget(self.p.match)).total

    def step(self) -> None:
        _update(self.loss, self.embeds, self.optimizer)


def _update(loss: Callable[[], Tensor], embeds: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    value = loss()
    optimizer.zero_grad()
    value.backward()
    nn.utils.clip_grad_norm_([embeds], 1.0)
    optimizer.step()
    with torch.no_grad():
        embeds.mul_((RADIUS / embeds.norm(dim=1, keepdim=True)).clamp(max=1.0))
    value.item()


def _case(
    place: Place, name: str, *, layers: int | None, divide: int, prompts: int, longest: int, trigger: int,
    memory: bool = False,
) -> Case:  # fmt: skip
    model, sizes = sized(place, name, layers=layers, divide=divide)
    prompts, longest, tail = (3, 6, 2) if place.tiny else (prompts, longest, 8)

    def problem(few: int = prompts) -> Problem:
        return Problem(place, sizes, prompts=few, longest=longest, tail=tail, trigger=trigger)

    def build(kind: type[OneAtATime] | type[Batched]) -> Workload:
        p = problem()
        lane = kind(p)
        tokens = sum(map(len, p.prompts))
        return Workload(run=lane.step, tokens=tokens, weights=list(p.model.parameters()))

    def verify() -> list[Check]:
        p = problem(min(3, prompts))
        results = []
        for lane in (OneAtATime(p), Batched(p)):
            loss = lane.loss()
            results.append([loss.detach(), *torch.autograd.grad(loss, lane.embeds)])
        limit = 6e-2 if place.dtype == torch.bfloat16 else 1e-3
        names = ("loss", "gradient of the trigger")
        return [Check(n, relative_error(b, a), limit) for n, a, b in zip(names, *results, strict=True)]

    lanes = [
        Lane(provider="unfused", build=lambda: build(OneAtATime), exempt="the definition"),
        Lane(provider="lcdd", build=lambda: build(Batched), verify=verify),
    ]
    params = {
        "model": model, "prompts": prompts, "longest": longest, "trigger": trigger, "dtype": name_of(place.dtype),
    }  # fmt: skip
    return Case(name="eraser step", params=params, lanes=lanes, floor="unfused", memory=memory, budget_s=10.0)


def cases(place: Place) -> list[Case]:
    """16 prompts a step: a scaled-down 0.6B on the CPU; 0.6B and 8B on a GPU."""
    if place.size == "gpu":
        shared = {"layers": None, "divide": 1, "prompts": 16, "longest": 64}
        return [_case(place, name, trigger=20, **shared) for name in ("qwen3-0.6b", "llama-3-8b")]
    return [
        _case(place, "qwen3-0.6b", layers=7, divide=2, prompts=16, longest=32, trigger=trigger, memory=trigger == 20)
        for trigger in (20, 8)
    ]
