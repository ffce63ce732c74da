import keras
import numpy as np
from keras import ops

from keras_moe import backend
from keras_moe.ops.masking import zero_masked
from keras_moe.ops.routing import expert_counts

DETAILS = ("auto", "summary", "per_expert")
# With more experts, "auto" would flood the progress bar.
MAX_EXPERTS_SHOWN = 8


class RoutingStatistics(keras.layers.Layer):
    """Counts what a router does in training, and shows it in `fit`.

    The counts are non-trainable float32 state, zeroed whenever Keras resets
    metrics (each epoch of `fit`), and appear in the logs of `fit` like any
    metric. Under a distribution strategy each replica counts on its own, and
    reading adds the replicas up: nothing is synchronized in the forward pass.

    Args:
        num_experts: int.
        detail: `"per_expert"` logs the load of every expert, `"summary"` the
            smallest and the largest, `"auto"` the former up to 8 experts.
    """

    def __init__(self, num_experts, detail="auto", **kwargs):
        super().__init__(dtype="float32", **kwargs)
        if detail not in DETAILS:
            raise ValueError(
                f"`statistics` must be None or one of {DETAILS}. "
                f"Received: statistics={detail!r}"
            )
        self.num_experts = num_experts
        if detail == "auto":
            few = num_experts <= MAX_EXPERTS_SHOWN
            detail = "per_expert" if few else "summary"
        self.detail = detail
        self.metric = _RoutingMetric(
            self._log_entries, self.reset, name="routing"
        )
        # Whether a step that ran, or was traced, since the last reset did
        # record: one of `evaluate` does not.
        self._recorded = False
        self._last_counts = None

    def build(self):
        # The path of the layer that this belongs to, since names repeat.
        self.prefix = "_".join(self.path.split("/")[:-1])
        self.expert_counts = self._add_counter(
            "expert_counts", self.num_experts
        )
        self.dropped_count = self._add_counter("dropped_count")
        self.entropy_sum = self._add_counter("entropy_sum")
        self.token_count = self._add_counter("token_count")
        self.built = True

    def _add_counter(self, name, *shape):
        # `add_weight` cannot ask for this synchronization. Any other would
        # let replicas drift apart, or wait for each other inside `call`.
        return keras.Variable(
            "zeros",
            shape=shape,
            dtype="float32",
            trainable=False,
            autocast=False,
            aggregation="sum",
            synchronization="on_read",
            name=name,
        )

    def _counters(self):
        return (
            self.expert_counts,
            self.dropped_count,
            self.entropy_sum,
            self.token_count,
        )

    def record(self, routing, group_sizes, mask=None, dropped=True):
        """Adds one call's routing to the counts.

        Args:
            routing: A `Routing`.
            group_sizes: `(E,)` int32. Rows of each expert after dropping.
            mask: `(T,)` bool, or `None`.
            dropped: bool. Whether any choice can have been dropped. Defaults to
                `True`.
        """
        self._recorded = True
        probs = ops.stop_gradient(zero_masked(routing.probs, mask))
        counts = kept = ops.cast(group_sizes, "float32")
        if dropped:
            counts = expert_counts(routing, self.num_experts, mask)
        num_tokens = ops.cast(ops.shape(probs)[0], "float32")
        if mask is not None:
            num_tokens = ops.sum(ops.cast(mask, "float32"))
        entropy = ops.cast(ops.sum(_entropy(probs)), "float32")
        _add(self.expert_counts, counts)
        _add(self.entropy_sum, entropy)
        _add(self.token_count, num_tokens)
        if dropped:
            _add(self.dropped_count, ops.sum(counts - kept))

    def reset(self):
        if not self.built:
            return
        if self._has_tokens():
            self._last_counts = self._read()
        self._recorded = False
        for counter in self._counters():
            counter.assign(ops.zeros(counter.shape, "float32"))

    def result(self):
        """What has been counted since the start of the epoch.

        After `fit`, the last epoch; `evaluate` and the validation of `fit`
        leave it as it is.

        Returns:
            dict of `expert_load`, a `(E,)` NumPy array with each expert's share
            of all assignments (they sum to 1); `dropped_fraction`, the share
            of assignments dropped for lack of capacity; `routing_entropy`, the
            mean entropy of the tokens' probabilities in nats (`log(E)` if they
            are uniform); `dead_experts`, the number of experts that got no
            token. `None` before any training step.
        """
        if self.built and not self._readable():
            raise RuntimeError(
                "On JAX the counts cannot be read while a step of `fit` runs. "
                "In a callback, reading `self.model` first makes them readable."
            )
        counts = self._last_counts
        if self.built and self._has_tokens():
            counts = self._read()
        if counts is None:
            return None
        load, dropped, entropy, dead = _summarize(*counts)
        return {
            "expert_load": ops.convert_to_numpy(load),
            "dropped_fraction": float(dropped),
            "routing_entropy": float(entropy),
            "dead_experts": int(dead),
        }

    def _log_entries(self):
        """The entries for the logs of `fit`; none where nothing is counted.

        Keras asks twice: inside its compiled step, and at the end of the epoch,
        and takes the second answer if both have the same entries.
        """
        if not self.built:
            return {}
        counters = self._counters()
        recorded = self._recorded
        # While it runs, the JAX trainer takes the values out of the variables:
        # its steps show NaN, and the end of the epoch the right numbers.
        if self._readable():
            counts = [ops.convert_to_tensor(counter) for counter in counters]
            if not any(backend.is_symbolic(count) for count in counts):
                recorded = self._has_tokens()
        else:
            counts = [
                ops.full(counter.shape, float("nan"), "float32")
                for counter in counters
            ]
        if not recorded:
            return {}
        load, dropped, entropy, dead = _summarize(*counts)
        if self.detail == "per_expert":
            entries = {f"load_{e}": load[e] for e in range(self.num_experts)}
        else:
            entries = {"load_min": ops.min(load), "load_max": ops.max(load)}
        entries["dropped_fraction"] = dropped
        entries["routing_entropy"] = entropy
        entries["dead_experts"] = dead
        return {f"{self.prefix}_{name}": v for name, v in entries.items()}

    def _readable(self):
        return all(counter._value is not None for counter in self._counters())

    def _read(self):
        return [np.array(ops.convert_to_numpy(c)) for c in self._counters()]

    def _has_tokens(self):
        return float(ops.convert_to_numpy(self.token_count)) > 0


