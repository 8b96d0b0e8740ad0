"""The tables and the picture of README and docs are those of the records."""

import json

from benchmarks import readme


def test_results_and_picture_are_those_of_the_records() -> None:
    """`python -m benchmarks.readme` writes them; run it again after a record changes."""
    for page, parts in readme.blocks().items():
        text = page.read_text(encoding="utf-8")
        assert readme.rewritten(text, parts) == text, page.name
    sweep = json.loads(readme.SWEEP.read_text(encoding="utf-8"))
    assert readme.PICTURE.read_text(encoding="utf-8") == readme.picture(sweep)
