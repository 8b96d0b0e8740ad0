"""The tables and the picture of docs/several-gpus.md, from records and from `lcdd plan`'s formulas.

python -m benchmarks.several_gpus      rewrites the page and the picture; no number is typed by hand
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from html import escape
from itertools import product
from typing import Any

from benchmarks.markdown import rewritten, table
from benchmarks.records import RESULTS, ROOT, read_json
from lcdd.commands.plan.architectures import read_architecture
from lcdd.commands.plan.cluster import CLOSED, LINKS, traffic_of
from lcdd.commands.plan.devices import find_device
from lcdd.commands.plan.predict import Case, memory_of, seconds_of
from lcdd.config import PlanConfig

PAGE = ROOT / "docs" / "several-gpus.md"
PICTURE = ROOT / "docs" / "images" / "scaling.svg"

MODELS = (("llama-3-8b", "ddp"), ("llama-3-8b", "fsdp2"), ("qwen3-30b-a3b", "fsdp2"), ("llama-3-70b", "fsdp2"))
GPUS = (1, 8, 64)
SETTINGS: dict[str, Any] = {
    "device": "h200", "max_length": 4096, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4,
    "gradient_checkpointing": True,
}  # fmt: skip


def elastic() -> list[str]:
    """What `benchmarks.elastic` found."""
    head = ["engine, controller", "steps", "closed", "gates that differ", "Δ", "λ", "loss", "state keeps its bits"]
    rows = [
        [
            name, str(row["steps"]), f"{row['closed']:.0%}", str(row["gates_differ"]),
            *(f"{row[key]:.1g}" for key in ("delta", "lambda", "loss")), "yes" if row["state_keeps_its_bits"] else "no",
        ]
        for name, row in read_json(RESULTS / "cpu" / "elastic.json").items() if name != "ranks"
    ]  # fmt: skip
    return table(head, rows)


# ---------------------------------------------------------------- calculations


def case_of(model: str, engine: str, gpus: int, **changes: Any) -> Case:
    """A plan's case of a model on so many GPUs."""
    if gpus == 1:
        changes["link"] = None  # it has nobody to talk to
    config = PlanConfig(model_name_or_path=model, parallel=engine, num_gpus=gpus, **SETTINGS | changes)
    return Case.of(read_architecture(model), config, find_device(config.device))


def _named(model: str, engine: str, gpus: int) -> str:
    return f"{model}, {gpus}" + (f", {engine}" if gpus > 1 else "")


def _cases() -> list[tuple[str, str, int]]:
    """One GPU has no engine, and is there once."""
    found = [(model, engine, gpus) for (model, engine), gpus in product(MODELS, GPUS)]
    return [case for place, case in enumerate(found) if case[2] > 1 or case[0] not in {c[0] for c in found[:place]}]


def wire() -> list[str]:
    """Memory of a rank, and gigabytes that it sends in a step."""
    head = ["model, GPUs, engine", "GB a rank", "fits", "sent: dense", *(f"{share:.0%} closed" for share in CLOSED)]
    rows = []
    for model, engine, gpus in _cases():
        case = case_of(model, engine, gpus)
        peak = memory_of(case, "lcdd").peak
        kinds = [(case.config, False)] + [(replace(case.config, density=1 - share), True) for share in CLOSED]
        sent = [traffic_of(case.model, config, packed=packed).sent / 1e9 for config, packed in kinds]
        cells = ["–" if gpus == 1 else f"{size:.3g}" if size < 100 else f"{size:,.0f}" for size in sent]
        fits = "yes" if peak <= case.device.usable else "no"
        rows.append([_named(model, engine, gpus), f"{peak / 1e9:.0f}", fits, *cells])
    return table(head, rows)


def _step(model: str, engine: str, gpus: int, **changes: Any) -> tuple[float, float]:
    """(seconds of a step, seconds of them in which a rank waits for others)."""
    parts = seconds_of(case_of(model, engine, gpus, **changes), "lcdd")
    return sum(parts.values()), parts.get("communication not hidden", 0.0)


