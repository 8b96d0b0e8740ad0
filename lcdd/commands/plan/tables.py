"""The tables that `lcdd plan` prints, from the plain values of a plan."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

GIB = 2.0**30
SMALL = 0.1  # GiB; a plan whose largest peak is below this many is printed in MiB


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Aligned lines: the first column to the left, the others to the right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return [text[0], "-" * len(text[0]), *text[1:]]


def _union(columns: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys of all columns; one that is new in a later column goes behind the key it follows there."""
    order: list[str] = []
    for column in columns:
        previous = -1
        for key in column:
            if key not in order:
                order.insert(previous + 1, key)
            previous = order.index(key)
    return order


def memory_table(plan: Mapping[str, Any]) -> list[str]:
    """Parts at each provider's fullest moment; they sum to the peak."""
    memory = plan["memory"]
    unit, name = (GIB, "GiB") if max(m["peak"] for m in memory.values()) > SMALL * GIB else (2.0**20, "MiB")
    rows = [
        [part, *(f"{m['parts'][part] / unit:.2f}" if part in m["parts"] else "" for m in memory.values())]
        for part in _union(m["parts"] for m in memory.values())
    ]
    rows.append(["peak", *(f"{m['peak'] / unit:.2f}" for m in memory.values())])
    plain = memory["plain"]["peak"]
    rows.append(["over plain", *(f"{m['peak'] / plain:.2f}x" for m in memory.values())])
    limit = plan["device"]["usable"] * plan["device"]["memory"] * GIB
    rows.append([
        f"fits {plan['device']['memory']:.0f} GiB", *("yes" if m["peak"] <= limit else "no" for m in memory.values())
    ])  # fmt: skip
    lines = _table([f"{name} on each device", *memory], rows)
    fullest = "; ".join(f"{key} at {m['moment']}" for key, m in memory.items())
    others = ", ".join(f"{key} {value / unit:.2f}" for key, value in plan["alternatives"].items())
    return ["Peak memory, predicted", *lines, f"Fullest: {fullest}.", f"By choice, {name}: {others}."]


def fits_table(plan: Mapping[str, Any]) -> list[str]:
    """What would fit, for lcdd: a row for each choice, and the flags of the first where what was asked for does not."""
    c, device, fits = plan["config"], plan["device"], plan["fits"]
    title = (
        f"What fits, for lcdd: {device['usable']:.0%} of {device['memory']:.4g} GiB are taken to be there for tensors; "
        f"a sequence has {c['max_length']} tokens"
    )
    if not fits:
        longest = plan["longest_sequence"]
        advice = f"a sequence of {longest} tokens does" if longest else "nor does a shorter one"
        return [title, f"Not even one sequence fits, on whatever number of devices; with every saving on, {advice}."]
    rows = [
        [
            f"{'' if fit['gradient_checkpointing'] else 'no '}checkpointing, {fit['moment_dtype']} moments",
            *(str(fit[key]) for key in ("num_gpus", "largest_batch")),
            f"{fit['peak'] / GIB:.2f}",
            f"{fit['tokens_per_second']:,.0f}",
        ]
        for fit in fits
    ]  # fmt: skip
    head = ["", "devices", "largest batch", "GiB as run", "tokens/s"]
    limit = device["usable"] * device["memory"] * GIB
    if plan["memory"]["lcdd"]["peak"] <= limit:
        return [title, *_table(head, rows), "What was asked for fits."]
    return [title, *_table(head, rows), f"What was asked for does not fit; this does: {_flags(c, fits[0])}"]


def _flags(config: Mapping[str, Any], fit: Mapping[str, Any]) -> str:
    """The settings of a fit that differ from a plan's, as flags."""
    changed = [(key, fit[key]) for key in fit if key in config and fit[key] != config[key]]
    return " ".join(f"--{key}" if value is True else f"--{key} {value}" for key, value in changed)


