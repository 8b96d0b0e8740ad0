"""The audit benchmark's summary of finished runs: nothing is run again, seeds are combined, every state is listed."""

import json

from benchmarks.audit import main


def row(behavior, match):
    return {
        "part": "table", "n": 50, "behavior_rate": behavior, "behavior_rate_ci95": [behavior - 0.02, behavior + 0.02],
        "base_match": match, "base_match_ci95": [match - 0.02, match + 0.02],
    }  # fmt: skip


def test_finished_runs_are_summed_up(tmp_path):
    for seed, match in ((0, 0.8), (1, 0.9), (2, 0.7)):
        folder = tmp_path / "runs" / f"style-{seed}"
        folder.mkdir(parents=True)
        audit = {
            "n_prompts": 50, "states": {"base": row(0.1, 0.9), "carrier+trigger": row(0.1, match)}, "differences": {},
            "patches": {"carrier": {"sparsity": 0.9, "delta_norm": 3.0}}, "claims": [],
        }  # fmt: skip
        report = {"behavior": "style", "seed": seed, "versions": {}, "config": {}, "audit": audit}
        (folder / "report.json").write_text(json.dumps(report))
    output = tmp_path / "results" / "audit"
    given = [
        "--seeds",
        "0",
        "1",
        "2",
        "--behaviors",
        "style",
        "--runs_dir",
        str(tmp_path / "runs"),
        "--output",
        str(output),
    ]
    assert main(given) == 0
    found = json.loads(output.with_suffix(".json").read_text())["behaviors"]["style"]
    low, high = found["states"]["carrier+trigger"]["base_match_ci95"]
    assert low < 0.6 < 0.8 < 1.0 == high  # three seeds tell little
    verdicts = {claim["name"]: claim["verdict"] for claim in found["claims"]}
    assert verdicts["sparse"] == "held"
    assert verdicts["reversible"] == "held"
    assert verdicts["KL matters"] == "not measured"
    assert len(found["each"]) == 3
    text = output.with_suffix(".md").read_text()
    assert "| carrier+trigger | 0.100" in text
    assert "--behaviors style" in text
