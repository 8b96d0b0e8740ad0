"""Numbers as people read them."""

import math


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: thousands grouped, small ones in scientific notation, "–" for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 10.0**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def signed(value: float) -> str:
    """A difference: three decimals and its sign."""
    return f"{value:+.3f}"


def tick_text(tick: float) -> str:
    """The number at an axis."""
    if tick == 0:
        return "0"
    if abs(tick) < 1e-3 or abs(tick) >= 1e5:
        return f"{tick:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{tick:g}"
