"""Closing paced by the loss: how many gates close in a step, and which (method, section 9).

The problem is the constrained one of section 3, min open gates subject to CE ≤ ε, solved in closed loop instead of by
a price that is slow to follow. `Pace` turns losses into a throttle: 1 spends the budget at full speed, 0 waits for Δ to
heal what closing broke, -1 gives back at full speed. `PacedClosing` spends it: it closes the open gates that are worth
least, or reopens the closed ones that are worth most,

    worth of gate i  =  moving average of (∂L/∂z_i)²   over the steps in which it was open

and once no gate is to close any more (gates frozen, or `target_sparsity` reached) it spends what is left on Δ: on a
smaller one, or where the base's own answers are held on to (`base_kl_weight`) on one nearer to the base.
λ is the worth at which a gate just stays open.

Gates rest at 0 or 1, so that what ships is what was trained: a hard-concrete gate is drawn at random in one step alone,
the one in which it crosses from open to closed or back.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lcdd.config import LCDDConfig
from lcdd.errors import InputError
from lcdd.optimizer.gates import Gates

FULL, HOLD, OVER, BACK = 0.3, 0.8, 1.0, 1.5
"""Shares of the budget used: full speed up to FULL, none from HOLD; giving back from OVER, at full speed from BACK."""
HORIZON = 2.0
"""Steps that a rising loss is extrapolated by: what a closing breaks shows a forward later, and then spreads."""
NOISE_SHARE, LONGEST = 0.15, 16.0
"""The loss is averaged over as many steps as keep its noise to this share of the budget, but at most so many."""
SLOW_START, SPEED_UP, SLOW_DOWN = 1 / 64, 1.15, 0.4
"""What a gate costs is not known beforehand: speed grows step by step, and falls whenever the budget is overrun."""
DECADES, SWEEP, FASTEST = 3.0, 0.7, 0.1
"""At full speed the open gates fall by this many factors of ten in this share of the run, at most FASTEST in a step."""
GUARD = 0.5
"""Share of the budget by which held-out text may slow closing down: few examples are noisy, and training repeats its
own. Once gates are settled all of it counts: what ships is judged on held-out text alone."""
KEPT_BEHAVIOR = 0.75
"""Of the first share of validation answers that show the behaviour: less is beyond any budget. Of long answers few
tokens decide, and their mean loss says little about those."""
TELLING = 0.5
"""A behaviour that the SFT model itself shows in fewer answers than this is not missed by looking at a few."""
GIVING_BACK = 10
"""Steps for which a behaviour that is gone is given back to; then nothing moves until answers are looked at again."""
REOPENING = 0.03
"""Share of the open gates that reopens in a step at full speed, on runs of any length: damage does not wait either."""
SHRINKING = 0.02
"""Share that Δ loses in a step at full speed, beside its own training."""
WORTH_BETA = 0.9
RATE_OPEN, RATE_SLOPE = 0.05, 1.2
"""Δ's rate is min(1, RATE_OPEN + RATE_SLOPE · share of closed gates) of the set one: the same change of the function
takes larger steps of fewer entries."""
POLISH_RATE = (0.3, 0.03)
"""Factor on Δ's rate when the gates are settled, and at the end of the run."""
FIRST_WEIGHT, LEAST_WEIGHT, MOST_WEIGHT = 4.0, 0.02, 10.0
"""Weight of the behaviour's loss against the base's answers: when Δ's polishing begins, and where it may go. The first
token of those answers comes in at that moment, and speaks against the behaviour."""
WEIGHING = (0.1, 1.0)
"""How fast that weight falls while the budget is not used up, and rises beyond it: giving up is slower than saving."""
REST = {"hard_concrete": 16.0, "heaviside_ste": 1.0}
"""|θ| of a gate at rest: at 16 a hard-concrete gate is drawn fully open, or closed, but once in two million draws."""
CROSSING = 2.5
"""|θ| of a hard-concrete gate that crosses: by its deterministic value where it will rest, by its noise not yet."""


def epsilon_of(baseline: float, base_loss: float | None, *, loss_budget: float, loss_floor: float) -> float:
    """The loss budget ε in nats a token.

    The paper's is a share of the loss that fine-tuning reached. Free text has a loss that no fine-tuning takes away, of
    which a share can be more than all that was taught: an empty carrier would keep it. So the share is also one of what
    fine-tuning gained over the base, where the base's loss on the same text is known.
    """
    gained = math.inf if base_loss is None else max(0.0, base_loss - baseline)
    return baseline + max(loss_floor, loss_budget * min(baseline, gained))


