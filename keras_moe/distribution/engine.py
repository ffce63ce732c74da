"""What the engines of `ExpertParallel` have in common."""

import keras


class Engine:
    """One way of a backend to compute on several devices.

    A subclass has `num_expert_shards`, `num_data_shards`, `scope()`, and
    `distribute(model)`, whose result is ready for `fit`. Here is what holds
    where one process has all devices.
    """

    num_processes = 1
    process_index = 0

    def load_model(self, filepath, custom_objects=None, compile=True):
        with self.scope():
            model = keras.saving.load_model(
                filepath, custom_objects=custom_objects, compile=compile
            )
        return self.distribute(model)

    def split(self, *arrays, batch_size):
        return arrays if len(arrays) > 1 else arrays[0]

    def save_sharded(self, model, folder):
        raise NotImplementedError(
            "`save_sharded` is for PyTorch. On JAX, "
            "`keras.callbacks.OrbaxCheckpoint` writes from each device."
        )

    def load_sharded(self, model, folder):
        raise NotImplementedError("`load_sharded` is for PyTorch.")


def check_divides(num_experts, num_expert_shards):
    """Raises unless each owner gets as many experts as any other."""
    if num_experts % num_expert_shards:
        possible = [n for n in range(1, num_experts + 1) if not num_experts % n]
        nearest = sorted(possible, key=lambda n: abs(n - num_expert_shards))[:2]
        raise ValueError(
            "`num_expert_shards` must divide the number of experts. Received: "
            f"num_expert_shards={num_expert_shards} for {num_experts} experts; "
            f"the nearest numbers that do are {sorted(nearest)}"
        )