def time_table(plan: Mapping[str, Any]) -> list[str]:
    """Parts of one optimizer step, and the masking tax: its time over plain fine-tuning's."""
    seconds = plan["seconds"]
    sums = ("total", "ratio")
    rows = [
        [part, *(f"{1e3 * column[part]:.2f}" if part in column else "" for column in seconds.values())]
        for part in _union({k: v for k, v in column.items() if k not in sums and v} for column in seconds.values())
    ]
    rows.append(["step", *(f"{1e3 * column['total']:.2f}" for column in seconds.values())])
    rows.append(["over plain", *(f"{column['ratio']:.2f}x" for column in seconds.values())])
    tokens = _tokens(plan["config"])
    rows.append(["tokens/s, all devices", *(f"{tokens / column['total']:,.0f}" for column in seconds.values())])
    lines = _table(["ms an optimizer step", *seconds], rows)
    layouts = sorted(set(plan["packing"]["layouts"].values()))
    packed = (
        f"lcdd's weight gradients: {', '.join(layouts)}; {plan['packing']['work']:.0%} of the work, "
        f"{plan['packing']['size']:.0%} of the bytes."
    )
    return ["Step time, predicted", *lines, packed]


def wire_table(plan: Mapping[str, Any]) -> list[str]:
    """What a rank sends in a step, and how long that takes over each link."""
    c, links, traffic = plan["config"], plan["wire"]["links"], plan["wire"]["traffic"]
    rows = [
        [name, *(f"{row[key] / 1e9:.3f}" for key in ("gradients", "sent")),
         *(f"{1e3 * row['seconds'][link]:.1f}" for link in links)]
        for name, row in traffic.items()
    ]  # fmt: skip
    head = ["", "GB of gradients", "GB in all", *(f"ms, {name}" for name in links)]
    named = "; ".join(
        f"{name}: {link['name']}, {link['bandwidth']:g} GB/s each way, {1e6 * link['latency']:.0f} us a hop"
        for name, link in links.items()
    )
    reached = next(iter(links.values()))["efficiency"]
    title = f"Over the wire, a calculation: what each of {c['num_gpus']} ranks sends in a step under {c['parallel']}"
    return [title, *_table(head, rows), f"{named}. {reached:.0%} of a rate, and these hops, are assumed."]


def eraser_table(plan: Mapping[str, Any]) -> list[str]:
    """The eraser's step, both ways."""
    c, eraser = plan["config"], plan["eraser_seconds"]
    first = max(eraser.values())
    rows = [[key, f"{1e3 * value:.2f}", f"{first / value:.1f}x"] for key, value in eraser.items()]
    title = f"Eraser's step, predicted: {c['eraser_batch_size']} prompts of {c['eraser_length']} tokens"
    return [title, *_table(["", "ms", "speed"], rows)]


def _tokens(config: Mapping[str, Any]) -> int:
    per_gpu = config["per_device_train_batch_size"] * config["max_length"] * config["gradient_accumulation_steps"]
    return per_gpu * config["num_gpus"]


def render(plan: Mapping[str, Any]) -> str:
    """All tables of a plan's `to_dict()`, with where the figures come from."""
    c, device = plan["config"], plan["device"]
    rates = f"{device['tflops'][c['dtype']]:,.4g} TFLOP/s in {c['dtype']}, {device['bandwidth']:,.4g} GB/s"
    source = {
        "data sheet": f"{device['name']}: {rates} by data sheet, of which {device['matrix_efficiency']:.0%} and "
        f"{device['bandwidth_efficiency']:.0%} are assumed to be reached.",
        "measured here": f"{device['name']}: {rates}, measured here and now.",
        "given": f"{device['name']}: {rates}, given or assumed to be reached.",
    }[device["source"]]
    head = [
        "PREDICTIONS by formula: no step was run.",
        f"{c['model_name_or_path']}: {plan['parameters']:,} parameters, {plan['masked_parameters']:,} of them masked; "
        f"{c['gate_kind']} gates, {c['density']:.0%} open.",
        f"Micro-batches: {c['gradient_accumulation_steps']} of {c['per_device_train_batch_size']} x {c['max_length']} "
        f"tokens on each of {c['num_gpus']} device(s); weights {c['dtype']}, moments {c['moment_dtype']}"
        f"{', activations checkpointed' if c['gradient_checkpointing'] else ''}.",
        source + f" {1e6 * device['launch_seconds']:.0f} us assumed to start an operation.",
    ]
    tables = [memory_table(plan), fits_table(plan), time_table(plan)]
    tables += [wire_table(plan)] if "wire" in plan else []
    lines = [line for table in [*tables, eraser_table(plan)] for line in ("", *table)]
    return "\n".join([*head, *lines])