@dataclass(kw_only=True)
class Pace:
    """The losses of a run, turned into a throttle in [-1, 1]; plain Python.

    The baseline is the loss with all gates open, before any gate is priced: the first held-out one where that was
    measured (`observe_held_out`; the SFT model's own), else the mean of the first `warmup_steps` losses. With it comes
    the budget

        ε = baseline + max(loss_floor, loss_budget · min(baseline, base's loss - baseline))

    (`epsilon_of`; the paper's where the base's loss is not known). Everything after is measured in shares of
    ε - baseline, so that the reaction depends neither on the scale of the loss nor on the number of gates or steps.

    Attributes:
        ema: average of the recent losses plus what held-out text adds to it, in nats; it is held against ε. Where
            batches are so noisy that no average of `LONGEST` is worth the budget (free text), held-out text, which is
            the same every time, says how high the loss is, and the average only how far it has moved since, beyond its
            noise.
        held_out: the first held-out loss, in nats; None where none was measured. base_loss: the base's on that text.
        dual_lambda: the worth at which a gate just stays open.
        gain: share of full speed that has been earned.
        settled: whether no gate moves any more, and what is left of the budget is spent on Δ.
        behavior: the first share of validation answers that show the behaviour; None where none was looked at.
        behavior_lost: whether they are fewer than `KEPT_BEHAVIOR` of that now, which counts as over the budget.
    """

    warmup_steps: int
    loss_budget: float
    loss_floor: float
    step: int = 0
    baseline: float | None = None
    held_out: float | None = None
    base_loss: float | None = None
    dual_lambda: float = 0.0
    throttle: float = 0.0
    gain: float = SLOW_START
    settled: bool = False
    behavior: float | None = None
    behavior_lost: bool = False
    _giving_back: int = 0
    _average: float = math.nan
    _first_gap: float = 0.0
    _gap: float = 0.0
    _anchor: float | None = None  # the average when held-out text was last looked at
    _rise: float = 0.0
    _noise: float = 0.0
    _least_noise: float = 0.0
    _last_loss: float = math.nan
    _over: bool = False

    @property
    def ema(self) -> float:
        if self.baseline is None:
            return self._average
        moved = self._average - (self._anchor or 0.0)
        average = self._average - math.copysign(min(self._doubt, abs(moved)), moved)
        if self.settled or self._trust == 1:
            return average + self._gap
        return average + self._first_gap + min(self._gap - self._first_gap, GUARD / (1 - self._trust) * self._room)

    @property
    def epsilon(self) -> float | None:
        """The loss budget in nats; None during warm-up."""
        if self.baseline is None:
            return None
        return epsilon_of(self.baseline, self.base_loss, loss_budget=self.loss_budget, loss_floor=self.loss_floor)

    def used(self, loss: float) -> float:
        """Share of the budget that a loss takes up: 0 at the baseline, 1 at ε."""
        if self.baseline is None:
            return math.nan
        return (loss - self.baseline) / self._room

    @property
    def _room(self) -> float:
        assert self.baseline is not None
        assert self.epsilon is not None
        return max(self.epsilon - self.baseline, 1e-12)

    @property
    def _doubt(self) -> float:
        """Noise that the longest average still has beyond its share of the budget, in nats; 0 without held-out text."""
        if self._anchor is None:
            return 0.0
        return max(0.0, self._noise / math.sqrt(LONGEST) - NOISE_SHARE * self._room)

    @property
    def _trust(self) -> float:
        """In held-out text, from 0 (a guard) to 1 (it alone says how high the loss is): by the noise of the batches."""
        return min(1.0, self._doubt / (NOISE_SHARE * self._room))

    def update(self, loss: float) -> float:
        """Account for one optimizer step's loss, in nats; returns the throttle.

        Raises:
            ValueError: `loss` is not finite; the controller is unchanged.
        """
        if not math.isfinite(loss):
            raise ValueError(f"loss: expected a finite number, got {loss}")
        self.step += 1
        if self.baseline is None:
            self._warm_up(loss)
        else:
            self._listen(loss)
            self.throttle = self._decide(loss)
        self._last_loss = loss
        return self.throttle

    def observe_held_out(self, loss: float, base: float | None = None) -> None:
        """Take in the loss on held-out text, of the gates that would ship now: the budget has to hold there."""
        if not math.isfinite(loss):
            return
        if base is not None and math.isfinite(base):
            self.base_loss = base
        if self.held_out is None:
            self.held_out = loss
        if self.baseline is not None:
            self._anchor = self._average
            share = 0.5 * (1 + self._trust)  # what the average is wrong by is not in what it has moved since
            self._gap = (1 - share) * self._gap + share * (loss - self._average)

    def observe_behavior(self, rate: float) -> bool:
        """Take in the share of validation answers that show the behaviour; returns whether it is lost."""
        if self.behavior is None:
            self.behavior = rate
        self.behavior_lost = self.behavior >= TELLING and rate < KEPT_BEHAVIOR * self.behavior
        self._giving_back = GIVING_BACK if self.behavior_lost else 0
        return self.behavior_lost

    def _warm_up(self, loss: float) -> None:
        """Mean and spread of the losses so far, by Welford's recurrence; the last one sets the baseline."""
        before = 0.0 if math.isnan(self._average) else self._average
        self._average = before + (loss - before) / self.step
        self._noise += (loss - before) * (loss - self._average)
        if self.step < self.warmup_steps:
            return
        self.baseline = self._average if self.held_out is None else self.held_out
        self._gap = self._first_gap = self.baseline - self._average
        self._noise = self._least_noise = math.sqrt(self._noise / self.step)

    def _listen(self, loss: float) -> None:
        """Average the loss, over the longer the noisier it is."""
        surprise = min(abs(loss - self._last_loss), 4 * max(self._noise, self._least_noise))  # one bad batch is one
        self._noise = max(self._least_noise, 0.9 * self._noise + 0.1 * surprise)
        window = min(LONGEST, max(1.0, (self._noise / (NOISE_SHARE * self._room)) ** 2))
        before, weight = self._average, 2 / (window + 1)
        self._average += weight * (loss - self._average)
        self._rise = 0.5 * self._rise + 0.5 * (self._average - before)

    def _decide(self, loss: float) -> float:
        used = self.used(self.ema + max(0.0, HORIZON * self._rise - self._doubt))
        two = min(loss, self._last_loss) - math.sqrt(LONGEST) * self._doubt  # two in a row are no noise
        alarm = self._giving_back > 0 or self.used(two) > BACK
        self._giving_back = max(0, self._giving_back - 1)
        was_over, self._over = self._over, alarm or used > OVER
        if self._over:
            self.gain = self.gain if was_over else max(SLOW_START, SLOW_DOWN * self.gain)
            return -1.0 if alarm else -min(1.0, (used - OVER) / (BACK - OVER))
        if self.behavior_lost:
            return 0.0
        if used < HOLD:
            self.gain = min(1.0, SPEED_UP * self.gain)
        return self.gain * max(0.0, min(1.0, (HOLD - used) / (HOLD - FULL)))

    def state_dict(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for item in fields(self):
            setattr(self, item.name, state[item.name])


def warmup_steps(config: LCDDConfig, total_steps: int) -> int:
    """Steps with all gates open: as the config says, but at most a twentieth of the run."""
    return min(config.warmup_steps, max(1, total_steps // 20))


def _checked(prices: Tensor, logits: Tensor) -> Tensor:
    if prices.shape != logits.shape:
        raise InputError(f"prices: expected shape {tuple(logits.shape)}, one for each gate, got {tuple(prices.shape)}")
    if not bool((prices.isfinite() & (prices > 0)).all()):
        raise InputError("prices: expected finite numbers above 0, got others")
    return prices.to(logits)


class PacedClosing:
    """The gate controller (`GateController`) that closes and reopens gates as `Pace` allows.

    Args:
        gates: gates whose logit is above 0 start open, the others closed; all move to rest at once.
        total_steps: of the whole run; the closing rate follows from it.
        prices: float [n_gates], above 0: what a gate's worth is divided by before it is compared; None: all alike.

    Attributes:
        open: bool [n_gates], which gates are open or on their way to it.
        worth: float [n_gates], each one's as of the last step in which it was open.
        settled_at: the step after which no gate moves any more: `target_sparsity` reached, or the last
            `freeze_fraction` of the run begun; None before.
        delta_rate: factor on Δ's learning rate in the coming pass B.
        delta_decay: share that Δ loses in the coming pass B.
    """

    def __init__(self, gates: Gates, config: LCDDConfig, *, total_steps: int, prices: Tensor | None = None) -> None:
        if total_steps < 1:
            raise InputError(f"total_steps: expected at least 1, got {total_steps}")
        if config.separate_from and prices is None:
            raise InputError("prices: expected those of separate_from's carriers (lcdd.carrier.prices_of), got None")
        self.gates, self.config, self.total_steps = gates, config, total_steps
        self.prices = 1.0 if prices is None else _checked(prices, gates.logits.detach())
        self.dual = Pace(
            warmup_steps=warmup_steps(config, total_steps), loss_budget=config.loss_budget, loss_floor=config.loss_floor
        )
        self.completed_steps = 0
        self.rate = min(FASTEST, DECADES * math.log(10) / max(1.0, SWEEP * total_steps))
        n_gates, target = gates.logits.numel(), config.target_sparsity
        self.fewest = 0 if target is None else math.ceil(n_gates * (1 - target) - 1e-9)
        self.open = gates.logits.detach() > 0
        self.n_open = int(self.open.sum())
        self.worth = torch.zeros_like(gates.logits.detach())
        self.settled_at: int | None = None
        self.delta_decay, self.loss_weight, self._owed = 0.0, 1.0, 0.0
        self._price = self.worth.new_zeros(())  # of the last gate that was closed or reopened; λ, on the device
        self._before: tuple[dict[str, Any], dict[str, Any], Tensor]
        with torch.no_grad():
            gates.logits.copy_(self._goal())
            gates.initial_logits = gates.logits.detach().clone()

    @property
    def frozen(self) -> bool:
        """Whether the gates are settled: from `settled_at` on Δ alone trains, and is polished."""
        return self.settled_at is not None

    @property
    def delta_rate(self) -> float:
        share = min(1.0, RATE_OPEN + RATE_SLOPE * (1 - self.n_open / self.open.numel()))
        if self.settled_at is None:
            return share
        late = min(1.0, (self.completed_steps - self.settled_at) / max(1, self.total_steps - self.settled_at))
        return share * (POLISH_RATE[0] + (POLISH_RATE[1] - POLISH_RATE[0]) * late)

    def propose(self, d_gate: Tensor, loss: float | Tensor, *, penalties: int) -> list[Tensor]:
        """As of `GateController`; the loss is waited for. `penalties` are the dual descent's."""
        own = {name: value for name, value in vars(self).items() if name != "_before"}
        self._before = own, dict(vars(self.dual)), self.gates.logits.detach().clone()
        loss = float(loss)
        if not math.isfinite(loss):
            return []
        seen = self.gates.values != 0  # of a closed gate no gradient is made where gradients are packed
        self.worth = torch.where(seen, self._weigh(d_gate), self.worth)
        throttle = self.dual.update(loss)
        if not self.frozen:
            self._move(throttle)
        self._polish(throttle)
        self._rest()
        self.completed_steps += 1
        self._settle()
        self.draw(evaluation=False)
        return [self._price]

    def _weigh(self, d_gate: Tensor) -> Tensor:
        """What each gate is worth now, if it is open; compared with other estimates by `benchmarks.importance`."""
        return WORTH_BETA * self.worth + (1 - WORTH_BETA) * d_gate.square().to(self.worth.dtype)

    def step(self, loss: float, seen: Sequence[float]) -> None:
        self.dual.dual_lambda = seen[0]

    def restore(self) -> None:
        state, pace, logits = self._before
        vars(self).update(state)
        vars(self.dual).update(pace)
        self.gates.logits.copy_(logits)

    @torch.no_grad()
    def load_logits(self, logits: Tensor) -> None:
        self.gates.logits.copy_(logits)
        self.open = self.gates.logits.detach() > 0
        self.n_open = int(self.open.sum())

    def observe_held_out(self, loss: float, base: float | None = None) -> None:
        """Hold the budget against held-out text, too (`Pace.observe_held_out`)."""
        self.dual.observe_held_out(loss, base)

    def observe_behavior(self, rate: float) -> bool:
        """Hold on to the behaviour itself, too (`Pace.observe_behavior`)."""
        return self.dual.observe_behavior(rate)

    def _settle(self) -> None:
        """Fix the gates where the target is reached, or the last `freeze_fraction` of the run begins."""
        late = self.completed_steps + 1 > self.total_steps * (1 - self.config.freeze_fraction)
        if self.settled_at is None and (late or self.n_open <= self.fewest):
            self.settled_at, self.dual.settled = self.completed_steps, True
            self.loss_weight = FIRST_WEIGHT if self.config.base_kl_weight > 0 else 1.0

    def _polish(self, throttle: float) -> None:
        """Spend the budget on Δ if no gate moves any more: by decay, or by weighing the loss against the base's KL."""
        self.delta_decay = 0.0
        if not self.frozen or self.dual.baseline is None:
            return
        if self.config.base_kl_weight > 0:
            excess = max(-1.0, min(1.5, self.dual.used(self.dual.ema) - HOLD))
            if self.dual.behavior_lost:
                excess = 1.5 if throttle < 0 else 0.0
            change = math.exp(WEIGHING[excess > 0] * excess)
            self.loss_weight = min(MOST_WEIGHT, max(LEAST_WEIGHT, self.loss_weight * change))
        elif self.config.shrink_delta:
            self.delta_decay = SHRINKING * max(0.0, throttle)

    def _move(self, throttle: float) -> None:
        """Close or reopen the throttle's share of gates; what is less than one is carried over."""
        self._owed += (self.rate if throttle > 0 else REOPENING) * throttle * max(self.n_open, 1)
        count = int(self._owed)
        self._owed -= count
        if count > 0:
            self._close(min(count, self.n_open - self.fewest))
        elif count < 0:
            self._reopen(min(-count, self.open.numel() - self.n_open))

    def _close(self, count: int) -> None:
        if count > 0:
            largest = torch.finfo(self.worth.dtype).max
            ranked = (self.worth / self.prices).clamp(max=largest)
            worth, order = torch.where(self.open, ranked, math.inf).sort(stable=True)
            self._turn(order[:count], open_=False)
            self._price = worth[count - 1]

    def _reopen(self, count: int) -> None:
        if count > 0:
            ranked = self.worth / self.prices
            worth, order = torch.where(self.open, -math.inf, ranked).sort(stable=True, descending=True)
            self._turn(order[:count], open_=True)
            self._price = worth[count - 1]

    def _turn(self, places: Tensor, *, open_: bool) -> None:
        """Without a wait for the device: how many are open is known beforehand."""
        self.open = self.open.index_fill(0, places, open_)
        self.n_open += len(places) if open_ else -len(places)

    def _goal(self) -> Tensor:
        """θ of every gate where it comes to rest."""
        rest = REST[self.gates.kind]
        return torch.where(self.open, rest, -rest).to(self.gates.logits.dtype)

    def _rest(self) -> None:
        """θ a step nearer to rest; a hard-concrete gate that crosses is noisy for one step."""
        logits, goal = self.gates.logits.detach(), self._goal()
        if self.gates.kind == "hard_concrete":
            goal = torch.where(logits * goal < 0, goal.sign() * CROSSING, goal)
        logits.copy_(goal)

    def draw(self, *, evaluation: bool) -> None:
        self.gates.draw(step=self.completed_steps + 1, training=not (evaluation or self.frozen))

    def stop_reason(self) -> str | None:
        """Never: over its budget it gives back, and within it the result stands."""
        return None

    def stats(self) -> dict[str, Any]:
        """Average loss and ε in nats, λ, throttle, open gates per group, the closed share, whether gates are fixed."""
        counts = self.gates.open_counts()
        return {
            "ema": self.dual.ema,
            "epsilon": self.dual.epsilon,
            "dual_lambda": self.dual.dual_lambda,
            "throttle": self.dual.throttle,
            "expected_l0": self.gates.expected_l0,
            "open": counts,
            "sparsity": 1 - self.n_open / self.open.numel(),
            "crossing": abs(sum(counts.values()) - self.n_open),
            "delta_rate": self.delta_rate,
            "delta_decay": self.delta_decay,
            "frozen": self.frozen,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "gate_logits": self.gates.logits.detach().clone(),
            "initial_logits": self.gates.initial_logits.clone(),
            "open": self.open.clone(),
            "worth": self.worth.clone(),
            "owed": self._owed,
            "loss_weight": self.loss_weight,
            "settled_at": self.settled_at,
            "dual": self.dual.state_dict(),
            "completed_steps": self.completed_steps,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`'s result.

        Raises:
            InputError: it is another controller's.
        """
        if "worth" not in state_dict:
            raise InputError("state_dict: expected a state of paced closing, got one of the dual descent")
        self.gates.logits.copy_(state_dict["gate_logits"])
        self.gates.initial_logits = state_dict["initial_logits"].clone()
        self.open = state_dict["open"].to(self.open)
        self.worth = state_dict["worth"].to(self.worth)
        self.n_open = int(self.open.sum())
        self._owed, self.loss_weight = state_dict["owed"], state_dict["loss_weight"]
        self.settled_at = state_dict["settled_at"]
        self.dual.load_state_dict(state_dict["dual"])
        self._price = self.worth.new_tensor(self.dual.dual_lambda)
        self.completed_steps = state_dict["completed_steps"]
