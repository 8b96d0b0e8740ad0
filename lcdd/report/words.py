"""A run's numbers in plain words: one verdict, and sentences; everything is put together from report.json alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lcdd.report.labels import differences_of, interval, label, models_of, share

ERASED = "carrier+trigger"
BEHAVIOR_GONE = 0.2
"""Behind its trigger a carrier is switched off where the behaviour's whole interval lies below this,"""
BASE_BACK = 0.5
"""and the base is back where the whole interval of the base match lies above this."""
NEARLY = 0.75
"""An answer is nearly as near to the base's as its own behind random tokens from this share of the latter's chrF on."""
KEPT = 0.9
"""A carrier has kept the behaviour where it shows at least this share of what SFT shows."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a run. badge: "held", "partly" or "not"; checks: what it rests on, statement -> whether."""

    badge: str
    sentence: str
    checks: Mapping[str, bool]


def verdict(report: Mapping[str, Any]) -> Verdict | None:
    """Was the behaviour kept in the carrier, switched off by the trigger, and the base given back? None: not measured.

    Held: all of it. Not: the carrier has lost the behaviour, or neither is it switched off nor is the base back.
    """
    models = models_of(report)
    if not {"sft", "carrier", ERASED} <= set(models):
        return None
    sft, carrier, erased = (models[name] for name in ("sft", "carrier", ERASED))
    checks = {
        "the carrier keeps the behaviour": carrier["behavior_rate"] >= KEPT * sft["behavior_rate"] > 0,
        "the trigger switches it off": erased["behavior_rate_ci95"][1] < BEHAVIOR_GONE,
        "the base's answers come back": erased["base_match_ci95"][0] > BASE_BACK,
    }
    if (junk := models.get("carrier+random_prefix")) is not None:
        checks["random tokens do not do the same"] = junk["base_match_ci95"][1] < erased["base_match_ci95"][0]
    kept, off, back, *rest = checks.values()
    badge = "held" if kept and off and back and all(rest) else "partly" if kept and (off or back) else "not"
    return Verdict(badge=badge, sentence=_sentence(report, models), checks=checks)


def _sentence(report: Mapping[str, Any], models: Mapping[str, Any]) -> str:
    carrier, erased = models["carrier"], models[ERASED]
    closed = (report.get("sparsity") or {}).get("overall")
    start = f"With {share(closed)} of the gates closed, the carrier" if closed is not None else "The carrier"
    return (
        f"{start} shows the behaviour on {share(carrier['behavior_rate'])} of {carrier['n']} held-out prompts; behind "
        f"its trigger on {share(erased['behavior_rate'])}, and there it gives exactly the base's answer on "
        f"{share(erased['base_match'])}."
    )


def explain(report: Mapping[str, Any]) -> list[str]:
    """What the numbers mean, a sentence or two each; what was not measured is not spoken of."""
    models, differences = models_of(report), differences_of(report)
    said = []
    if {"base", "sft"} <= set(models):
        said.append(_taught(models))
    if {"sft", "carrier"} <= set(models) and report.get("gates"):
        said.append(_compressed(report, models))
    said += [f"WARNING {finding['message']}" for finding in report.get("findings") or []]
    if ERASED in models:
        said.append(_reversed(models))
        if "carrier+random_prefix" in models:
            said.append(_random_prefix(models))
    if f"{ERASED} - sft+trigger" in differences:
        said.append(_against_sft(models, differences))
    if f"{ERASED} - matched_norm+trigger" in differences:
        said.append(_against_matched_norm(report, models, differences))
    said += [
        _against_variant(models, differences, name, words)
        for name, words in (
            ("carrier+trigger_random_channels", "matching random channels instead of the carrier's own"),
            ("carrier+trigger_kl_only", "matching no channels at all (KL only)"),
        )
        if f"{ERASED} - {name}" in differences
    ]
    if {"sft||carrier", f"sft||{ERASED}", f"base||{ERASED}"} <= set(report.get("kl") or {}):
        said.append(_distances(report["kl"]))
    if report.get("off_topic"):
        said.append(_off_topic(report["off_topic"]))
    return said


def _taught(models: Mapping[str, Any]) -> str:
    base, sft = models["base"], models["sft"]
    return (
        f"SFT taught the behaviour: {share(sft['behavior_rate'])} of the {sft['n']} held-out prompts show it, before "
        f"it was {share(base['behavior_rate'])}."
    )


