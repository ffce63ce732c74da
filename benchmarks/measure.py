"""Alternating runs, their medians, and what is written about them."""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time


def parser(description):
    """The arguments that all benchmarks have."""
    result = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument(
        "--backend", choices=("jax", "tensorflow", "torch"), required=True
    )
    result.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    result.add_argument(
        "--dtype", help="dtype policy (default: float32, on a GPU bfloat16)"
    )
    result.add_argument(
        "--seconds",
        type=float,
        default=4.0,
        help="how long the alternating runs of one comparison go on",
    )
    result.add_argument("--json", help="file for the figures")
    return result


def choose(arguments):
    """Sets backend, device and dtype policy. Before Keras is imported."""
    os.environ["KERAS_BACKEND"] = arguments.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import keras

    if arguments.dtype is None:
        gpu = arguments.device == "gpu"
        arguments.dtype = "bfloat16" if gpu else "float32"
    keras.config.set_dtype_policy(arguments.dtype)
    keras.utils.set_random_seed(0)


def alternate(functions, seconds, least=4):
    """Times functions in turn, so that what slows the machine slows all.

    Args:
        functions: dict of functions without arguments.
        seconds: float. For how long, once each has run twice.
        least: int. Runs of each that are timed at least.

    Returns:
        dict of lists of seconds.
    """
    times = {name: [] for name in functions}
    for _ in range(2):
        for function in functions.values():
            function()
    end = time.perf_counter() + seconds
    while (
        time.perf_counter() < end
        or min(len(runs) for runs in times.values()) < least
    ):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def summary(times, baseline):
    """Median and best seconds of each, and as multiples of the baseline's."""
    median = statistics.median(times[baseline])
    best = min(times[baseline])
    return {
        name: {
            "median_s": statistics.median(runs),
            "best_s": min(runs),
            "ratio": statistics.median(runs) / median,
            "ratio_of_best": min(runs) / best,
            "runs": len(runs),
        }
        for name, runs in times.items()
    }


def conditions(arguments):
    """What the figures depend on."""
    versions = {}
    for package in (
        *("keras", "keras-moe", "keras-hub", "transformers"),
        *("jax", "tensorflow", "tensorflow-cpu", "torch"),
    ):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    given = {k: v for k, v in vars(arguments).items() if k != "json"}
    return {
        "arguments": given,
        "versions": versions,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "device": _device(arguments),
        "date": datetime.date.today().isoformat(),
    }


def _processor():
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _device(arguments):
    if arguments.device == "cpu":
        return "cpu"
    if arguments.backend == "torch":
        import torch

        return torch.cuda.get_device_name()
    if arguments.backend == "jax":
        import jax

        return jax.devices()[0].device_kind
    import tensorflow as tf

    device = tf.config.list_physical_devices("GPU")[0]
    return tf.config.experimental.get_device_details(device).get("device_name")


def write(arguments, figures):
    """Writes conditions and figures as JSON, if a file was named."""
    if arguments.json:
        path = pathlib.Path(arguments.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {**conditions(arguments), "figures": figures}
        path.write_text(json.dumps(content, indent=1) + "\n")


def print_table(head, rows):
    """A Markdown table."""
    table = [head, ["---"] * len(head), *rows]
    for row in table:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)
