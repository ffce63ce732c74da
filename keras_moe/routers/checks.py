"""Checks of arguments that several routers have."""


def check_int(name, value, minimum):
    if not isinstance(value, int) or value < minimum:
        raise ValueError(
            f"`{name}` must be an int of at least {minimum}. "
            f"Received: {name}={value!r}"
        )


def check_at_least(name, value, minimum):
    if not value >= minimum:
        raise ValueError(
            f"`{name}` must be at least {minimum}. Received: {name}={value}"
        )


def check_rate(name, value):
    if not 0 <= value < 1:
        raise ValueError(
            f"`{name}` must be at least 0 and below 1. Received: {name}={value}"
        )


def check_one_of(name, value, known):
    if not any(value is k or value == k for k in known):
        raise ValueError(
            f"`{name}` must be one of {known}. Received: {name}={value!r}"
        )


def check_top_k(top_k, num_experts):
    if not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise ValueError(
            "`top_k` must be an int between 1 and `num_experts`. "
            f"Received: top_k={top_k!r}, num_experts={num_experts}"
        )
