"""Runs the tests once per backend: `python -m tests [--backends a,b] [args]`.

Keras chooses its backend at import, so each backend gets a pytest of its own,
with a worker for each of up to four cores (compiling takes most of the time on
JAX, and is done by one). All further arguments go to pytest.
"""

import argparse
import os
import subprocess
import sys
import tempfile

BACKENDS = ("jax", "torch", "tensorflow")


def main():
    parser = argparse.ArgumentParser(prog="python -m tests")
    parser.add_argument(
        "--backends",
        default=",".join(BACKENDS),
        help="comma-separated; default: all three",
    )
    arguments, pytest_arguments = parser.parse_known_args()
    backends = arguments.backends.split(",")
    unknown = set(backends) - set(BACKENDS)
    if unknown:
        parser.error(f"--backends must be of {BACKENDS}. Received: {unknown}")
    workers = min(os.cpu_count() or 1, 4)
    # A file's tests share what has been compiled for the first of them.
    workers = ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []
    failed = []
    with tempfile.TemporaryDirectory() as compiled:
        settings = {
            # What one worker, or an earlier file, has compiled on JAX.
            "JAX_COMPILATION_CACHE_DIR": compiled,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            # A worker for each core leaves no core for threads.
            "OMP_NUM_THREADS": "1",
        }
        for backend in backends:
            print(f"\n===== {backend} =====", flush=True)
            status = subprocess.run(
                [sys.executable, "-m", "pytest", "-q"]
                + [*workers, *pytest_arguments],
                env={**settings, **os.environ, "KERAS_BACKEND": backend},
            ).returncode
            if status:  # 5, no test collected, too
                failed.append(backend)
    print(f"\nBackends run: {', '.join(backends)}. ", end="")
    print(f"Failed: {', '.join(failed) or 'none'}.", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
