"""The README's tables and pictures are those of the records."""

from benchmarks import readme


def test_results_and_pictures_are_those_of_the_records() -> None:
    """`python -m benchmarks.readme` writes them; run it again after records change."""
    text = readme.README.read_text(encoding="utf-8")
    assert readme.rewritten(text, readme.blocks()) == text
    for path, svg in readme.pictures().items():
        assert path.read_text(encoding="utf-8") == svg
