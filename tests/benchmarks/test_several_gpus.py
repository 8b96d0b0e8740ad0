"""The page's tables are those of the records."""

from benchmarks import several_gpus


def test_tables_are_those_of_the_records() -> None:
    """`python -m benchmarks.several_gpus` writes them."""
    text = several_gpus.PAGE.read_text(encoding="utf-8")
    assert several_gpus.rewritten(text) == text
    for name in several_gpus.SECTIONS:
        assert f"<!-- {name}: begin -->" in text
