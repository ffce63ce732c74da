"""Arguments of the examples here, read before Keras is imported."""

import argparse
import os

BACKENDS = ("jax", "torch", "tensorflow")


def make_parser(description, output, epochs, batch_size=1024):
    """A parser with what all examples take."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--backend",
        default=os.environ.get("KERAS_BACKEND") or "jax",
        help=", ".join(BACKENDS),
    )
    parser.add_argument("--epochs", type=int, default=epochs, help="at most")
    parser.add_argument("--batch-size", type=int, default=batch_size, help=" ")
    parser.add_argument("--output", default=output, help="folder to write")
    return parser


def parse(parser, at_least):
    """The arguments; sets the backend that Keras will have.

    Args:
        parser: What `make_parser` gave.
        at_least: Dict of the least value of further arguments by name.
    """
    args = parser.parse_args()
    if args.backend not in BACKENDS:
        parser.error(
            f"--backend must be one of {', '.join(BACKENDS)}. "
            f"Received: {args.backend!r}"
        )
    for name, least in {"epochs": 1, "batch_size": 1, **at_least}.items():
        value = getattr(args, name)
        if value < least:
            option = name.replace("_", "-")
            parser.error(
                f"--{option} must be at least {least}. Received: {value}"
            )
    os.environ["KERAS_BACKEND"] = args.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no chatter
    if args.backend == "torch":
        # Operations this small gain little from a second thread, and threads
        # that wait for each other make a step ten times slower on a busy
        # machine.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    return args


def named_models(parser, names, available):
    """The models asked for with `--models`, in the order of `available`."""
    if names == "all":
        return list(available)
    unknown = [name for name in names.split(",") if name not in available]
    if unknown:
        parser.error(
            f"--models must be 'all' or some of {','.join(available)}. "
            f"Received: {names!r}"
        )
    return [name for name in available if name in names.split(",")]