def steps() -> list[str]:
    """Seconds of a step by link, dense and packed at 80% closed."""
    rows = []
    for model, engine, gpus in _cases():
        cells = []
        for link in LINKS if gpus > 1 else [None]:
            ends = [_step(model, engine, gpus, link=link, pack=pack)[0] for pack in ("never", "auto")]
            cells.append(" → ".join(f"{seconds:.2f}" for seconds in ends))
        rows.append([_named(model, engine, gpus), *(cells * (len(LINKS) if gpus == 1 else 1))])
    return table(["model, GPUs, engine", *(link.name for link in LINKS.values())], rows)


SECTIONS: dict[str, Callable[[], list[str]]] = {"elastic": elastic, "wire": wire, "steps": steps}


# ---------------------------------------------------------------- the picture

NUMBERS = (1, 2, 4, 8, 16, 32, 64)
DRAWN = (("llama-3-8b", "ddp"), ("qwen3-30b-a3b", "fsdp2"), ("llama-3-70b", "fsdp2"))
COLOURS = {"nvlink": "#059669", "400gbe": "#2563eb", "100gbe": "#d97706"}
PANEL, GAP, HEIGHT, LEFT, TOP = 200, 26, 200, 44, 62


def scaling_svg() -> str:
    """Share of a step that is work, over the number of GPUs; a panel for each model."""
    title = "Share of a step that is not spent waiting for other GPUs: a calculation, no measurement"
    width, base = LEFT + len(DRAWN) * (PANEL + GAP), TOP + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {base + 76}" font-size="12" role="img" '
        f'font-family="system-ui, sans-serif" aria-label="{escape(title, quote=True)}">',
        f'<rect width="{width}" height="{base + 76}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="14" fill="#111827">{escape(title)}</text>',
    ]
    for place, (model, engine) in enumerate(DRAWN):
        parts += _panel(LEFT + place * (PANEL + GAP), model, engine, numbered=place == 0)
    for place, (link, colour) in enumerate(COLOURS.items()):
        x = LEFT + 150 * place
        parts.append(f'<line x1="{x}" x2="{x + 20}" y1="{base + 46}" y2="{base + 46}" stroke="{colour}"/>')
        parts.append(f'<text x="{x + 26}" y="{base + 50}" fill="#111827">{LINKS[link].name}</text>')
    words = "solid: packed gradients, 80% of the gates closed; dashed: dense gradients; horizontal: GPUs"
    parts.append(f'<text x="{LEFT}" y="{base + 68}" fill="#4b5563">{words}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: int, model: str, engine: str, *, numbered: bool) -> list[str]:
    stride = PANEL / (len(NUMBERS) - 1)
    parts = [f'<text x="{left}" y="{TOP - 12}" fill="#111827">{model}, {engine}</text>']
    for tenth in range(0, 11, 2):
        y = TOP + HEIGHT * (1 - tenth / 10)
        parts.append(f'<line x1="{left}" x2="{left + PANEL}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        if numbered:
            parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#4b5563">{tenth * 10}%</text>')
    for place, gpus in enumerate(NUMBERS):
        x = left + place * stride
        parts.append(f'<text x="{x:.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle" fill="#4b5563">{gpus}</text>')
    for (link, colour), pack in product(COLOURS.items(), ("never", "auto")):
        shares = []
        for gpus in NUMBERS:
            step, waiting = _step(model, engine, gpus, link=link, pack=pack)
            shares.append(1 - waiting / step)
        points = " ".join(f"{left + n * stride:.1f},{TOP + HEIGHT * (1 - share):.1f}" for n, share in enumerate(shares))
        dashes = ' stroke-dasharray="5 4"' if pack == "never" else ""
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
    return parts


def blocks() -> dict[str, str]:
    """The page's tables, made anew."""
    return {name: "\n".join(["", *lines(), ""]) for name, lines in SECTIONS.items()}


def main() -> int:
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), blocks()), encoding="utf-8")
    PICTURE.write_text(scaling_svg(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
