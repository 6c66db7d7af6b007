"""Numbers and texts as people read them: one spelling for the report, the summary and the terminal."""

import math

from diffalign.evaluate.results import Measured, Rating, SetDifference


def percent(share: float) -> str:
    """ "61.2 %"."""
    return f"{100 * share:.1f} %"


def spread(measured: Measured) -> str:
    """The interval of a win rate in percent: "57.0 to 65.1"."""
    return f"{100 * measured.ci_low:.1f} to {100 * measured.ci_high:.1f}"


def number(value: float | None, digits: int | None = None) -> str:
    """Three digits after the point, two of large values, more of tiny ones; a dash for what is not defined.

    Args:
        digits: After the point; None chooses by the value.
    """
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    if digits is None:
        digits = 2 if abs(value) >= 10 else 3 if abs(value) >= 0.01 or value == 0 else _digits(value, 2)
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def signed(value: float | None, digits: int | None = None) -> str:
    """A number with its sign."""
    if value is None:
        return number(value)
    return ("+" if value >= 0 else "\N{MINUS SIGN}") + number(abs(value), digits)


def difference(measured: Measured) -> str:
    """A mean difference with its interval, to as many digits as the interval knows: "+0.120 (+0.050 to +0.190)"."""
    low, high = measured.difference_low, measured.difference_high
    if low is None or high is None:
        return signed(measured.mean_difference)
    digits = _digits(high - low, 3)
    return f"{signed(measured.mean_difference, digits)} ({signed(low, digits)} to {signed(high, digits)})"


def between(found: SetDifference) -> str:
    """A difference of two sets with its interval, as `difference` gives that of means."""
    if found.low is None or found.high is None:
        return signed(found.difference)
    digits = _digits(found.high - found.low, 3)
    return f"{signed(found.difference, digits)} ({signed(found.low, digits)} to {signed(found.high, digits)})"


def p_value(p: float) -> str:
    """A chance; what is below one in ten thousand is not resolved by 10,000 resamples."""
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}"


def rating(found: Rating | None) -> str:
    """Elo points with their interval: "1040 (1020 to 1061)"; the base has none."""
    if found is None or found.rating is None:
        return "\N{EN DASH}"
    if found.low is None or found.high is None or found.low == found.high:
        return f"{found.rating:.0f}"
    return f"{found.rating:.0f} ({found.low:.0f} to {found.high:.0f})"


def tied(text: str) -> str:
    """Keeps percent signs on the line of their number."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _digits(size: float, count: int) -> int:
    """Places after the point that show so many digits of a size; at least two, at most eight."""
    return 3 if size == 0 else min(8, max(2, count - 1 - math.floor(math.log10(abs(size)))))
