"""Jinja2 with autoescape over `templates/`: nothing that a model or a user wrote can become markup."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lcdd.report.labels import interval, label, share
from lcdd.report.numbers import number, signed


@cache
def environment() -> Environment:
    """The templates of the report, with the filters that write numbers and names for people."""
    made = Environment(
        loader=PackageLoader("lcdd.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": number, "signed": signed, "share": share, "interval": interval, "label": label, "plain": plain
    }  # fmt: skip
    return made


def macro(template: str, name: str, *arguments: Any) -> Markup:
    """What a template's macro writes for the arguments."""
    return Markup(getattr(environment().get_template(template).module, name)(*arguments))


def style_sheet() -> Markup:
    """style.css, to be put into the page: one file is all that a reader is sent."""
    return Markup((Path(__file__).parent / "style.css").read_text(encoding="utf-8"))


def plain(name: Any) -> str:
    """A setting's or a stage's name without underscores."""
    return str(name).replace("_", " ")
