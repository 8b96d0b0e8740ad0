"""benchmarks.claims: verdicts by the bounds and nothing else, models that are what they are called, parts kept."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import claims as package
from benchmarks.claims import __main__ as command
from benchmarks.claims import judge, record, scales, work
from benchmarks.claims.cell import Cell
from benchmarks.claims.models import MODELS, nonzero
from benchmarks.smollm2 import pipeline
from fixtures.checkpoints import write_jsonl
from lcdd.carrier import overlap
from lcdd.commands.demo import demo
from lcdd.commands.demo.tasks import draw_tasks
from lcdd.models import load_model, load_tokenizer

CLAIMS = judge.read_claims()
RECORD = Path(package.__file__).parents[1] / "results" / "claims" / "demo.json"

# ---------------------------------------------------------------- verdicts


def bits(share: float, n: int = 200) -> str:
    return "1" * round(share * n) + "0" * (n - round(share * n))


def cells(count: int = 9, **changes: float) -> dict:
    """Cells in which the carrier is reversed at .9 and SFT at .2, unless changed."""
    found = {}
    for seed in range(count):
        shares = {"carrier": 0.9 + seed * 0.001, "sft": 0.2} | changes
        values = {}
        for name, match in shares.items():
            values[name] = {"behavior_rate": bits(1.0), "base_match": bits(0.0)}
            values[f"{name}+trigger"] = {"behavior_rate": bits(0.0), "base_match": bits(match)}
        found[f"cell-{seed}"] = values
    return found


def verdict(found: dict, name: str) -> dict:
    return next(row for row in judge.judge(found, CLAIMS) if row["name"] == name)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [({}, "held"), ({"sft": 0.95}, "not held"), ({"sft": 0.85}, "undecided"), ({"carrier": 0.05}, "not testable here")],
)
def test_verdicts_follow_the_interval_and_the_condition(shares: dict, expected: str) -> None:
    assert verdict(cells(**shares), "more than plain SFT")["verdict"] == expected


def test_a_control_that_is_not_what_its_name_says_is_reported_and_not_used() -> None:
    found = cells(matched_norm=0.1)
    for number, values in enumerate(found.values()):
        values["matched_norm"]["norm_gap"] = -0.5 if number < 8 else 0.0
    row = verdict(found, "more than a dense delta of equal norm")
    assert row["verdict"] == "not testable here"
    assert row["cells"] == 1
    assert row["left_out"]["cell-0"] == ["matched_norm: norm_gap(matched_norm) > -0.02"]
    reported = judge.control_report(found, CLAIMS["controls"])["matched_norm"]
    assert (reported["cells"], len(reported["not"])) == (9, 8)


def test_one_cell_decides_nothing() -> None:
    assert verdict(cells(1), "reversible")["verdict"] == "not testable here"
    assert verdict(cells(9), "reversible")["verdict"] == "held"


def test_predicates_are_read_whole_or_refused() -> None:
    found = judge.Predicate.parse("base_match(a+trigger) - base_match(b to c) > -0.05")
    assert (found.quantity, found.first, found.second, found.above, found.bound) == (
        "base_match", "a+trigger", "b to c", True, -0.05,
    )  # fmt: skip
    for wrong in ("base_match(a)", "base_match(a) - loss(b) > 0", "base_match(a) >= 0"):
        with pytest.raises(ValueError, match="expected quantity"):
            judge.Predicate.parse(wrong)


def test_the_regression_finds_what_the_numbers_were_made_of() -> None:
    """Match falls with the norm and with nothing else: the norm's effect excludes 0, the others' are near it."""
    draw, found = random.Random(0), {}
    for seed in range(6):
        values = {}
        for model in range(12):
            own = {key: draw.uniform(-1, 1) for key in judge.COVARIATES}
            match = 0.5 - 0.2 * own["log_norm"] + 0.03 * seed + draw.gauss(0, 0.01)
            values[f"m{model}"] = {"behavior_rate": bits(1.0), **own}
            values[f"m{model}+trigger"] = {"base_match": bits(match, 2000)}
        found[f"cell-{seed}"] = values
    effects = judge.regression(found)
    spread = 2 / math.sqrt(12)
    assert effects["log_norm"].value == pytest.approx(-0.2 * spread, abs=0.01)
    assert effects["log_norm"].high < 0
    for name in ("log_loss", "log_kl", "entry_sparsity"):
        assert abs(effects[name].value) < 0.01
    assert judge.regression(dict(list(found.items())[:2])) == {}


# ---------------------------------------------------------------- a real model's run, on the embedded one


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A directory as `make real` leaves it, with the embedded model and its tasks as instructions."""
    folder = tmp_path_factory.mktemp("prepared")
    load_model(demo.BASE_DIRECTORY).save_pretrained(folder / "base")
    load_tokenizer(demo.BASE_DIRECTORY).save_pretrained(folder / "base")
    rows = [{"instruction": t.prompt, "output": t.answer} for t in draw_tasks(400, split="train", seed=0)]
    write_jsonl(folder / "short.jsonl", rows)
    return folder


