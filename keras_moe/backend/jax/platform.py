import jax


def platform_of(tensor):
    """`"cpu"`, `"gpu"` or `"tpu"`: where what is computed with it will run."""
    if not isinstance(tensor, jax.core.Tracer) and isinstance(
        tensor, jax.Array
    ):
        (platform,) = {device.platform for device in tensor.devices()}
    else:
        # A tracer does not know its device.
        device = jax.config.jax_default_device
        platform = getattr(device, "platform", device) or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform
