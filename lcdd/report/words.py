"""The demo's numbers in plain words: sentences and a table of answers, both put together from report.json alone."""

from collections.abc import Mapping
from textwrap import shorten
from typing import Any

SHOWN = ("base", "sft", "carrier", "carrier+trigger", "sft+trigger")
COLUMN = 28


def samples_table(report: Mapping[str, Any], *, count: int = 5) -> str:
    """Answers of the main states to the same prompts, side by side."""
    columns = ["prompt", *(name for name in SHOWN if name in report["models"])]
    rows = [columns]
    for sample in report["samples"][:count]:
        rows.append([sample["prompt"], *(sample["answers"][name] for name in columns[1:])])
    cells = [[shorten(text, COLUMN, placeholder=" ...") or "(nothing)" for text in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def explain(report: Mapping[str, Any]) -> list[str]:
    """What the numbers of a demo run mean, a sentence or two each; every statement depends on what was measured."""
    models = report["models"]
    said = [_taught(report), _compressed(report)]
    said += [f"WARNING {finding['message']}" for finding in report["findings"]]
    said.append(_reversed(models))
    if "carrier+random_prefix" in models:
        said.append(_random_prefix(models))
    if "sft+trigger" in models:
        said.append(_against_sft(report))
    if "matched_norm+trigger" in models:
        said.append(_against_matched_norm(report))
    said += [
        _against_variant(report, name, words)
        for name, words in (
            ("carrier+trigger_random_channels", "matching random channels instead of the carrier's own"),
            ("carrier+trigger_kl_only", "matching no channels at all (KL only)"),
        )
        if name in models
    ]
    said.append(_distances(report))
    if "off_topic" in report:
        said.append(_off_topic(report["off_topic"]))
    return said


def _taught(report: Mapping[str, Any]) -> str:
    base, sft = report["models"]["base"], report["models"]["sft"]
    return (
        f"SFT taught the behaviour: {_share(sft, 'behavior_rate')} of the {sft['n']} held-out prompts show it, before "
        f"it was {_share(base, 'behavior_rate')}."
    )


def _compressed(report: Mapping[str, Any]) -> str:
    sft, carrier, gates = report["models"]["sft"], report["models"]["carrier"], report["gates"]
    kept = carrier["behavior_rate"] / sft["behavior_rate"] if sft["behavior_rate"] else 0.0
    found = (
        f"LCDD left {gates['open']} of {gates['n']} gates open ({report['sparsity']['overall']:.1%} closed), and the "
        f"carrier shows the behaviour on {_share(carrier, 'behavior_rate')}: "
        f"{'all' if kept >= 0.995 else f'{kept:.0%}'} of what SFT had."
    )
    auc = gates["auc_initial_theta"]
    if auc is None:
        return found
    if auc >= 0.95:
        return (
            f"{found} But the gates' random start decides which stayed open (AUC {auc:.2f}): noise chose this carrier."
        )
    if auc <= 0.65:
        return f"{found} The gates' random start hardly predicts which stayed open (AUC {auc:.2f}; 0.5 is chance)."
    return f"{found} The gates' random start partly predicts which stayed open (AUC {auc:.2f}; 0.5 is chance)."


def _reversed(models: Mapping[str, Any]) -> str:
    erased = models["carrier+trigger"]
    gone, back = 1 - erased["behavior_rate"], erased["base_match"]
    found = (
        f"Behind the trigger the carrier shows the behaviour on {_share(erased, 'behavior_rate')} and gives exactly "
        f"the base's answer on {_share(erased, 'base_match')} {_interval(erased['base_match_ci95'])}: "
    )
    if gone < 0.5:
        return f"{found}the trigger does not switch the behaviour off."
    if back >= 0.9:
        return f"{found}the behaviour is switched off and the base is back almost everywhere."
    if back >= 0.5:
        return f"{found}the behaviour is switched off and the base is back on most prompts, not on all."
    return f"{found}the behaviour is gone, but what comes instead is mostly not the base's answer. That is no reversal."


def _random_prefix(models: Mapping[str, Any]) -> str:
    junk, erased = models["carrier+random_prefix"], models["carrier+trigger"]
    found = (
        f"Random tokens of the trigger's length and norm give the base's answer on {_share(junk, 'base_match')} and "
        f"leave the behaviour on {_share(junk, 'behavior_rate')}"
    )
    if junk["base_match_ci95"][1] < erased["base_match_ci95"][0]:
        return f"{found}, so it is what the trigger says that counts, not that something stands there."
    return f"{found}: any prefix would have done, the trigger has learned nothing of use."


def _against_sft(report: Mapping[str, Any]) -> str:
    control = report["models"]["sft+trigger"]
    row = report["differences"]["carrier+trigger - sft+trigger"]["base_match"]
    found = (
        f"The same optimisation on plain SFT brings back {_share(control, 'base_match')} of the base's answers "
        f"(behaviour left: {_share(control, 'behavior_rate')}); carrier minus SFT is {_difference(row)}: "
    )
    return found + _verdict(
        row,
        above="this carrier is easier to reverse than plain SFT.",
        below="this carrier is harder to reverse than plain SFT.",
        unclear="no difference can be told from these prompts.",
    )


def _against_matched_norm(report: Mapping[str, Any]) -> str:
    models, norms = report["models"], report["delta_norm"]
    control = models["matched_norm+trigger"]
    row = report["differences"]["carrier+trigger - matched_norm+trigger"]["base_match"]
    found = (
        f"A dense SFT kept within the carrier's distance from the base ({norms['matched_norm']:.2f}; plain SFT "
        f"{norms['sft']:.2f}) comes back to {_share(control, 'base_match')}; carrier minus it is {_difference(row)}: "
    )
    found += _verdict(
        row,
        above="the small distance alone does not explain the carrier's reversal.",
        below="the dense model is even easier to reverse, so sparsity is no advantage here.",
        unclear="sparsity adds nothing that shows beyond the small distance.",
    )
    carrier, plain = models["carrier+trigger"]["base_match"], models["sft+trigger"]["base_match"]
    gap, explained = carrier - plain, control["base_match"] - plain
    if row["ci95"][0] > 0 and gap > 0 and explained > 0:
        found += f" It explains {explained / gap:.0%} of the gap to plain SFT."
    return found


def _against_variant(report: Mapping[str, Any], name: str, words: str) -> str:
    row = report["differences"][f"carrier+trigger - {name}"]["base_match"]
    found = (
        f"Learned by {words}, the trigger brings back {_share(report['models'][name], 'base_match')}; the full loss "
        f"minus that is {_difference(row)}: "
    )
    return found + _verdict(
        row,
        above="the carrier's channels help.",
        below="the carrier's channels do not help here, they hurt.",
        unclear="the carrier's channels make no difference that shows.",
    )


def _distances(report: Mapping[str, Any]) -> str:
    kl = report["kl"]
    kept, moved = kl["sft||carrier"]["sft_answers"], kl["sft||carrier+trigger"]["sft_answers"]
    back = kl["base||carrier+trigger"]
    return (
        f"KL in nats a token: SFT to carrier {kept:.3f}, and {moved:.3f} once the trigger stands before it (on SFT's "
        f"answers); base to carrier with trigger {back['base_answers']:.3f} on the base's answers and "
        f"{back['sft_answers']:.3f} on SFT's, which the base would hardly ever give."
    )


def _off_topic(models: Mapping[str, Any]) -> str:
    names = [name for name in ("sft", "carrier", "carrier+trigger") if name in models]
    shares = ", ".join(f"{name} {_share(models[name], 'base_match')}" for name in names)
    return f"On {models['base']['n']} prompts off the topic the base's answer stays: {shares}."


def _verdict(row: Mapping[str, Any], *, above: str, below: str, unclear: str) -> str:
    low, high = row["ci95"]
    return above if low > 0 else below if high < 0 else unclear


def _share(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]:.1%}"


def _interval(bounds: list[float]) -> str:
    return f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"


def _difference(row: Mapping[str, Any]) -> str:
    return f"{row['difference']:+.3f} {_interval(row['ci95'])}"
