"""Checks of arguments; those that return something are called `as_...`."""

import math
import numbers

import numpy as np


def is_int(value):
    """Whether it is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_bool(value):
    """Whether it is `True` or `False`, of Python or of NumPy."""
    return isinstance(value, (bool, np.bool_))


def is_number(value):
    """Whether it is a finite real number and not a bool."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def check_int(name, value, minimum):
    if not is_int(value) or value < minimum:
        raise ValueError(
            f"`{name}` must be an int of at least {minimum}. "
            f"Received: {name}={value!r}"
        )


def check_bool(name, value):
    if not is_bool(value):
        raise ValueError(
            f"`{name}` must be True or False. Received: {name}={value!r}"
        )


def check_seed(name, value):
    if value is not None and not is_int(value):
        raise ValueError(
            f"`{name}` must be an int or None. Received: {name}={value!r}"
        )


def check_several(name, value):
    """Raises unless it is a collection; a string does not count as one."""
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise ValueError(
            f"`{name}` must be a sequence. Received: {name}={value!r}"
        )


def check_ordered(name, value):
    """Raises unless it is a collection whose order means something.

    A dict would be read as its keys, and a set has no order that lasts.
    """
    check_several(name, value)
    if isinstance(value, (dict, set, frozenset)):
        raise ValueError(
            f"`{name}` must be a sequence, not a {type(value).__name__}. "
            f"Received: {name}={value!r}"
        )


def check_text(name, value):
    if not isinstance(value, str) or not value:
        raise ValueError(
            f"`{name}` must be a string that is not empty. "
            f"Received: {name}={value!r}"
        )


def check_name(name, value):
    """Raises unless it can be part of the name of a layer."""
    if not isinstance(value, str) or not value or "/" in value:
        raise ValueError(
            f"`{name}` must be a string that is not empty and has no '/'. "
            f"Received: {name}={value!r}"
        )


def as_ints(name, value, length, minimum=0):
    """A list of ints, from one for all or one for each."""
    several = [value] * length if is_int(value) else value
    if (
        not isinstance(several, (list, tuple))
        or len(several) != length
        or not all(is_int(number) and number >= minimum for number in several)
    ):
        raise ValueError(
            f"`{name}` must be an int of at least {minimum}, or a list of "
            f"{length} such. Received: {name}={value!r}"
        )
    return list(several)


def as_units(name, units, minimum=1):
    """A tuple of widths, at least `minimum` of them, from one or several."""
    given = units
    units = (units,) if is_int(units) else units
    if (
        not isinstance(units, (list, tuple))
        or len(units) < minimum
        or not all(is_int(width) and width >= 1 for width in units)
    ):
        least = f"at least {minimum} " if minimum else ""
        raise ValueError(
            f"`{name}` must be a positive int or a list of {least}positive "
            f"ints. Received: {name}={given!r}"
        )
    return tuple(units)


def check_int_up_to(name, value, limit_name, limit):
    """Raises unless it is an int from 1 to another argument."""
    if not is_int(value) or not 1 <= value <= limit:
        raise ValueError(
            f"`{name}` must be an int between 1 and `{limit_name}`. "
            f"Received: {name}={value!r}, {limit_name}={limit}"
        )


def check_number(name, value):
    if not is_number(value):
        raise ValueError(
            f"`{name}` must be a finite number. Received: {name}={value!r}"
        )


def check_at_least(name, value, minimum):
    if not is_number(value) or value < minimum:
        raise ValueError(
            f"`{name}` must be a finite number of at least {minimum}. "
            f"Received: {name}={value!r}"
        )


def check_positive(name, value):
    if not is_number(value) or value <= 0:
        raise ValueError(
            f"`{name}` must be positive and finite. Received: {name}={value!r}"
        )


def check_rate(name, value):
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(
            f"`{name}` must be a number of at least 0 and below 1. "
            f"Received: {name}={value!r}"
        )


def check_one_of(name, value, known):
    # Of the same kind, as `True` equals 1.
    if not any(value == k and is_bool(value) == is_bool(k) for k in known):
        raise ValueError(
            f"`{name}` must be one of {known}. Received: {name}={value!r}"
        )


def as_keras_object(name, get, identifier):
    """What `get`, as `keras.initializers.get`, makes of an identifier.

    Keras' errors do not say which argument was wrong.
    """
    try:
        return get(identifier)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must be something that Keras knows: {error}. "
            f"Received: {name}={identifier!r}"
        ) from error


def nearest_divisors(number, wanted):
    """The divisors of a number on both sides of one that is none, as words."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below = [n for n in divisors if n < wanted][-1:]
    above = [n for n in divisors if n > wanted][:1]
    return " and ".join(map(str, below + above))
