"""The values that a metric can have."""

Bounds = tuple[float | None, float | None]
"""The least and the largest value; None where there is no end."""

UNBOUNDED: Bounds = (None, None)

SHARE: Bounds = (0.0, 1.0)
"""Of accuracies as well, and of whatever else is a part of a whole."""

NOT_NEGATIVE: Bounds = (0.0, None)
"""Of counts, and of ratios of what is not negative."""

AT_MOST_ONE: Bounds = (None, 1.0)
"""Of shares explained, which are negative where something is worse than nothing."""


def within(bounds: Bounds, low: float, high: float) -> tuple[float, float]:
    """
    An interval without what lies outside a metric's bounds.

    The truth does not lie there, so that what is left covers it as often as the whole;
    unlike an interval of the logit, it exists also where all values are 0 or 1.
    """
    least, largest = bounds
    if least is not None:
        low, high = max(low, least), max(high, least)
    if largest is not None:
        low, high = min(low, largest), min(high, largest)
    return low, high