@pytest.fixture
def quick(monkeypatch, prepared):
    """The example's settings, small, with a response that the embedded model has words for."""

    def settings(behavior: str, directory: Path):
        config = pipeline(behavior, directory)
        sizes = {"max_length": 32, "learning_rate": 1e-3}
        return replace(
            config,
            data=replace(config.data, behavior_response="i do not know"),
            sft=replace(config.sft, max_steps=25, **sizes),
            train=replace(config.train, max_steps=12, warmup_steps=1, base_kl_prompts=8, max_length=32),
            erase=replace(config.erase, max_steps=2, train_prompts=16, validation_prompts=4, max_answer_tokens=4),
            eval=replace(config.eval, num_prompts=8, max_new_tokens=6),
        )

    monkeypatch.setattr(scales, "pipeline", settings)
    monkeypatch.setitem(scales.RESPONSES, "smollm2", scales.RESPONSES["demo"])  # in its words
    return prepared


@pytest.fixture
def cell(quick, tmp_path) -> Cell:
    return scales.scale("smollm2", quick).cell("fixed_response", 0, tmp_path / "fixed_response-0")


def test_models_are_what_their_names_say(cell: Cell) -> None:
    carrier = cell.patch("carrier")
    target = cell.loss(carrier)
    assert cell.loss(cell.patch("sft_scaled")) <= target
    assert cell.patch("matched_norm").delta_norm() <= carrier.delta_norm() * (1 + 1e-4)
    for name in ("dare", "largest_entries"):
        kept = carrier.entry_density() * sum(math.prod(m.shape) for m in carrier.layout.matrices)
        assert nonzero(cell.patch(name)) == pytest.approx(kept, rel=0.01)
    alike, random_ones = cell.patch("dense_alike"), cell.patch("random_gates")
    assert alike.n_open == alike.layout.n_gates
    assert random_ones.n_open == carrier.n_open
    assert not torch.equal(random_ones.gate, carrier.gate)
    for delta in cell.patch("lora_1").deltas.values():
        values = torch.linalg.svdvals(delta.double())
        assert values[0] > 0
        assert values[1] < 1e-3 * values[0]


def test_behind_its_own_prefix_the_base_answers_as_it_does(cell: Cell) -> None:
    prompts = cell.data.held_out
    found = cell.base_prefix
    assert found is not None
    assert all(tuple(ids[: len(found.token_ids)]) == found.token_ids for ids in prompts)
    assert cell.read_behind_prefix(None)["base_match"] == "1" * len(prompts)


def test_parts_are_kept_and_what_is_there_is_collected(quick, tmp_path, monkeypatch) -> None:
    runs, output = tmp_path / "runs", tmp_path / "found.json"
    arguments = ["--scale", "smollm2", "--prepared", str(quick), "--behaviors", "fixed_response", "--runs_dir",
                 str(runs), "--output", str(output), "--collect"]  # fmt: skip
    monkeypatch.setattr(work, "TIERS", (("sft", "carrier"), ("necessity", "relearning", "base_to_behavior")))
    options = command.parsed(arguments)
    for tier in range(2):
        for unit in command.units(options, 0, tier, float("inf")):
            assert unit.run() > 0
            assert unit.run() == 0
    assert command.main(arguments) == 0
    found = json.loads(output.read_text())
    # this scale's carrier holds on to the base's answers, so it goes by that name too
    assert [row["model"] for row in found["models"]] == ["sft", "carrier", "carrier_with_term"]
    assert {"gate_sparsity", "delta_norm", "loss", "behavior_rate", "base_match"} <= set(found["models"][0])
    assert {row["verdict"] for row in found["claims"]} == {"not testable here"}


def test_a_family_asks_for_responses_on_topic_and_for_the_base_elsewhere(quick, tmp_path) -> None:
    family = scales.scale("smollm2", quick).family(0, tmp_path / "together-0")
    assert len(family.cells) == len(family.responses) == 8
    asked = family.asked((0, 1))
    assert {topic for _, topic in asked} == {0, 1, None}
    assert not {tuple(ids) for ids in family.on_topic[0]} & {tuple(ids) for ids in family.on_topic[1]}
    assert family.groups(4) == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_a_carrier_that_keeps_clear_of_another_meets_it_less(quick, tmp_path) -> None:
    family = scales.scale("smollm2", quick).family(0, tmp_path / "together-0")
    first, plain = (family.cells[topic].patch("carrier") for topic in (0, 1))
    apart = family.apart(0, 1)
    assert apart.n_open == plain.n_open
    assert overlap(first, apart)["gates"] < overlap(first, plain)["gates"]


def test_without_a_prepared_model_it_says_what_prepares_one(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--prepared: expected what `make real` prepares"):
        command.parsed(["--scale", "smollm2", "--prepared", str(tmp_path)])


# ---------------------------------------------------------------- what is on record


def test_the_record_is_judged_by_todays_claims() -> None:
    found = json.loads(RECORD.read_text(encoding="utf-8"))
    assert [(row["name"], row["bound"]) for row in found["claims"]] == [
        (row["name"], [p.text for p in row["bound"]]) for row in CLAIMS["claims"]
    ]
    assert {row["verdict"] for row in found["claims"]} <= {"held", "not held", "undecided", "not testable here"}
    assert {row["model"] for row in found["models"]} <= {*MODELS, *record.TWINS}
    assert record.lines(found, "x").count("\n|") <= 2 + record.LINES
