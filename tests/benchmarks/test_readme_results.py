"""The README's table and picture are those of the demo's records."""

import json

from benchmarks import readme


def test_results_and_picture_are_those_of_the_records() -> None:
    """`python -m benchmarks.readme` writes them; run it again after the demo's records change."""
    sweep = json.loads(readme.SWEEP.read_text(encoding="utf-8"))
    text = readme.README.read_text(encoding="utf-8")
    assert readme.rewritten(text, sweep) == text
    assert readme.with_claims(text, json.loads(readme.CLAIMS.read_text(encoding="utf-8"))) == text
    assert readme.PICTURE.read_text(encoding="utf-8") == readme.picture(sweep)
