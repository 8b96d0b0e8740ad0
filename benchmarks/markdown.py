"""What records become on a page: tables, and blocks between markers."""

import re
from collections.abc import Mapping, Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(cells)} |" for cells in rows)]


def rewritten(page: str, blocks: Mapping[str, str]) -> str:
    """A page with each block between its markers.

    Raises:
        ValueError: it has no such markers.
    """
    for name, block in blocks.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        page, found = re.subn(f"({begin}\n).*?(\n{end})", lambda m, block=block: m[1] + block + m[2], page, flags=re.S)
        if not found:
            raise ValueError(f"expected a page with {begin} and {end}")
    return page