class _RoutingMetric(keras.metrics.Metric):
    """Shows what a layer counts as a metric, without variables of its own.

    Metric variables cannot be written in `call` on JAX. The two functions
    stand for the layer, which Keras would otherwise save as a part of its part.
    """

    def __init__(self, result, reset, name):
        super().__init__(name=name)
        self._result = result
        self._reset = reset

    @property
    def variables(self):
        return []

    def reset_state(self):
        self._reset()

    def update_state(self, *args, **kwargs):
        raise TypeError("Routing is recorded by the layer that routes.")

    def result(self):
        return self._result()


def _add(counter, increment):
    counter.assign(counter + increment)


def _entropy(probs):
    """Entropy of each token's probabilities, made to sum to one, `(T,)`."""
    probs = ops.cast(probs, "float32")
    probs = probs / ops.maximum(ops.sum(probs, axis=-1, keepdims=True), 1e-20)
    return -ops.sum(probs * ops.log(ops.maximum(probs, 1e-20)), axis=-1)


def _summarize(expert_counts, dropped_count, entropy_sum, token_count):
    assignments = ops.maximum(ops.sum(expert_counts), 1.0)
    return (
        expert_counts / assignments,
        dropped_count / assignments,
        entropy_sum / ops.maximum(token_count, 1.0),
        # Comparing this way gives NaN for NaN.
        ops.sum(1.0 - ops.minimum(expert_counts, 1.0)),
    )
