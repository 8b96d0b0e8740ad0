"""Which matrices get a packed weight gradient: its predicted cost over that of the dense one, against a crossover.

Work is counted in multiply-adds a token, O out_features, K in_features, R open rows, C open columns:

    dense     O·K
    "block"   R·C           + gather · (R + C)      hard-concrete
    "panels"  R·K + O·C     + gather · (R + C)      Heaviside

`gather` is what moving one element of X or dY into a panel costs, in multiply-adds of the dense product. A matrix is
packed where the predicted ratio is below `crossover`, which is under 1 because smaller products run a little less
efficiently. Both depend on the device, the dtype and the libraries; `measure_crossover` measures them,
`DEFAULT_CROSSOVER` is the one place for the figures that are used without it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from lcdd_kernels.checks import check_choice, check_int, check_real
from lcdd_kernels.reference.packed_grad import pack_columns_ref

__all__ = [
    "DEFAULT_CROSSOVER",
    "PACKED_LAYOUT",
    "PackCrossover",
    "default_crossover",
    "measure_crossover",
    "pack_cost",
    "pack_layout",
]

PACKED_LAYOUT = {"hard_concrete": "block", "heaviside_ste": "panels"}


@dataclass(frozen=True, kw_only=True)
class PackCrossover:
    """gather: multiply-adds one gathered element costs. crossover: pack where the predicted cost ratio is below it.

    min_elements: smaller matrices stay dense whatever is open: there the fixed cost of more calls outweighs the
        product.
    source: where the figures come from, a measurement (on what) or a prediction.
    """

    gather: float
    crossover: float
    min_elements: int
    source: str


# Predicted for CUDA: a gathered bf16 element moves about 6 elements of memory traffic at 20% density, i.e. 3e-12 s at 4
# TB/s, against 3e14 multiply-adds a second. To be replaced by `measure_crossover("cuda", ...)` on the GPU in question.
DEFAULT_CROSSOVER: dict[tuple[str, torch.dtype], PackCrossover] = {
    ("cpu", torch.float32): PackCrossover(
        gather=16.0, crossover=0.77, min_elements=2**16, source="measured: AMD EPYC (AVX-512), 1 thread"
    ),
    ("cpu", torch.bfloat16): PackCrossover(
        gather=60.0, crossover=0.87, min_elements=2**18, source="measured: AMD EPYC (AVX-512), 1 thread"
    ),
    ("cuda", torch.float32): PackCrossover(
        gather=150.0, crossover=0.8, min_elements=2**20, source="predicted for an H200, not measured"
    ),
    ("cuda", torch.bfloat16): PackCrossover(
        gather=900.0, crossover=0.8, min_elements=2**22, source="predicted for an H200, not measured"
    ),
}


def default_crossover(device: torch.device | str, dtype: torch.dtype) -> PackCrossover:
    """The figures for a device type and dtype: those of float32 for wider dtypes, of bfloat16 for 16-bit ones."""
    kind = torch.device(device).type
    table_dtype = torch.bfloat16 if dtype.itemsize == 2 else torch.float32
    return DEFAULT_CROSSOVER[("cpu" if kind == "cpu" else "cuda", table_dtype)]


def pack_cost(layout: str, *, out_features: int, in_features: int, n_rows: int, n_cols: int, gather: float) -> float:
    """Predicted cost of a packed weight gradient over the dense one; 0 where nothing is open."""
    products = n_rows * n_cols if layout == "block" else n_rows * in_features + out_features * n_cols
    if products == 0:
        return 0.0
    return (products + gather * (n_rows + n_cols)) / (out_features * in_features)


def pack_layout(
    *, gate_kind: str, out_features: int, in_features: int, n_rows: int, n_cols: int, crossover: PackCrossover
) -> str:
    """ "dense", or the gate kind's packed layout ("block" for hard_concrete, "panels" for heaviside_ste) where that is
    cheaper.

    n_rows, n_cols: open rows and columns of the matrix (GQA columns counted once for each query head). Nothing open:
    packed (and empty), unless the matrix is small.
    """
    check_choice("gate_kind", gate_kind, tuple(PACKED_LAYOUT))
    check_int("n_rows", n_rows, 0, out_features + 1)
    check_int("n_cols", n_cols, 0, in_features + 1)
    if out_features * in_features < crossover.min_elements:
        return "dense"
    layout = PACKED_LAYOUT[gate_kind]
    cost = pack_cost(
        layout,
        out_features=out_features,
        in_features=in_features,
        n_rows=n_rows,
        n_cols=n_cols,
        gather=crossover.gather,
    )
    return layout if cost < crossover.crossover else "dense"


def measure_crossover(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    tokens: int = 1024,
    out_features: int = 3072,
    in_features: int = 1024,
    repeats: int = 7,
) -> PackCrossover:
    """Measures `gather` and `crossover` here and now (about a second; on a quiet machine, or the figures are of the
    noise).

    The crossover is the smallest 0.95 · predicted/measured ratio over densities 0.2 to 0.8, so packing is chosen only
    where it was measured to pay, and at most 0.95. `min_elements` is about Python and launches: the device's default is
    kept.
    """
    check_int("tokens", tokens, 1)
    check_real("repeats", repeats, 1, 1e6)
    device = torch.device(device)
    x = torch.randn(tokens, in_features, device=device).to(dtype)
    dy = torch.randn(tokens, out_features, device=device).to(dtype)
    multiple = packed_multiple(device)
    dense = _seconds(partial(torch.mm, dy.t(), x), device, repeats)
    mac_seconds = dense / (out_features * in_features)
    gathers, ratios = [], []
    for density in (0.2, 0.4, 0.6, 0.8):
        rows = torch.nonzero(torch.rand(out_features, device=device) < density).view(-1)
        cols = torch.nonzero(torch.rand(in_features, device=device) < density).view(-1)
        x_open, dy_open = pack_columns_ref(x, cols, multiple), pack_columns_ref(dy, rows, multiple)
        packing = _seconds(partial(pack_columns_ref, x, cols, multiple), device, repeats)
        packing += _seconds(partial(pack_columns_ref, dy, rows, multiple), device, repeats)
        product = _seconds(partial(torch.mm, dy_open.t(), x_open), device, repeats)
        gathers.append(packing / mac_seconds / max(rows.numel() + cols.numel(), 1))
        predicted = rows.numel() * cols.numel() / (out_features * in_features)
        ratios.append((predicted * dense + packing) / (product + packing))
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )
    return PackCrossover(
        gather=max(gathers),
        crossover=min(0.95, 0.95 * min(ratios)),
        min_elements=default_crossover(device, dtype).min_elements,
        source=f"measured: {name}, {dtype}, {tokens} tokens",
    )


def packed_multiple(device: torch.device) -> int:
    """Panels' row length is a multiple of this: 8 elements (16 bytes in bf16) is what tensor-core GEMMs need to run at
    speed."""
    return 8 if device.type == "cuda" else 1


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Best of `repeats`, after a warm-up."""
    best = float("inf")
    for attempt in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        if attempt:
            best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
