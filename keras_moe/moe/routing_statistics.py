import keras
import numpy as np
from keras import ops

from keras_moe import backend
from keras_moe.checks import check_one_of
from keras_moe.moe.log_line import LogLine
from keras_moe.moe.log_line import Summary
from keras_moe.moe.log_line import label_of
from keras_moe.ops.masking import zero_masked
from keras_moe.ops.routing import expert_counts

DETAILS = ("auto", "summary", "per_expert")
_LINE = LogLine()


class RoutingStatistics(keras.layers.Layer):
    """Counts what a router does in training, and shows it in `fit`.

    The counts are non-trainable float32 state, zeroed whenever Keras resets
    metrics (each epoch of `fit`), and appear in the logs of `fit` like any
    metric. Where several devices train together, they are those of all. Under a
    TensorFlow strategy each replica counts on its own, and reading adds the
    replicas up; on PyTorch, processes add up what they count.

    The logs of a model have these entries, whatever the number of its layers:

    - `routing_max_violation`: largest load of an expert over the mean load,
      minus 1, averaged over the layers; 0 at perfect balance.
    - `routing_max_violation_worst`: the same of the worst layer, if there are
      several.
    - `routing_dropped_fraction` and `routing_dropped_fraction_worst`: share of
      the choices dropped for lack of capacity, if there is a capacity.
    - `routing_entropy`: mean entropy of the tokens' probabilities in nats.
    - `routing_dead_experts`: experts that no token chose, over all layers.

    Args:
        num_experts: int.
        detail: `"auto"` for these; `"summary"` adds the layer's own
            `load_min` and `load_max`, `"per_expert"` its `load_0` ..., both its
            `dropped_fraction`, `routing_entropy` and `dead_experts`, each
            behind the layer's name. Layers whose name Keras chose are `moe`,
            `moe_1`, ... in their order in the model. Defaults to `"auto"`.
        may_drop: bool. Whether choices may be dropped in training. Defaults to
            `True`.
        label: str. The name of the layer that routes. Defaults to `"moe"`.
    """

    def __init__(
        self, num_experts, detail="auto", may_drop=True, label="moe", **kwargs
    ):
        super().__init__(dtype="float32", **kwargs)
        check_one_of("statistics", detail, DETAILS)
        self.num_experts = num_experts
        self.detail = detail
        self.may_drop = may_drop
        self.label = label_of(label)
        self.metric = _RoutingMetric(
            self._log_entries, self.reset, name=f"{label}_routing"
        )
        # Whether a step since the last reset recorded counts: by running, or by
        # being traced, which later steps repeat.
        self._recorded = False
        self._was_traced = False
        self._last_counts = None

    def build(self):
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

    def record(self, routing, group_sizes, mask=None):
        """Adds one call's routing to the counts.

        Args:
            routing: A `Routing`.
            group_sizes: `(E,)` int32. Rows of each expert after dropping.
            mask: `(T,)` bool, or `None`.
        """
        probs = ops.stop_gradient(zero_masked(routing.probs, mask))
        counts = kept = ops.cast(group_sizes, "float32")
        if self.may_drop:
            counts = expert_counts(routing, self.num_experts, mask)
        num_tokens = ops.cast(ops.shape(probs)[0], "float32")
        if mask is not None:
            num_tokens = ops.sum(ops.cast(mask, "float32"))
        entropy = ops.cast(ops.sum(_entropy(probs)), "float32")
        _add(self.expert_counts, counts)
        _add(self.entropy_sum, entropy)
        _add(self.token_count, num_tokens)
        if self.may_drop:
            _add(self.dropped_count, ops.sum(counts - kept))
        self._recorded = True
        self._was_traced = self._was_traced or backend.is_symbolic(counts)

    def reset(self):
        if not self.built:
            return
        if self._has_tokens():
            self._last_counts = self._read()
        self._recorded = False
        for counter in self._counters():
            counter.assign(ops.zeros(counter.shape, "float32"))

    def load_own_variables(self, store):
        super().load_own_variables(store)
        # The epoch that was saved: the next one must not add to it.
        self._recorded = self._readable() and self._has_tokens()

    @property
    def metrics(self):
        """The metric, while there is something to show: not in `evaluate`."""
        _LINE.list()
        return [self.metric] if self._is_shown() else []

    def result(self):
        """The figures since the start of the epoch.

        After `fit`, the last epoch; `evaluate` and the validation of `fit`
        leave it as it is.

        Returns:
            dict of `expert_load`, a `(E,)` NumPy array with each expert's share
            of all choices (they sum to 1); `max_violation`, the largest load
            over the mean load, minus 1; `dropped_fraction`, the share of
            choices dropped for lack of capacity; `routing_entropy`, the mean
            entropy of the tokens' probabilities in nats (`log(E)` if they are
            uniform); `dead_experts`, the number of experts that got no token.
            `None` before any training step.

        Raises:
            RuntimeError: If a step of `fit` runs, on JAX.
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
        summary = Summary(*counts, self.may_drop)
        return {
            "expert_load": summary.load,
            "max_violation": float(summary.max_violation),
            "dropped_fraction": float(summary.dropped_fraction),
            "routing_entropy": float(summary.entropy),
            "dead_experts": int(summary.dead_experts),
        }

    def _is_shown(self):
        if self._recorded or not (self.built and self._was_traced):
            return self._recorded
        # Compiled steps record without coming through `record`.
        return (
            self._readable()
            and not backend.is_symbolic(ops.convert_to_tensor(self.token_count))
            and self._has_tokens()
        )

    def _log_entries(self):
        """The entries for a line of logs.

        Keras asks twice: inside its compiled step, and at the end of the epoch,
        and takes the second answer if both have the same entries.
        """
        if not self._is_shown():
            return {}
        summary = Summary(*self._visible_counts(), self.may_drop)
        name, entries = _LINE.add(self, self.label, summary)
        own = summary.own_entries(self.detail)
        return {**entries, **{f"{name}_{key}": x for key, x in own.items()}}

    def _visible_counts(self):
        # While the JAX trainer runs, it takes the values out of the variables:
        # steps show NaN, and the end of the epoch the right numbers.
        if not self._readable():
            return [
                np.full(counter.shape, np.nan, "float32")
                for counter in self._counters()
            ]
        counts = [
            ops.convert_to_tensor(counter) for counter in self._counters()
        ]
        if any(backend.is_symbolic(count) for count in counts):
            return counts
        return self._read()

    def _readable(self):
        return all(counter._value is not None for counter in self._counters())

    def _read(self):
        return [np.array(counter.numpy()) for counter in self._counters()]

    def _has_tokens(self):
        return float(self.token_count.numpy()) > 0


class _RoutingMetric(keras.metrics.Metric):
    """Shows the counts of a layer as a metric, without its own variables.

    Metric variables cannot be written in `call` on JAX. The metric gets two
    functions, not the layer, which Keras would save as a part of the metric.
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
        """Does nothing: the layer recorded the counts in its call.

        Training loops that hand labels and predictions to all metrics call it.
        """

    def result(self):
        return self._result()


def _add(counter, increment):
    counter.assign(counter + backend.sum_over_processes(increment))


def _entropy(probs):
    """Entropy of each token's probabilities, made to sum to one, `(T,)`."""
    probs = ops.cast(probs, "float32")
    probs = probs / ops.maximum(ops.sum(probs, axis=-1, keepdims=True), 1e-20)
    return -ops.sum(probs * ops.log(ops.maximum(probs, 1e-20)), axis=-1)
