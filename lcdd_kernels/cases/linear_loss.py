"""Cases of the chunk losses: a vocabulary that is no multiple of a block, wide logits, a label at either end."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from lcdd_kernels.cases import Case, Inputs
from lcdd_kernels.reference.linear_loss import shaped_logits, statistics_dtype

ROWS = 5


def _logits(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4.0 * torch.randn((ROWS, 2111 * size), generator=generator)).to(dtype).to(device)


def _losses(logits: Tensor) -> Tensor:
    """Where the losses go: poisoned."""
    return torch.full((ROWS,), float("nan"), dtype=statistics_dtype(logits.dtype), device=logits.device)


def _shape(seed: int) -> dict[str, float]:
    """Logits as the head gives them, or for odd seeds scaled and capped where the cap bends (they reach about 15)."""
    return {"scale": 0.75, "softcap": 9.0} if seed % 2 else {"scale": 1.0, "softcap": 0.0}


def make_cross_entropy(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    logits = _logits(dtype, device, seed, size)
    vocab = logits.shape[1]
    labels = torch.tensor([0, vocab - 1, vocab // 2, 7, 1], device=device)
    shape = _shape(seed)
    return {"logits": logits, "labels": labels, "losses": _losses(logits), **shape, "write_grad": True}


def make_kl(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    logits = _logits(dtype, device, seed, size)
    reference = (logits + 0.5 * _logits(dtype, device, seed + 1, size)).to(dtype)
    reference[:, ::101] = float("-inf")
    shape = {**_shape(seed), "ref_scale": 1.0, "ref_softcap": 0.0}  # a capped −inf is none
    return {"logits": logits, "ref_logits": reference, "losses": _losses(logits), **shape, "write_grad": True}


def cross_entropy_expression(
    logits: Tensor, labels: Tensor, losses: Tensor, *, scale: float, softcap: float, write_grad: bool
) -> None:
    assert write_grad
    with torch.enable_grad():
        x = logits.clone().requires_grad_()
        values = cross_entropy(shaped_logits(x.float(), scale, softcap), labels, reduction="none")
        (grad,) = torch.autograd.grad(values.sum(), x)
    logits.copy_(grad)
    losses.copy_(values.detach())


def kl_expression(
    logits: Tensor,
    ref_logits: Tensor,
    losses: Tensor,
    *,
    scale: float,
    softcap: float,
    ref_scale: float,
    ref_softcap: float,
    write_grad: bool,
) -> None:
    assert write_grad
    with torch.enable_grad():
        x = logits.clone().requires_grad_()
        reference = shaped_logits(ref_logits.float(), ref_scale, ref_softcap).log_softmax(dim=1)
        # kl_div with log_target makes NaN of a −inf log-probability; with probabilities it takes 0·log 0 as 0.
        values = kl_div(
            shaped_logits(x.float(), scale, softcap).log_softmax(dim=1), reference.exp(), reduction="none"
        ).sum(dim=1)
        (grad,) = torch.autograd.grad(values.sum(), x)
    logits.copy_(grad)
    losses.copy_(values.detach())


CASES = {
    "cross_entropy_chunk_": Case(
        make=make_cross_entropy,
        expression=cross_entropy_expression,
        outputs=("losses", "logits"),
        in_place=True,
        depth={"losses": 12, "logits": 12},
    ),
    "kl_chunk_": Case(
        make=make_kl,
        expression=kl_expression,
        outputs=("losses", "logits"),
        in_place=True,
        depth={"losses": 12, "logits": 12},
    ),
}
