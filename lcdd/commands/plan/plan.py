"""`lcdd plan`: what training would need and take, before anything is bought or run, and what would fit."""

import json
from dataclasses import asdict

from lcdd.commands.plan.fits import longest_sequence, what_fits
from lcdd.commands.plan.predict import predict
from lcdd.commands.plan.tables import render
from lcdd.config import PlanConfig


def run(config: PlanConfig) -> int:
    """`lcdd plan`: print the tables, or JSON."""
    plan = predict(config)
    fits = what_fits(plan.case)
    found = plan.to_dict() | {"fits": [asdict(fit) for fit in fits]}
    if not fits:
        found["longest_sequence"] = longest_sequence(plan.case)
    print(json.dumps(found, indent=2) if config.json else render(found))
    return 0
