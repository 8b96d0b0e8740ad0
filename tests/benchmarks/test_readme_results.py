"""The tables and pictures of README and docs are those of the records."""

from benchmarks import readme


def test_results_and_pictures_are_those_of_the_records() -> None:
    """`python -m benchmarks.readme` writes them; run it again after a record changes."""
    for page, parts in readme.blocks().items():
        text = page.read_text(encoding="utf-8")
        assert readme.rewritten(text, parts) == text, page.name
    for path, svg in readme.pictures().items():
        assert path.read_text(encoding="utf-8") == svg