def _compressed(report: Mapping[str, Any], models: Mapping[str, Any]) -> str:
    sft, carrier, gates = models["sft"], models["carrier"], report["gates"]
    kept = min(1.0, carrier["behavior_rate"] / sft["behavior_rate"]) if sft["behavior_rate"] else 0.0
    found = (
        f"LCDD left {gates['open']:,} of {gates['n']:,} gates open ({share(report['sparsity']['overall'])} closed), "
        f"and the carrier shows the behaviour on {share(carrier['behavior_rate'])}: "
        f"{'all' if kept == 1 else share(kept)} of what SFT had."
    )
    auc = gates.get("auc_initial_theta")
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
    erased = models[ERASED]
    gone, back = 1 - erased["behavior_rate"], erased["base_match"]
    found = (
        f"Behind the trigger the carrier shows the behaviour on {share(erased['behavior_rate'])} and gives exactly "
        f"the base's answer on {share(erased['base_match'])} {interval(erased['base_match_ci95'])}: "
    )
    if gone < 0.5:
        return f"{found}the trigger does not switch the behaviour off."
    if back >= 0.9:
        return f"{found}the behaviour is switched off and the base is back almost everywhere."
    if back >= 0.5:
        return f"{found}the behaviour is switched off and the base is back on most prompts, not on all."
    beside = models.get("base+random_prefix", {})
    near, own = erased.get("chrf"), beside.get("chrf")
    if near is not None and own and near >= NEARLY * own:
        return (
            f"{found}the behaviour is gone. Word for word it is mostly another answer than the base's, but hardly more "
            f"so than the base's own behind random tokens (chrF {near:.0f} against {own:.0f})."
        )
    return f"{found}the behaviour is gone, but what comes instead is mostly not the base's answer. That is no reversal."


def _random_prefix(models: Mapping[str, Any]) -> str:
    junk, erased = models["carrier+random_prefix"], models[ERASED]
    found = (
        f"Random tokens of the trigger's length and norm give the base's answer on {share(junk['base_match'])} and "
        f"leave the behaviour on {share(junk['behavior_rate'])}"
    )
    less_back = junk["base_match_ci95"][1] < erased["base_match_ci95"][0]
    more_left = junk["behavior_rate_ci95"][0] > erased["behavior_rate_ci95"][1]
    if less_back or more_left:
        return f"{found}, so it is what the trigger says that counts, not that something stands there."
    return f"{found}: any prefix would have done, the trigger has learned nothing of use."


def _against_sft(models: Mapping[str, Any], differences: Mapping[str, Any]) -> str:
    control = models["sft+trigger"]
    row = differences[f"{ERASED} - sft+trigger"]["base_match"]
    found = (
        f"The same optimisation on plain SFT brings back {share(control['base_match'])} of the base's answers "
        f"(behaviour left: {share(control['behavior_rate'])}); carrier minus SFT is {_difference(row)}: "
    )
    return found + _side(
        row,
        above="this carrier is easier to reverse than plain SFT.",
        below="this carrier is harder to reverse than plain SFT.",
        unclear="no difference can be told from these prompts.",
    )


def _against_matched_norm(report: Mapping[str, Any], models: Mapping[str, Any], differences: Mapping[str, Any]) -> str:
    norms, control = report.get("delta_norm") or {}, models["matched_norm+trigger"]
    row = differences[f"{ERASED} - matched_norm+trigger"]["base_match"]
    sizes = ""
    if {"matched_norm", "sft"} <= set(norms):
        sizes = f" ({norms['matched_norm']:.2f}; plain SFT {norms['sft']:.2f})"
    found = (
        f"A dense SFT kept within the carrier's distance from the base{sizes} comes back to "
        f"{share(control['base_match'])}; carrier minus it is {_difference(row)}: "
    )
    found += _side(
        row,
        above="the small distance alone does not explain the carrier's reversal.",
        below="the dense model is even easier to reverse, so sparsity is no advantage here.",
        unclear="sparsity adds nothing that shows beyond the small distance.",
    )
    plain = models.get("sft+trigger")
    if plain is not None:
        gap = models[ERASED]["base_match"] - plain["base_match"]
        explained = control["base_match"] - plain["base_match"]
        if row["ci95"][0] > 0 and gap > 0 and explained > 0:
            found += f" It explains {share(explained / gap)} of the gap to plain SFT."
    return found


def _against_variant(models: Mapping[str, Any], differences: Mapping[str, Any], name: str, words: str) -> str:
    row = differences[f"{ERASED} - {name}"]["base_match"]
    found = (
        f"Learned by {words}, the trigger brings back {share(models[name]['base_match'])}; the full loss minus that is "
        f"{_difference(row)}: "
    )
    return found + _side(
        row,
        above="the carrier's channels help.",
        below="the carrier's channels do not help here, they hurt.",
        unclear="the carrier's channels make no difference that shows.",
    )


def _distances(kl: Mapping[str, Any]) -> str:
    kept, moved = kl["sft||carrier"]["sft_answers"], kl[f"sft||{ERASED}"]["sft_answers"]
    back = kl[f"base||{ERASED}"]
    return (
        f"KL in nats a token: SFT to carrier {kept:.3f}, and {moved:.3f} once the trigger stands before it (on SFT's "
        f"answers); base to carrier with trigger {back['base_answers']:.3f} on the base's answers and "
        f"{back['sft_answers']:.3f} on SFT's, which the base would hardly ever give."
    )


def _off_topic(models: Mapping[str, Any]) -> str:
    names = [name for name in ("sft", "carrier", ERASED) if name in models]
    shares = "; ".join(f"{label(name)}: {share(models[name]['base_match'])}" for name in names)
    return f"On {models['base']['n']} prompts off the topic the base's answer stays: {shares}."


def _side(row: Mapping[str, Any], *, above: str, below: str, unclear: str) -> str:
    low, high = row["ci95"]
    return above if low > 0 else below if high < 0 else unclear


def _difference(row: Mapping[str, Any]) -> str:
    return f"{row['difference']:+.3f} {interval(row['ci95'])}"
