"""Gates: the noise's bits, values and gradients against formulas written independently, invariants, bad input."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lcdd_kernels as k
from lcdd_kernels import GateSpec, cases, testing, use_backend
from lcdd_kernels.reference.gates import gate_noise_ref, philox_ref

BACKENDS = ("reference", "triton", "native")
KINDS = ("heaviside_ste", "hard_concrete")


# --- noise ------------------------------------------------------------------------------------------------------------


def philox_python(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in plain Python integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 % 2**32, (p0 >> 32) ^ c[3] ^ k1, p0 % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


# Random123's published known-answer vectors for philox4x32-10: counter, key, result.
RANDOM123 = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(w, 16) for w in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), RANDOM123)
def test_philox_known_answers(counter: str, key: str, result: str) -> None:
    assert philox_python(words(counter), words(key)) == words(result)
    tensors = tuple(torch.tensor([w]) for w in words(counter))
    assert [int(w) for w in philox_ref(tensors, tuple(words(key)))] == words(result)


@given(seed=st.integers(0, 2**63 - 1), step=st.integers(0, 2**40), offset=st.integers(0, 2**34))
def test_noise_is_philox(seed: int, step: int, offset: int) -> None:
    u = gate_noise_ref(5, GateSpec(kind="hard_concrete", seed=seed, step=step), offset=offset, dtype=torch.float64)
    for i, value in enumerate(u.tolist()):
        n = offset + i
        x = philox_python([n % 2**32, n >> 32, step % 2**32, step >> 32], [seed % 2**32, seed >> 32])[0]
        assert value == ((x >> 9) + 0.5) / 2**23


def test_noise_is_exact_in_float32_and_inside_the_unit_interval() -> None:
    spec = GateSpec(kind="hard_concrete", seed=1, step=2)
    u32 = gate_noise_ref(200_000, spec, dtype=torch.float32)
    u64 = gate_noise_ref(200_000, spec, dtype=torch.float64)
    assert torch.equal(u32.double(), u64)
    assert torch.equal((1 - u32).double(), 1 - u64)
    # The ends of the grid, which no sample of this size need hit.
    ends = (torch.tensor([0, 2**23 - 1]).float() + 0.5) * 2.0**-23
    assert ends[0] > 0
    assert ends[1] < 1
    assert abs(float(u64.mean()) - 0.5) < 4 / math.sqrt(12 * 200_000)


# --- values -----------------------------------------------------------------------------------------------------------


def gate_python(theta: float, u: float | None) -> float:
    """The hard concrete gate of method section 2, in Python floats; u is None at evaluation."""
    if u is None:
        s = 1 / (1 + math.exp(-theta))
    else:
        s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + theta) / (2 / 3)))
    return min(1.0, max(0.0, s * 1.2 - 0.1))


@pytest.mark.parametrize("training", [True, False])
def test_hard_concrete_is_the_formula(training: bool) -> None:
    logits = torch.linspace(-6, 6, 101, dtype=torch.float64)
    gate, l0 = k.gate_values(logits, GateSpec(kind="hard_concrete", seed=5, step=9, training=training))
    for i, theta in enumerate(logits.tolist()):
        x = philox_python([i, 0, 9, 0], [5, 0])[0]
        assert math.isclose(gate[i], gate_python(theta, ((x >> 9) + 0.5) / 2**23 if training else None), abs_tol=1e-14)
    expected = sum(1 / (1 + math.exp(-(t - 2 / 3 * math.log(0.1 / 1.1)))) for t in logits.tolist())
    assert math.isclose(l0, expected, rel_tol=1e-14)


@pytest.mark.parametrize("training", [True, False])
def test_heaviside_is_the_formula(training: bool) -> None:
    logits = torch.tensor([-1.0, -0.0, 0.0, 1e-30, 2.0])
    gate, l0 = k.gate_values(logits, GateSpec(kind="heaviside_ste", seed=0, step=0, training=training))
    assert gate.tolist() == [0, 0, 0, 1, 1]
    assert math.isclose(l0, torch.sigmoid(logits.double()).sum(), rel_tol=1e-6)


@pytest.mark.parametrize("theta", [-3.0, -1.0, 0.5])
def test_expected_l0_is_the_probability_of_an_open_gate(theta: float) -> None:
    n = 100_000
    gate, l0 = k.gate_values(torch.full((n,), theta), GateSpec(kind="hard_concrete", seed=3, step=1))
    p = float(l0) / n
    assert abs(float((gate > 0).double().mean()) - p) < 4 * math.sqrt(p * (1 - p) / n)


@given(cut=st.integers(0, 40), offset=st.integers(0, 2**33), seed=st.integers(0, 2**63 - 1), step=st.integers(0, 2**50))
def test_a_slice_draws_the_noise_of_the_whole(cut: int, offset: int, seed: int, step: int) -> None:
    logits = torch.linspace(-3, 3, 41)
    spec = GateSpec(kind="hard_concrete", seed=seed, step=step)
    whole, _ = k.gate_values(logits, spec, offset=offset)
    part, _ = k.gate_values(logits[cut:], spec, offset=offset + cut)
    assert torch.equal(whole[cut:], part)


def test_noise_depends_on_seed_and_step_only_in_training() -> None:
    logits = torch.zeros(1000)

    def draw(seed, step, training):
        return k.gate_values(logits, GateSpec(kind="hard_concrete", seed=seed, step=step, training=training))[0]

    assert torch.equal(draw(1, 1, True), draw(1, 1, True))
    assert not torch.equal(draw(1, 1, True), draw(2, 1, True))
    assert not torch.equal(draw(1, 1, True), draw(1, 2, True))
    assert not torch.equal(draw(1 << 40, 1, True), draw(1 << 41, 1, True))
    assert torch.equal(draw(1, 1, False), draw(2, 3, False))


# --- every backend against float64 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["gate_values", "gate_logits_grad", "open_indices"])
@pytest.mark.parametrize("size", [1, 8])
def test_backend_matches_reference(backend: str, op: str, size: int, device_of, poisoned) -> None:
    device = device_of(op, backend)
    testing.assert_calibrated(testing.compare(op, backend, device=device, size=size, seed=size))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@given(
    n=st.sampled_from([1, 2, 3, 31, 127, 1024, 1025]),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**62),
    offset=st.integers(0, 2**40),
)
def test_backends_agree(backend, kind, training, device_of, n, seed, step, offset) -> None:
    device = device_of("gate_values", backend)
    generator = torch.Generator().manual_seed(n)
    settings = {"spec": GateSpec(kind=kind, seed=seed, step=step, training=training), "offset": offset}
    values, grads = cases.case_of("gate_values"), cases.case_of("gate_logits_grad")
    inputs = {"logits": (3 * torch.randn(n, generator=generator)).to(device), **settings}
    backward = {**inputs, "d_gate": torch.randn(n, generator=generator).to(device), "l0_weight": -0.7}
    with testing.poisoned_memory(), use_backend(backend):
        got = testing.run(values, k.gate_values, inputs)
        got_grad = testing.run(grads, k.gate_logits_grad, backward)
    # One gate's error against PyTorch's is luck (a calibrated comparison needs many, as above), so the bound here is
    # absolute: the argument of the sigmoid, up to 20 in size, is rounded a few times, and 1.8 = 1.2 * 1.5 is what the
    # chain makes of it.
    truth = testing.run(values, k.gate_values, testing.upcast(inputs))
    torch.testing.assert_close(got["gate"].double(), truth["gate"], rtol=0, atol=2e-6)
    torch.testing.assert_close(got["expected_l0"].double(), truth["expected_l0"], rtol=2e-6, atol=0)
    truth = testing.run(grads, k.gate_logits_grad, testing.upcast(backward))
    torch.testing.assert_close(got_grad["d_logits"].double(), truth["d_logits"], rtol=0, atol=1e-5)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_hard_concrete(training: bool) -> None:
    logits = torch.linspace(-4, 4, 23, dtype=torch.float64, requires_grad=True)

    def f(theta):
        return k.gate_values(theta, GateSpec(kind="hard_concrete", seed=2, step=4, training=training))

    gate, _ = f(logits)
    assert ((gate > 0) & (gate < 1)).sum() > 3  # some gates have a gradient, and some are clamped
    assert ((gate == 0) | (gate == 1)).any()
    assert torch.autograd.gradcheck(f, logits)


def test_heaviside_is_straight_through() -> None:
    logits = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.arange(9, dtype=torch.float64)
    gate, l0 = k.gate_values(logits, GateSpec(kind="heaviside_ste", seed=0, step=0, training=True))
    (d,) = torch.autograd.grad((gate * weight).sum() + 0.3 * l0, logits)
    s = torch.sigmoid(logits)
    torch.testing.assert_close(d, (weight + 0.3) * s * (1 - s), rtol=1e-14, atol=0)


@pytest.mark.parametrize("use", ["gate", "l0", "both"])
def test_backward_of_either_output(use: str) -> None:
    logits = torch.linspace(-2, 2, 11, dtype=torch.float64, requires_grad=True)
    spec = GateSpec(kind="hard_concrete", seed=1, step=1)
    gate, l0 = k.gate_values(logits, spec)
    loss = (gate.sum() if use != "l0" else 0.0) + (2.5 * l0 if use != "gate" else 0.0)
    (d,) = torch.autograd.grad(loss, logits)
    ones = torch.ones_like(logits) if use != "l0" else torch.zeros_like(logits)
    expected = k.gate_logits_grad(logits.detach(), ones, spec, l0_weight=0.0 if use == "gate" else 2.5)
    torch.testing.assert_close(d, expected, rtol=1e-14, atol=0)


def test_a_clamped_gate_has_exactly_zero_gradient() -> None:
    logits = torch.linspace(-6, 6, 101)
    spec = GateSpec(kind="hard_concrete", seed=2, step=4)
    gate, _ = k.gate_values(logits, spec)
    d = k.gate_logits_grad(logits, torch.ones(101), spec)
    clamped = (gate == 0) | (gate == 1)
    assert bool((d[clamped] == 0).all())
    assert bool((d[~clamped] > 0).all())


# --- open lists -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 2, 17, 128, 300]), min_size=1, max_size=6),
    density=st.sampled_from([0, 0.2, 1]),
)
def test_open_indices(backend, device_of, sizes, density) -> None:
    device = device_of("open_indices", backend)
    n = sum(sizes)
    gate = (torch.rand(n, generator=torch.Generator().manual_seed(n)) < density).float() * 0.5
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    with testing.poisoned_memory(), use_backend(backend):
        indices, counts, rank = k.open_indices(gate.to(device), offsets)
    assert (indices.dtype, counts.dtype, rank.dtype) == (torch.int32,) * 3
    for g, (start, size) in enumerate(zip(offsets.tolist(), sizes, strict=False)):
        local = [i for i in range(size) if gate[start + i] != 0]
        assert int(counts[g]) == len(local)
        assert indices[start : start + size].tolist() == local + [-1] * (size - len(local))
        assert rank[start : start + size].tolist() == [local.index(i) if i in local else -1 for i in range(size)]


# --- ops and bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    logits = torch.randn(7, requires_grad=True)
    torch.library.opcheck(torch.ops.lcdd.gate_values, (logits, kind, 1, 2, True, 0))
    torch.library.opcheck(torch.ops.lcdd.gate_logits_grad, (logits.detach(), torch.randn(7), kind, 1, 2, True, 0.5, 0))
    torch.library.opcheck(torch.ops.lcdd.open_indices, (torch.tensor([0.0, 1.0, 0.5]), torch.tensor([0, 1, 3])))


GOOD = GateSpec(kind="hard_concrete")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 2)}, r"logits: expected shape \[any\], got shape \[2, 2\]"),
        (
            {"logits": torch.zeros(2, dtype=torch.bfloat16)},
            "logits: expected dtype float32 or float64, got torch.bfloat16",
        ),
        ({"logits": torch.zeros(4)[::2]}, "logits: expected a contiguous tensor"),
        ({"logits": torch.tensor([1.0, float("nan")])}, "logits: expected no NaN, got 1 NaN of 2"),
        ({"logits": [0.0]}, "logits: expected a tensor, got list"),
        ({"spec": replace(GOOD, kind="soft")}, "kind: expected one of 'heaviside_ste', 'hard_concrete', got 'soft'"),
        ({"spec": replace(GOOD, seed=-1)}, "seed: expected an int in"),
        ({"spec": replace(GOOD, seed=2**63)}, "seed: expected an int in"),
        ({"spec": replace(GOOD, step=1.5)}, "step: expected an int, got float"),
        ({"spec": {"kind": "soft"}}, "spec: expected a GateSpec, got dict"),
        ({"offset": -3}, "offset: expected an int in"),
    ],
)
def test_bad_gate_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        k.gate_values(**{"logits": torch.zeros(3), "spec": GOOD, **change})


@pytest.mark.parametrize(
    ("d_gate", "l0_weight", "message"),
    [
        (torch.zeros(4), 0.0, r"d_gate: expected shape \[3\], got shape \[4\]"),
        (torch.zeros(3, dtype=torch.float64), 0.0, "d_gate: expected dtype float32"),
        (torch.zeros(3), float("nan"), "l0_weight: expected a number"),
    ],
)
def test_bad_gradient_arguments(d_gate, l0_weight, message) -> None:
    with pytest.raises(ValueError, match=message):
        k.gate_logits_grad(torch.zeros(3), d_gate, GOOD, l0_weight=l0_weight)


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 3, 2, 3], []])
def test_bad_offsets(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="offsets: expected ascending int64 from 0 to 3"):
        k.open_indices(torch.ones(3), torch.tensor(offsets, dtype=torch.int64))
    with pytest.raises(ValueError, match="offsets: expected dtype int64"):
        k.open_indices(torch.ones(3), torch.tensor([0, 3], dtype=torch.int32))
