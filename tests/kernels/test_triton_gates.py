"""Triton kernels of the gates beyond what every backend is tested for: Philox bit for bit, blocks, groups, sums."""

import pytest
import torch

from lcdd_kernels.reference import gates as reference
from lcdd_kernels.testing import bits_equal, poisoned_memory

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from lcdd_kernels.triton_kernels import LaunchConfig, gates, launch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = gates.CONFIG.block


@triton.jit(do_not_specialize=["seed", "step", "offset", "count"])
def uniform_kernel(out_ptr, seed: tl.int64, step: tl.int64, offset: tl.int64, count: tl.int32, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    u = gates.philox_uniform(offset + index.to(tl.int64), tl.cast(seed, tl.int64), tl.cast(step, tl.int64))
    tl.store(out_ptr + index, u, mask=index < count)


def uniform(count: int, *, seed: int, step: int, offset: int) -> torch.Tensor:
    out = torch.full((count,), float("nan"), device=DEVICE)
    arguments = {"seed": gates.signed64(seed), "step": gates.signed64(step), "offset": gates.signed64(offset)}
    block = triton.next_power_of_2(count)
    launch(uniform_kernel, (1,), LaunchConfig(), out_ptr=out, count=count, BLOCK=block, **arguments)
    return out.cpu()


@pytest.mark.parametrize(
    ("counter", "key", "first_word"),
    [
        # Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
        ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], first_word: int) -> None:
    u = uniform(1, seed=key[0] | key[1] << 32, step=counter[2] | counter[3] << 32, offset=counter[0] | counter[1] << 32)
    assert u.item() == ((first_word >> 9) + 0.5) * 2.0**-23


@pytest.mark.parametrize(
    ("seed", "step", "offset"),
    [(0, 1, 0), (7, 3, 2**32 - 10), (2**62 + 12345, 2**33 + 5, 2**40 + 1), (2**63 - 1, 1, 9)],
)
def test_noise_is_the_references_bit_for_bit(seed: int, step: int, offset: int) -> None:
    where = {"seed": seed, "step": step, "offset": offset}
    spec = reference.GateSpec(kind="hard_concrete", seed=seed, step=step)
    expected = reference.gate_noise_ref(257, spec, offset=offset)
    assert bits_equal(uniform(257, **where), expected)
    assert expected.min() > 0
    assert expected.max() < 1


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 1])
def test_values_and_gradient_over_blocks(kind: str, training: bool, n: int) -> None:
    """Block edges, against float64; a clamped gate has exactly no gradient."""
    generator = torch.Generator().manual_seed(n)
    logits = 3 * torch.randn(n, generator=generator)
    d_gate = torch.randn(n, generator=generator)
    settings = {"spec": reference.GateSpec(kind=kind, seed=2**40 + 3, step=5, training=training), "offset": 11}
    with poisoned_memory():
        gate, l0 = gates.gate_values_triton(logits.to(DEVICE), **settings)
        slope = gates.gate_logits_grad_triton(logits.to(DEVICE), d_gate.to(DEVICE), l0_weight=0.0, **settings)
        whole = gates.gate_logits_grad_triton(logits.to(DEVICE), d_gate.to(DEVICE), l0_weight=0.25, **settings)
    exact_gate, exact_l0 = reference.gate_values_ref(logits.double(), **settings)
    exact = reference.gate_logits_grad_ref(logits.double(), d_gate.double(), l0_weight=0.25, **settings)
    # z and its slope are a few float32 operations on numbers of size 1, behind a logarithm of size 16 over beta.
    torch.testing.assert_close(gate.cpu().double(), exact_gate, rtol=0, atol=4e-6)
    torch.testing.assert_close(whole.cpu().double(), exact, rtol=0, atol=2e-5)
    torch.testing.assert_close(l0.cpu().double(), exact_l0, rtol=1e-6, atol=0)
    if kind == "hard_concrete":
        clamped = (gate == 0) | (gate == 1)
        assert torch.all(slope[clamped] == 0)
        assert torch.any(slope != 0) or n == 1


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_open_indices_over_groups_and_blocks(density: float) -> None:
    """Empty groups, single gates, groups over several blocks; every entry of every output is written."""
    sizes = [0, 1, BLOCK, 0, 2 * BLOCK + 3, 7, 0]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    generator = torch.Generator().manual_seed(3)
    gate = torch.rand(sum(sizes), generator=generator) * (torch.rand(sum(sizes), generator=generator) < density)
    with poisoned_memory():
        found = gates.open_indices_triton(gate.to(DEVICE), offsets)
    for name, got, expected in zip(
        ("indices", "counts", "rank"), found, reference.open_indices_ref(gate, offsets), strict=True
    ):
        assert bits_equal(got, expected), name


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 20000])
def test_sum_in_stages(count: int) -> None:
    """The tree of partial sums is exact on integers, and gives the same bits again."""
    values = torch.randint(-50, 50, (count,), generator=torch.Generator().manual_seed(count)).float()
    with poisoned_memory():
        assert gates.sum_partials(values.to(DEVICE)).item() == values.double().sum().item()
    noisy = (values * 0.1).to(DEVICE)
    assert bits_equal(gates.sum_partials(noisy), gates.sum_partials(noisy.clone()))


def test_an_undefined_logit_is_seen_in_a_hard_gate() -> None:
    logits = torch.tensor([0.0, float("nan"), 1.0], device=DEVICE)
    gate, l0 = gates.gate_values_triton(logits, reference.GateSpec(kind="hard_concrete", seed=1, step=1))
    assert torch.isnan(gate).tolist() == [False, True, False]
    assert torch.isnan(l0)
