"""channel_match against the paper's formula written with autograd, through every backend, for every padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lcdd_kernels as K
from lcdd_kernels import testing, use_backend

BACKENDS = ("reference", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _device(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def _problem(counts, n_prompts, n_positions, n_features, *, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(n_prompts, n_positions, n_features, generator=g).to(dtype) for _ in counts]
    channels = torch.cat([torch.randperm(n_features, generator=g)[:n] for n in counts]).int()
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    target = torch.randn(channels.numel(), generator=g)
    last = torch.randint(n_positions, (n_prompts,), generator=g)
    return hidden, channels, offsets, target, last


def _paper(hidden, channels, offsets, target, last):
    """Method, section 4, as written there: MSE over a layer's channels, mean over layers."""
    losses = []
    for layer, h in enumerate(hidden):
        part = slice(int(offsets[layer]), int(offsets[layer + 1]))
        if part.start < part.stop:
            rows = torch.stack([h[b, last[b]] for b in range(h.shape[0])])
            losses.append(torch.nn.functional.mse_loss(rows.mean(0)[channels[part].long()], target[part].to(h.dtype)))
    return torch.stack(losses).mean() if losses else sum(h.sum() * 0 for h in hidden)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["channel_match", "channel_match_backward"])
def test_backend_is_as_close_to_float64_as_pytorch(op, backend, dtype, poisoned):
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter truncates bfloat16 stores")
    testing.assert_calibrated(testing.compare(op, backend, dtype, device=_device(backend)))


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    n_prompts=st.integers(1, 19),
    n_positions=st.integers(1, 6),
    n_features=st.integers(9, 31),
)
def test_float64_loss_and_gradient_are_the_papers(counts, n_prompts, n_positions, n_features):
    hidden, channels, offsets, target, last = _problem(counts, n_prompts, n_positions, n_features)
    ours = [h.clone().requires_grad_() for h in hidden]
    theirs = [h.clone().requires_grad_() for h in hidden]
    loss = K.channel_match(ours, channels, offsets, target, last_index=last)
    expected = _paper(theirs, channels, offsets, target, last)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    (3 * loss).backward()
    (3 * expected).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            a.grad, b.grad if b.grad is not None else torch.zeros_like(b), rtol=1e-12, atol=1e-14
        )


