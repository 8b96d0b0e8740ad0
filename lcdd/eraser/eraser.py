"""SFT-Eraser: learns the trigger that gives the base's behaviour back (method, section 4).

One copy of the weights. With the base in it, the targets are computed once: the mean residual of the prompts' last
token on the carrier's channels, the base's own greedy answers, and its final hidden states where its next-token
distributions are wanted (D numbers a position, not V; the head is the base's, so they are exact). Then the carrier is
applied and only the trigger learns:

    L = a · mean_layers MSE( mean_batch h_l(P ⊕ x)[last token, C_l],  mean_prompts h_l^base(x)[last token, C_l] )
      + b · KL( base(x) ‖ carrier(P ⊕ x) )                      mean over the prompts' last k positions
      + b' · KL( base(x ⊕ y) ‖ carrier(P ⊕ x ⊕ y) )             mean over the tokens of the base's own answers y, the
                                                                first one counted `first_token_weight` times
      + c · mean_tokens ‖P_t‖²

With `match_scale` variance every channel of h is divided by its standard deviation over the base's prompts: in real
models a handful of channels hold most of a residual's norm, and an unscaled error sees only them (method, section 7).

On several ranks `fit` is called on each with the same arguments. The prompts of a batch are shared out; what is summed
over ranks are the KLs, the residuals that the matching term averages, and the trigger's gradient.

A batch is one forward (`packed_rows`): prompts of any length one after another, without padding, behind one copy of
what they all begin with, the trigger and the tokens they have in common, which see nothing of what follows. Several
random starts share a forward too.

Shapes: N random starts, B prompts in a batch, T trigger tokens, S prompt and answer tokens, D model width, L layers.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcdd.carrier import Carrier
from lcdd.checkpoint import CheckpointStore, RunLog, termination
from lcdd.config import EraserConfig
from lcdd.eraser.batches import (
    EraserHistory,
    EraserLoss,
    EraserPrompt,
    EraserTargets,
    MatchTarget,
    Part,
    epochs,
    layer_forward,
    read_positions,
    shared_tokens,
    start_groups,
)
from lcdd.eraser.generation import encode_prompts, evaluation_mode, generate_ids, length_batches, warn_of_length
from lcdd.eraser.search import TriggerSearch, digest_of
from lcdd.eraser.trigger import Prompt, Trigger
from lcdd.errors import InputError, Terminated, TrainingStopped
from lcdd.models import (
    Head,
    PackedRows,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    decoder_layers,
    head_of,
    head_weight,
    input_embeddings,
    rows_never_drawn,
    shape_of,
    shards,
    token_rows,
)
from lcdd.report import Bar
from lcdd_kernels import channel_match

SEED_STRIDE = 10_007
"""Between the seeds of the random starts: start 0 is the one that a single start would be."""


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
        n_layers, width = len(decoder_layers(model)), shape_of(model.config).d_model
        if channels is None:
            channels = patch.channels(config.channel_kind, seed=config.seed)
        if len(channels) != n_layers:
            raise InputError(f"channels: expected one index list for each of {n_layers} layers, got {len(channels)}")
        for layer, indices in enumerate(channels):
            if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < width:
                raise InputError(f"channels[{layer}]: expected indices from 0 to {width - 1}, got {indices.tolist()}")
        self._width, device = width, input_embeddings(model).weight.device
        self._channels = torch.cat([indices.to(device, torch.int32) for indices in channels])
        self._offsets = torch.tensor([0, *[len(indices) for indices in channels]]).cumsum(0)
        # the base's distributions need the base's head, also while a patch that changes the head is applied
        changed = any(model.get_parameter(name) is head_weight(model) for name in patch.unmasked)
        head = head_of(model)  # measured now, where it is not yet known
        self._base_head = head.cloned() if changed else None

    def fit(
        self,
        train_prompts: Sequence[Prompt],
        validation_prompts: Sequence[Prompt],
        *,
        log: RunLog | None = None,
        progress: bool = False,
        checkpoints: str | Path | None = None,
    ) -> Trigger:
        """Learn a trigger on `train_prompts` and return the one with the lowest loss on `validation_prompts`.

        On a CPU a resumed run ends with the bits of one that was never interrupted.

        Args:
            train_prompts, validation_prompts: chat-formatted text, or token ids.
            log: gets one line a step: step, loss and terms (of the leading start; with several, the losses of all
                under `starts`), validation_loss where it was computed.
            checkpoints: directory for the checkpoint-N directories of `config.save_steps`; `config.resume` goes on
                from the newest complete one in it. Where either is set, a signal to end waits for a checkpoint.

        Raises:
            InputError: no prompts, a prompt longer than `config.max_prompt_length`, or a checkpoint to resume from
                that is not of this run (allowed, and recorded in the trigger, by `config.resume_override`).
            TrainingStopped: the loss became NaN or infinite, or a checkpoint could not be written.
            Terminated: by a signal, after a checkpoint.
        """
        c = self.config
        train = self._encode(train_prompts, "train_prompts")
        held_out = self._encode(validation_prompts, "validation_prompts")
        self.patch.check_base(self.model)
        prompts, tokens = [*train, *held_out], c.max_answer_tokens
        warn_of_length(self.model, prompts, n_virtual=c.num_virtual_tokens, max_new_tokens=tokens)
        store = self._store(checkpoints, prompts=[train, held_out])
        state = store.newest(log, override=c.resume_override) if store is not None and c.resume else None
        with _frozen(self.model):
            targets = self.targets(train, progress=progress)
            validation = self.targets(held_out, progress=progress).prompts
            search = self._search()
            if state is not None:
                search.load_state_dict(state)
            with self.patch.applied(self.model, check=False):
                self._optimise(search, targets, validation, log=log, progress=progress, store=store)
        best, losses = search.best[search.leader], search.best_loss
        metadata = {
            "base_fingerprint": self.patch.base_fingerprint,
            "patch": self.patch.summary(),
            "validation_loss": min(losses),
            "validation_loss_of_starts": losses,
            "learned_on": len(train),
            "config": c.lasting(),
            "overrides": store.overrides if store is not None else [],
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
            over_ranks=True,
        )
        found: list[EraserPrompt | None] = [None] * len(prompts)
        moments = _Moments()
        for indices in length_batches([len(ids) for ids in prompts], c.per_device_train_batch_size):
            texts = [[*prompts[i], *answers[i][:-1]] for i in indices]
            packed = PackedRows([len(ids) for ids in texts], starts=1, shared=0, device=self._channels.device)
            tokens = self._embed([token for ids in texts for token in ids])
            ends = [first + len(prompts[i]) for first, i in zip(packed.first, indices, strict=True)]
            reads = [
                read_positions(end, min(c.kl_tail_tokens, len(prompts[i])), len(answers[i]))
                for end, i in zip(ends, indices, strict=True)
            ]
            last = [end - 1 for end in ends]
            hidden, layers = layer_forward(self.model, tokens, packed, last, chain(*chain(*reads)))
            moments.add(torch.stack(layers))
            for (tail, reply), i in zip(reads, indices, strict=True):
                found[i] = EraserPrompt(list(prompts[i]), answers[i], hidden[list(tail)], hidden[list(reply)])
        return EraserTargets([p for p in found if p is not None], self._match_target(moments))

    def _match_target(self, moments: "_Moments") -> MatchTarget:
        mean, spread = moments.mean_and_spread()
        if self.config.match_scale == "none":
            return MatchTarget(self._on_channels(mean))
        # a channel that hardly moves is not to outweigh the others
        spread = spread.maximum(1e-3 * spread.median(dim=-1, keepdim=True).values.clamp_min(1e-12))
        return MatchTarget(self._on_channels(mean / spread), spread)

    def loss(self, embeds: Tensor, batch: Sequence[EraserPrompt], match_target: MatchTarget) -> EraserLoss:
        """The loss of trigger embeddings [T, D], or of N of them [N, T, D], under the weights now in the model.

        Differentiable in `embeds`; computes only the terms whose weight is not 0. Many prompts run in several forwards,
        but means are over the whole batch, so that the loss does not depend on how it was run.
        """
        if embeds.ndim == 2:
            return self.loss(embeds[None], batch, match_target).of_start(0)
        c, starts = self.config, len(embeds)
        mine = batch[shards.rank() :: shards.world_size()]
        sizes = [len(p.prompt) + len(p.answer) + embeds.shape[1] for p in mine]
        rows = max(1, c.max_rows_per_forward // starts)
        parts = [self._run(embeds, [mine[i] for i in chunk]) for chunk in length_batches(sizes, rows)]
        parts += self._fillers(embeds, batch, len(parts), rows)
        match = tail_kl = answer_kl = embeds.new_zeros(starts)
        if c.activation_weight > 0 and self._channels.numel():
            layers = [torch.cat(runs, dim=1) for runs in zip(*(part.layers for part in parts), strict=True)]
            goal, channels, offsets = match_target.mean, self._channels, self._offsets
            layers = self._as_of_all(match_target.scaled(layers), embeds, len(batch))
            match = channel_match([x.flatten(0, 1) for x in layers], channels, offsets, goal, starts=starts)
        if c.kl_weight > 0:
            tail_kl = sum((part.tail_kl for part in parts), tail_kl) / sum(len(p.tail) for p in batch)
        if c.answer_kl_weight > 0:
            weights = sum(len(p.responses) - 1 + c.first_token_weight for p in batch)
            answer_kl = sum((part.answer_kl for part in parts), answer_kl) / weights
        l2 = embeds.square().sum(2).mean(1)
        match, tail_kl, answer_kl = shards.of_all(match, average=True), shards.of_all(tail_kl), shards.of_all(answer_kl)
        l2 = l2.detach() + (l2 - l2.detach()) / shards.world_size()  # a gradient that every rank has
        total = c.activation_weight * match + c.kl_weight * tail_kl + c.answer_kl_weight * answer_kl + c.l2_weight * l2
        return EraserLoss(total, match, tail_kl, answer_kl, l2)

    def _fillers(self, embeds: Tensor, batch: Sequence[EraserPrompt], done: int, rows: int) -> list[Part]:
        """Forwards that count for nothing, so that each rank of a sharded model has as many as the one with the most
        prompts: every rank takes part in each."""
        if not shards.holds_shards(self.model):
            return []
        most = math.ceil(math.ceil(len(batch) / shards.world_size()) / rows)
        return [self._run(embeds, batch[:1]).as_filler() for _ in range(most - done)]

    def _as_of_all(self, layers: list[Tensor], embeds: Tensor, n: int) -> list[Tensor]:
        """Residuals [N, B', D] of this rank's B' of n prompts, moved so that their mean is that of all n."""
        if shards.world_size() == 1:
            return layers
        empty = embeds.new_zeros(len(self._offsets) - 1, len(embeds), self._width, dtype=torch.float32)
        own = torch.stack([x.detach().float().sum(1) for x in layers]) if layers else empty
        others = shards.all_sum_(own.clone()) - own
        if not layers:
            return [(x / n)[:, None] for x in others]
        if not layers[0].shape[1]:  # a filler's: nothing of its own, but a backward to go through
            return [x.float().sum(1, keepdim=True) + (y / n)[:, None] for x, y in zip(layers, others, strict=True)]
        return [x.float() * (x.shape[1] / n) + (y / n)[:, None] for x, y in zip(layers, others, strict=True)]

    def _run(self, embeds: Tensor, batch: Sequence[EraserPrompt]) -> Part:
        """One forward over N triggers × B prompts (and answers, where they are wanted)."""
        c, starts = self.config, len(embeds)
        texts = [[*p.prompt, *p.answer[:-1]] if c.answer_kl_weight > 0 else p.prompt for p in batch]
        common = shared_tokens(batch)
        lengths = [len(ids) - common for ids in texts]
        packed = PackedRows(lengths * starts, starts=starts, shared=embeds.shape[1] + common, device=embeds.device)
        tokens = self._embed([token for ids in texts for token in ids[common:]])
        prefix = self._embed(texts[0][:common])
        shared = torch.cat([embeds.to(tokens), prefix.expand(starts, -1, -1)], dim=1).flatten(0, 1)
        ends = [first + len(p.prompt) - common for first, p in zip(packed.first, list(batch) * starts, strict=True)]
        reads = [
            read_positions(end, len(p.tail), len(p.responses))
            for end, p in zip(ends, list(batch) * starts, strict=True)
        ]
        tails = [tail for tail, _ in reads] if c.kl_weight > 0 else []
        replies = [reply for _, reply in reads] if c.answer_kl_weight > 0 else []
        embeddings = torch.cat([shared, tokens.repeat(starts, 1)])
        last = [end - 1 for end in ends]
        hidden, layers = layer_forward(self.model, embeddings, packed, last, chain(*tails, *replies))
        kl = partial(self._kl, self._heads(), hidden, starts)
        tail_kl = kl(tails, [p.tail for p in batch])
        answer_kl = kl(replies, [p.responses for p in batch])
        if (more := c.first_token_weight - 1) and replies:
            first = [range(reply.start, reply.start + 1) for reply in replies]
            answer_kl = answer_kl + more * kl(first, [p.responses[:1] for p in batch])
        return Part([rows.unflatten(0, (starts, -1)) for rows in layers], tail_kl, answer_kl)

    def _embed(self, ids: list[int]) -> Tensor:
        """Embeddings [n, D] of token ids."""
        table = input_embeddings(self.model)
        return table(torch.tensor(ids, dtype=torch.int64, device=table.weight.device))

    def max_norm(self) -> float:
        """Radius of the ball that every trigger embedding stays in."""
        if self.config.max_norm is not None:
            return self.config.max_norm
        rows = token_rows(self.tokenizer, self.model)
        norms = shards.full(input_embeddings(self.model).weight.detach())[rows].float().norm(dim=1)
        return self.config.max_norm_ratio * float(norms.median())

    def _search(self) -> TriggerSearch:
        """The optimisation at its start."""
        c = self.config
        special = rows_never_drawn(self.tokenizer, self.model)
        starts = [
            Trigger.random_tokens(self.model, c.num_virtual_tokens, seed=c.seed + SEED_STRIDE * n, skip=special).embeds
            for n in range(c.num_starts)
        ]
        return TriggerSearch(torch.stack(starts).to(self._channels.device), c, radius=self.max_norm())

    def _store(self, directory: str | Path | None, *, prompts: list[list[list[int]]]) -> CheckpointStore | None:
        """Where the run's state goes and comes from, if it is to; settings, base, patch and prompts identify it."""
        c = self.config
        if directory is None or not (c.save_steps or c.resume):
            return None
        blocks = [parts[name] for parts in (self.patch.deltas, self.patch.unmasked) for name in sorted(parts)]
        own = digest_of([self.patch.gate, *blocks, self._channels, self._offsets])
        digests = dict.fromkeys(shards.texts_of_all(own))  # of a patch in rows each rank has another
        identity = {
            "stage": "eraser",
            "config": c.lasting(),
            "base": self.patch.base_fingerprint,
            "patch and channels": " ".join(digests),
            "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        }
        return CheckpointStore(directory, identity=identity, save_total_limit=c.save_total_limit)

    def _optimise(
        self,
        search: TriggerSearch,
        targets: EraserTargets,
        validation: list[EraserPrompt],
        *,
        log: RunLog | None,
        progress: bool,
        store: CheckpointStore | None,
    ) -> None:
        c, embeds = self.config, search.embeds
        self.history = EraserHistory(search.steps, search.validation)
        batches = epochs(targets.prompts, c.per_device_train_batch_size, seed=c.seed)
        for _ in range(search.completed_steps):
            next(batches)
        if not search.validation:
            search.observe(self._held_out(embeds, validation, targets.match))
        first = search.completed_steps + 1
        steps = range(first, first if search.stalled(c.early_stopping_patience) else c.max_steps + 1)
        name, shown = log.stage if log else "eraser", {}
        bar = Bar(c.max_steps, name, done=search.completed_steps, main=True, hidden=not progress)
        with bar, termination(listen=store is not None) as asked:
            for step in steps:
                line = self._step(search, next(batches), validation, targets.match)
                search.steps.append(line)
                if log is not None:
                    log.write(line)
                if "validation_loss" in line:
                    shown = {"loss": f"{line['loss']:.3f}", "held out": f"{line['validation_loss']:.3f}"}
                bar.update(shown=shown)
                if search.stalled(c.early_stopping_patience):
                    break
                if store is None:
                    continue
                stop = not shards.all_agree(not asked.signal)
                if stop or (c.save_steps and step % c.save_steps == 0 and step < c.max_steps):
                    store.save(step, search.state_dict())
                if stop:
                    raise Terminated(asked, step=step, last=store.last())

    def _step(
        self,
        search: TriggerSearch,
        batch: list[EraserPrompt],
        validation: list[EraserPrompt],
        match_target: MatchTarget,
    ) -> dict[str, Any]:
        """One optimisation step, and the held-out loss where it is due; returns the log's line."""
        c, embeds, step = self.config, search.embeds, search.completed_steps + 1
        parts = []
        for group in start_groups(embeds, len(batch), c.max_rows_per_forward):
            loss = self.loss(group, batch, match_target)
            loss.total.sum().backward()
            parts.append(loss.terms())
        terms = {key: torch.cat([part[key] for part in parts]).tolist() for key in parts[0]}
        for start, value in enumerate(terms["loss"]):
            if not math.isfinite(value):
                which = f" of start {start}" if len(embeds) > 1 else ""
                raise TrainingStopped(f"the loss{which} became {value} at step {step}; lower --learning_rate")
        leader = search.leader
        line: dict[str, Any] = {"step": step, "learning_rate": search.learning_rate}
        line |= {key: values[leader] for key, values in terms.items()}
        if len(embeds) > 1:
            line["starts"] = terms["loss"]
        shards.all_sum_(search.gradient)
        search.step()
        if step % c.eval_steps == 0 or step == c.max_steps:
            search.observe(self._held_out(embeds, validation, match_target))
            line["validation_loss"] = search.validation[-1]["loss"]
        return line

    @torch.no_grad()
    def _held_out(self, embeds: Tensor, prompts: list[EraserPrompt], match_target: MatchTarget) -> list[float]:
        """Each start's loss of the held-out prompts as one batch."""
        groups = start_groups(embeds, len(prompts), self.config.max_rows_per_forward)
        return torch.cat([self.loss(group, prompts, match_target).total for group in groups]).tolist()

    def _heads(self) -> tuple[Head, Head]:
        """The model's head and the base's, whole."""
        head = head_of(self.model).detached().gathered()
        return head, head if self._base_head is None else self._base_head.gathered()

    def _kl(
        self, heads: tuple[Head, Head], hidden: Tensor, starts: int, runs: list[range], references: list[Tensor]
    ) -> Tensor:
        """Each start's KL(base ‖ patched) [N], summed over its runs of positions of `hidden` [tokens, D]; a run is as
        long as its reference. No runs: 0."""
        if not runs:
            return hidden.new_zeros(starts, dtype=torch.float32)
        (head, base_head), reference = heads, torch.cat(references)
        students = hidden[torch.tensor(list(chain(*runs)), device=hidden.device)].chunk(starts)
        return torch.stack(
            [head.kl(student, ref_hidden=reference, ref_head=base_head, reduction="sum") for student in students]
        )

    def _on_channels(self, layers: Tensor) -> Tensor:
        """Values [L, D] of each layer on its channels, side by side: [sum n_l]."""
        picked = self._channels.long().split(self._offsets.diff().tolist())
        return torch.cat([values[channels] for values, channels in zip(layers, picked, strict=True)])

    def _encode(self, prompts: Sequence[Prompt], name: str) -> list[list[int]]:
        if not prompts:
            raise InputError(f"{name}: expected at least one prompt, got none")
        encoded = encode_prompts(self.tokenizer, prompts)
        for index, ids in enumerate(encoded):
            if len(ids) > self.config.max_prompt_length:
                raise InputError(
                    f"{name}[{index}]: expected at most max_prompt_length = {self.config.max_prompt_length} tokens, "
                    f"got {len(ids)}"
                )
        return encoded


class _Moments:
    """Mean and standard deviation of residuals [L, B, D] over all B that were added; summed in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, layers: Tensor) -> None:
        wide = layers.double()
        self.count += wide.shape[1]
        self.total = self.total + wide.sum(1)
        self.squares = self.squares + wide.square().sum(1)

    def mean_and_spread(self) -> tuple[Tensor, Tensor]:
        """float32 [L, D] each."""
        assert isinstance(self.total, Tensor)
        assert isinstance(self.squares, Tensor)
        mean = self.total / self.count
        return mean.float(), (self.squares / self.count - mean.square()).clamp_min(0).sqrt().float()


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
