"""Two or eight simulated CPU devices, so that distribution is tested too."""

import ctypes
import os
import sys
from importlib import metadata

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Read when jax is imported, by keras.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Most of the time on JAX goes into compiling what then runs once.
XLA_FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
# XLA aborts on a flag it does not know: these were tried with this release.
jaxlib = {d.version for d in metadata.distributions(name="jaxlib")}
if any(version.startswith("0.10.") for version in jaxlib):
    XLA_FLAGS += [
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    ]
os.environ.setdefault("XLA_FLAGS", " ".join(XLA_FLAGS))

import keras  # noqa: E402
import pytest  # noqa: E402

if keras.config.backend() == "tensorflow":
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )


@pytest.fixture(autouse=True, scope="module")
def give_memory_back():
    """All that the tests compile would take gigabytes by the last file."""
    yield
    if keras.config.backend() == "jax":
        import jax

        jax.clear_caches()
    if sys.platform == "linux":
        # glibc keeps what was freed: half of the memory on JAX.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)
        trim(0)