@given(
    counts=st.lists(st.sampled_from([0, 1, 5, 130]), min_size=1, max_size=4),
    n_prompts=st.integers(1, 19),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_triton_follows_the_reference(counts, n_prompts, dtype):
    device = _device("triton")
    hidden, channels, offsets, target, last = _problem(counts, n_prompts, 3, 131, dtype=dtype)
    results = {}
    for backend in BACKENDS:
        inputs = [h.to(device).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for h in hidden]
        with use_backend(backend), testing.poisoned_memory():
            loss = K.channel_match(inputs, channels.to(device), offsets, target.to(device), last_index=last.to(device))
            loss.backward()
        results[backend] = [loss.detach(), *(h.grad for h in inputs)]
    for a, b in zip(*results.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_side_and_pad_content_do_not_matter(side):
    hidden, channels, offsets, target, _ = _problem([4, 7], 3, 5, 11)
    lengths = [5, 2, 1]
    mask = torch.zeros(3, 5, dtype=torch.int64)
    rows = []
    for b, n in enumerate(lengths):
        mask[b, slice(0, n) if side == "right" else slice(5 - n, 5)] = 1
        rows.append(n - 1 if side == "right" else 4)
    assert K.last_token_index(mask).tolist() == rows
    assert K.last_token_index(mask.bool()).tolist() == rows
    loss = K.channel_match(hidden, channels, offsets, target, attention_mask=mask)
    poisoned = [torch.where(mask[..., None] == 1, h, float("nan")) for h in hidden]
    assert torch.equal(loss, K.channel_match(poisoned, channels, offsets, target, attention_mask=mask))
    torch.testing.assert_close(loss, _paper(hidden, channels, offsets, target, torch.tensor(rows)))


def test_rows_gathered_by_the_caller_give_the_same_bits():
    hidden, channels, offsets, target, last = _problem([4, 0, 7], 3, 5, 11, dtype=torch.float32)
    rows = [h[torch.arange(3), last].requires_grad_() for h in hidden]
    whole = [h.requires_grad_() for h in hidden]
    a = K.channel_match(rows, channels, offsets, target)
    b = K.channel_match(whole, channels, offsets, target, last_index=last)
    assert torch.equal(a, b)
    (a + b).backward()
    for r, w in zip(rows, whole, strict=True):
        assert torch.equal(r.grad, w.grad[torch.arange(3), last])
        w.grad[torch.arange(3), last] = 0
        assert not w.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_starts_in_one_call_are_calls_of_their_own(backend):
    """Same bits, and one launch a direction for all of them."""
    hidden, channels, offsets, target, last = _problem([4, 0, 7], 6, 5, 11, dtype=torch.float32)
    device = _device(backend)
    hidden = [h.to(device).requires_grad_() for h in hidden]
    rest = channels.to(device), offsets, target.to(device)
    with use_backend(backend):
        together = K.channel_match(hidden, *rest, last_index=last.to(device), starts=3)
        apart = [
            K.channel_match([h[a : a + 2] for h in hidden], *rest, last_index=last[a : a + 2].to(device))
            for a in (0, 2, 4)
        ]
        assert torch.equal(together, torch.stack(apart))
        weights = torch.tensor([1.0, -2.0, 0.5], device=device)
        found = torch.autograd.grad((weights * together).sum(), hidden)
        expected = torch.autograd.grad((weights * torch.stack(apart)).sum(), hidden)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match=r"starts: expected a divisor of 6 \(rows of hidden\), got 4"):
        K.channel_match(hidden, *rest, last_index=last.to(device), starts=4)


def test_permuting_prompts_and_channels_changes_nothing_and_matching_means_give_zero():
    hidden, channels, offsets, target, last = _problem([6, 3], 4, 5, 11)
    loss = K.channel_match(hidden, channels, offsets, target, last_index=last)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = K.channel_match([h[order] for h in hidden], channels, offsets, target, last_index=last[order])
    torch.testing.assert_close(loss, shuffled, rtol=1e-13, atol=0)
    within = torch.tensor([5, 0, 3, 1, 2, 4, 8, 7, 6])  # both layers' lists, reordered within the layer
    torch.testing.assert_close(
        loss, K.channel_match(hidden, channels[within], offsets, target[within], last_index=last), rtol=1e-13, atol=0
    )
    means = torch.cat(
        [h[torch.arange(4), last].mean(0)[channels[a:b].long()] for h, a, b in zip(hidden, (0, 6), (6, 9), strict=True)]
    )
    assert K.channel_match(hidden, channels, offsets, means, last_index=last) == 0


def test_no_channels_at_all_is_zero_with_zero_gradient():
    hidden, channels, offsets, target, last = _problem([0, 0], 2, 3, 5)
    hidden = [h.requires_grad_() for h in hidden]
    loss = K.channel_match(hidden, channels, offsets, target, last_index=last)
    loss.backward()
    assert loss == 0
    assert not any(h.grad.any() for h in hidden)


def test_gradcheck_and_opcheck():
    hidden, channels, offsets, target, last = _problem([3, 0, 2], 2, 3, 5)
    hidden = [h.requires_grad_() for h in hidden]
    assert torch.autograd.gradcheck(lambda *h: K.channel_match(h, channels, offsets, target, last_index=last), hidden)
    torch.library.opcheck(torch.ops.lcdd.channel_match.default, (hidden, last, channels, offsets, target, 2))
    _, residual = torch.ops.lcdd.channel_match(hidden, last, channels, offsets, target, 1)
    torch.library.opcheck(
        torch.ops.lcdd.channel_match_backward.default,
        (torch.ones(1), residual, last, channels, offsets, 3, 5, torch.float64),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": []}, "hidden: expected a non-empty sequence"),
        ({"hidden": [torch.zeros(2, 3, 5), torch.zeros(2, 3, 4)]}, r"hidden\[1\]: expected shape \[2, 3, 5\], got"),
        ({"hidden": [torch.zeros(2, 3, 5), torch.zeros(2, 3, 5).half()]}, r"hidden\[1\]: expected dtype float32"),
        ({"channels": torch.tensor([0, 5, 1], dtype=torch.int32)}, r"indices in \[0, 5\), got indices in \[0, 5\]"),
        ({"channels": torch.tensor([1, 1, 1], dtype=torch.int32)}, "channels: expected distinct channels"),
        ({"channels": torch.tensor([1, 2, 1])}, "channels: expected dtype int32"),
        ({"offsets": torch.tensor([0, 2, 4])}, r"offsets: expected ascending from 0 to 3 .*got \[0, 2, 4\]"),
        ({"offsets": torch.tensor([0, 3])}, r"offsets: expected shape \[3\]"),
        ({"target_mean": torch.zeros(2)}, r"target_mean: expected shape \[3\], got shape \[2\]"),
        ({"target_mean": torch.zeros(3, requires_grad=True)}, "target_mean: expected a constant"),
        ({"last_index": torch.tensor([0, 3])}, r"last_index: expected positions in \[0, 3\), got .* \[0, 3\]"),
        ({"last_index": None}, "attention_mask: expected it or last_index, one of the two, got neither"),
        ({"last_index": None, "attention_mask": torch.tensor([[1, 1, 0], [0, 0, 0]])}, "at least one token"),
        ({"attention_mask": torch.ones(2, 3)}, "got both"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, message):
    arguments = {
        "hidden": [torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)],
        "channels": torch.tensor([0, 4, 0], dtype=torch.int32),
        "offsets": torch.tensor([0, 2, 3]),
        "target_mean": torch.zeros(3),
        "last_index": torch.tensor([0, 2]),
    }
    with pytest.raises(ValueError, match=message):
        K.channel_match(**(arguments | change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernel through the interpreter")
@pytest.mark.parametrize(("channel", "last"), [(5, 0), (-1, 0), (0, 3)])
def test_the_kernel_answers_an_index_out_of_range_with_nan(channel, last):
    from lcdd_kernels.triton_kernels.channel_match import channel_match_triton

    loss, _ = channel_match_triton(
        [torch.zeros(2, 3, 5)],
        torch.tensor([0, last]),
        torch.tensor([0, channel], dtype=torch.int32),
        torch.tensor([0, 2]),
        torch.zeros(2),
    )
    assert loss.isnan()
