"""Arguments of the examples that classify images, read before Keras is."""

import argparse
import json
import os
import pathlib
import sys
import tempfile

BACKENDS = ("jax", "torch", "tensorflow")
MODELS = ("vmoe", "soft_moe", "dense")


def parse(description, name, **defaults):
    """The arguments; sets the backend that Keras will have.

    Args:
        description: str.
        name: str. Of the data set, and of the folder that is written.
        **defaults: Of `epochs`, `learning_rate`, `hidden_dim`, `num_layers`,
            `patch_size`, `shift` and `validation`.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="vmoe", help=", ".join(MODELS))
    add(
        "--data",
        type=pathlib.Path,
        help="folder or .npz that has the data; without it Keras downloads it",
    )
    add(
        "--backend",
        default=os.environ.get("KERAS_BACKEND") or "jax",
        help=", ".join(BACKENDS),
    )
    whole = {
        "epochs": "at most",
        "batch_size": "at least 1",
        "hidden_dim": "width of the tokens, a multiple of 32",
        "num_layers": "at least 1",
        "patch_size": "must divide the images",
        "validation": "training images held out",
        "shift": "pixels that a training image is moved at most; 0 for none",
        "patience": "epochs without a better one that end the training; 0: all",
        "seed": "at least 0",
    }
    defaults = {"batch_size": 128, "patience": 0, "seed": 0, **defaults}
    for option, text in whole.items():
        add(_flag(option), type=int, default=defaults[option], help=text)
    add(
        "--learning-rate",
        type=float,
        default=defaults["learning_rate"],
        help="the highest, after the warmup",
    )
    add("--mixed-precision", action="store_true", help="mixed_bfloat16")
    add("--no-test", action="store_true", help="leave the test images alone")
    add("--resume", action="store_true", help="go on where a run was killed")
    add("--output", help=f"folder to write (default: runs/{name}/MODEL)")
    args = parser.parse_args()

    for option, known in (("model", MODELS), ("backend", BACKENDS)):
        value = getattr(args, option)
        if value not in known:
            parser.error(
                f"--{option} must be one of {', '.join(known)}. "
                f"Received: {value!r}"
            )
    at_least = {"shift": 0, "patience": 0, "seed": 0}
    for option in whole:
        least, value = at_least.get(option, 1), getattr(args, option)
        if value < least:
            parser.error(
                f"{_flag(option)} must be at least {least}. Received: {value}"
            )
    if args.hidden_dim % 32:
        parser.error(
            f"--hidden-dim must be a multiple of 32. Received: "
            f"{args.hidden_dim}"
        )
    if not 0 < args.learning_rate < 1:
        parser.error(
            "--learning-rate must be between 0 and 1. Received: "
            f"{args.learning_rate}"
        )
    if args.data is not None and not args.data.exists():
        parser.error(f"--data: there is no {str(args.data)!r}")

    args.output = pathlib.Path(args.output or f"runs/{name}/{args.model}")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output).close()
    except OSError as error:
        sys.exit(f"Cannot write to --output {str(args.output)!r}: {error}")

    if args.resume:
        _check_resumable(parser, args)

    os.environ["KERAS_BACKEND"] = args.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no chatter
    if args.backend == "torch":
        # Operations this small gain little from a second thread, and threads
        # that wait for each other make a step ten times slower on a busy
        # machine.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    return args


def settings_of(args):
    """What a run must have the same to go on with another one."""
    left_out = ("output", "resume", "data", "no_test")
    return {k: v for k, v in vars(args).items() if k not in left_out}


def _check_resumable(parser, args):
    settings = args.output / "backup" / "settings.json"
    if settings.exists():
        saved = json.loads(settings.read_text())
        changed = [k for k, v in settings_of(args).items() if saved.get(k) != v]
        if changed:
            parser.error(
                "--resume needs the settings of the run that was killed. "
                f"Received others for: {', '.join(map(_flag, changed))}"
            )
    elif (args.output / "summary.json").exists():
        parser.error(f"--resume: the run in {str(args.output)!r} has ended")


def _flag(option):
    return "--" + option.replace("_", "-")
