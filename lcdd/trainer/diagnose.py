"""What went wrong with a carrier, said in words: dead, over-pruned, stalled, or chosen by the initial noise."""

import math
from dataclasses import dataclass

from lcdd.config import LCDDConfig
from lcdd.optimizer import epsilon_of

DEAD_SHARE = 0.5
"""A carrier that keeps less than this share of what SFT learned is dead."""
KEPT_SHARE = 0.9
"""Between DEAD_SHARE and this, with the loss above its budget, it is over-pruned."""
STALLED_SPARSITY = 0.25
NOISE_AUC = 0.95


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong: `code` is dead_carrier, over_pruned, stalled, noise_chosen or behavior_lost."""

    code: str
    message: str


def _remedies(config: LCDDConfig) -> str:
    """The settings that differ from the ones that worked, as flags."""
    advice = []
    if config.gate_kind != "hard_concrete":
        advice.append("--gate_kind hard_concrete (with --gate_init_mean 2.5 --gate_init_std 0.1)")
    if config.gate_optimizer != "adam":
        advice.append("--gate_optimizer adam")
    if config.violation_clip > 1.0:
        advice.append("--violation_clip 1")
    if config.dual_lambda_init > 1e-3:
        advice.append("--dual_lambda_init 1e-3")
    if config.dual_lr > 0.05 or config.dual_lr == 0:
        advice.append("--dual_lr 0.05")
    if not config.completion_only:
        advice.append("--completion_only (the prompt's entropy hides the loss of the behaviour)")
    if config.freeze_fraction < 0.1:
        advice.append("--freeze_fraction 0.2")
    if not advice:
        advice.append(f"--dual_lr {config.dual_lr / 2:g}")
        advice.append("more --max_steps")
        advice.append(f"--dual_lambda_max {config.dual_lambda_max / 10:g}")
    return "; ".join(advice)


def diagnose(
    *,
    config: LCDDConfig,
    loss_base: float,
    loss_sft: float,
    loss_carrier: float,
    sparsity: float,
    dual_lambda: float,
    ema: float,
    epsilon: float | None,
    auc_initial_theta: float,
) -> list[Finding]:
    """Judge a finished LCDD run.

    Args:
        loss_base, loss_sft, loss_carrier: mean loss on the completions alone, in nats a token, on the same held-out
            examples, of the base, of the model that LCDD started from, and of the carrier (deterministic gates).
        sparsity: share of closed gates.
        dual_lambda, ema, epsilon: the dual's state at the end (epsilon is None if warm-up never ended).
        auc_initial_theta: `auc` of the initial gate logits against the kept gates; NaN if all or none was kept.

    Returns:
        The findings; empty if the run is sound.
    """
    learned = loss_base - loss_sft
    share = (loss_base - loss_carrier) / learned if learned > 0 else math.nan
    reference = loss_base if config.paced else None
    allowed = epsilon_of(loss_sft, reference, loss_budget=config.loss_budget, loss_floor=config.loss_floor)
    findings = []
    numbers = (
        f"on held-out completions the base has {loss_base:.3f} nats a token, SFT {loss_sft:.3f}, "
        f"the carrier {loss_carrier:.3f}: it keeps {share:.0%} of what SFT learned, with {sparsity:.1%} of the "
        f"gates closed and lambda at {dual_lambda:.3g}"
    )
    if not math.isfinite(loss_carrier) or share < DEAD_SHARE:
        findings.append(
            Finding(
                code="dead_carrier",
                message=f"Dead carrier: {numbers}. The gates went down faster than the loss could object. "
                f"Change: {_remedies(config)}.",
            )
        )
    elif share < KEPT_SHARE and loss_carrier > allowed:
        findings.append(
            Finding(
                code="over_pruned",
                message=f"Over-pruned: {numbers}, where the budget allows {allowed:.3f} nats. "
                f"Change: {_remedies(config)}; or a smaller --loss_budget (now {config.loss_budget:g}).",
            )
        )
    if sparsity >= STALLED_SPARSITY and auc_initial_theta >= NOISE_AUC:  # False for NaN
        findings.append(
            Finding(
                code="noise_chosen",
                message=f"Chosen by noise: the initial gate logits predict the gates that stayed open "
                f"(AUC {auc_initial_theta:.3f}), so the carrier is the initial noise and not the behaviour's channels. "
                f"The penalty's gradient outweighs the loss's at every gate. Change: {_remedies(config)}.",
            )
        )
    if sparsity < STALLED_SPARSITY and not findings:
        findings.append(Finding(code="stalled", message=_stalled(config, sparsity, dual_lambda, ema, epsilon)))
    return findings


def behavior_lost(before: float, after: tuple[float, float], config: LCDDConfig) -> list[Finding]:
    """Whether the behaviour went although the loss kept within its budget: of long answers few tokens decide.

    before: the SFT model's rate of it. after: the interval of the carrier's, on the same prompts.
    """
    if after[1] >= KEPT_SHARE * before:
        return []
    held = " or --base_kl_weight 0 (the base's answers are held on to at the behaviour's cost)"
    budget, floor = config.loss_budget, config.loss_floor
    return [
        Finding(
            code="behavior_lost",
            message=f"Behaviour lost: of the validation prompts' answers {before:.0%} showed it before LCDD, now it is "
            f"{after[0]:.0%} to {after[1]:.0%}: of long answers few tokens decide. Change: a smaller --loss_budget "
            f"(now {budget:g}) or --loss_floor (now {floor:g}){held if config.base_kl_weight else ''}.",
        )
    ]


def _stalled(config: LCDDConfig, sparsity: float, dual_lambda: float, ema: float, epsilon: float | None) -> str:
    start = f"Stalled compression: only {sparsity:.1%} of the gates are closed. "
    if epsilon is None:
        return (
            f"{start}Warm-up ({config.warmup_steps} steps) never ended, so lambda never moved. "
            f"Change: more --max_steps, or a smaller --warmup_steps."
        )
    if ema > epsilon:
        return (
            f"{start}The loss ({ema:.4g}) stayed above epsilon ({epsilon:.4g}), which keeps lambda down "
            f"({dual_lambda:.3g}). Change: a larger --loss_budget (now {config.loss_budget:g}) or --loss_floor "
            f"(now {config.loss_floor:g}), or a smaller --learning_rate."
        )
    return (
        f"{start}The loss ({ema:.4g}) is below epsilon ({epsilon:.4g}), so lambda ({dual_lambda:.3g}) was still "
        f"growing. Change: more --max_steps, a larger --dual_lr (now {config.dual_lr:g}), --dual_lambda_init "
        f"(now {config.dual_lambda_init:g}) or --gate_lr (now {config.gate_lr:g})."
    )
