"""Cases of the chunk losses: a vocabulary that is no multiple of a block, wide logits, a label at either end."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from lcdd_kernels.cases import Case, Inputs
from lcdd_kernels.reference.linear_loss import shaped_logits, statistics_dtype

STUDENTS = 3
ROWS = 6


def _logits(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4.0 * torch.randn((ROWS, 2111 * size), generator=generator)).to(dtype).to(device)


def _results(logits: Tensor) -> Inputs:
    """Where losses and gradient go: poisoned."""
    losses = torch.full((ROWS,), float("nan"), dtype=statistics_dtype(logits.dtype), device=logits.device)
    return {"losses": losses, "d_logits": torch.full_like(logits, float("nan"))}


def _shape(seed: int) -> dict[str, float]:
    """Logits as the head gives them, or for odd seeds scaled and capped where the cap bends (they reach about 15)."""
    return {"scale": 0.75, "softcap": 9.0} if seed % 2 else {"scale": 1.0, "softcap": 0.0}


def make_cross_entropy(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    logits = _logits(dtype, device, seed, size)
    vocab = logits.shape[1]
    labels = torch.tensor([0, vocab - 1, vocab // 2, 7, 1, vocab - 2], device=device)
    return {"logits": logits, "labels": labels, **_results(logits), **_shape(seed)}


def make_kl(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    logits = _logits(dtype, device, seed, size)
    reference = (logits[: ROWS // STUDENTS] + 0.5 * _logits(dtype, device, seed + 1, size)[STUDENTS:][:2]).to(dtype)
    reference[:, ::101] = float("-inf")
    shape = {**_shape(seed), "ref_scale": 1.0, "ref_softcap": 0.0}  # a capped −inf is none
    return {"logits": logits, "ref_logits": reference, **_results(logits), **shape}


def cross_entropy_expression(
    logits: Tensor, labels: Tensor, losses: Tensor, d_logits: Tensor, *, scale: float, softcap: float
) -> None:
    with torch.enable_grad():
        x = logits.clone().requires_grad_()
        values = cross_entropy(shaped_logits(x.float(), scale, softcap), labels, reduction="none")
        (grad,) = torch.autograd.grad(values.sum(), x)
    d_logits.copy_(grad)
    losses.copy_(values.detach())


def kl_expression(
    logits: Tensor,
    ref_logits: Tensor,
    losses: Tensor,
    d_logits: Tensor,
    *,
    scale: float,
    softcap: float,
    ref_scale: float,
    ref_softcap: float,
) -> None:
    with torch.enable_grad():
        x = logits.clone().requires_grad_()
        reference = shaped_logits(ref_logits.float(), ref_scale, ref_softcap).log_softmax(dim=1).repeat(STUDENTS, 1)
        # kl_div with log_target makes NaN of a −inf log-probability; with probabilities it takes 0·log 0 as 0.
        values = kl_div(
            shaped_logits(x.float(), scale, softcap).log_softmax(dim=1), reference.exp(), reduction="none"
        ).sum(dim=1)
        (grad,) = torch.autograd.grad(values.sum(), x)
    d_logits.copy_(grad)
    losses.copy_(values.detach())


# Probabilities are exponentials, of arguments up to 16 where they are not tiny; a cap divides.
_APPROXIMATIONS = {"losses": 4 + 4 + 16, "d_logits": 2 * (4 + 16)}

CASES = {
    "cross_entropy_chunk_": Case(
        make=make_cross_entropy,
        expression=cross_entropy_expression,
        outputs=("losses", "d_logits"),
        in_place=True,
        depth={"losses": 12, "d_logits": 12},
        approximations=_APPROXIMATIONS,
    ),
    "kl_chunk_": Case(
        make=make_kl,
        expression=kl_expression,
        outputs=("losses", "d_logits"),
        in_place=True,
        depth={"losses": 12, "d_logits": 12},
        approximations=_APPROXIMATIONS,
    ),
}
