"""The entries of all routed layers of a model in one line of logs.

Keras lists a model's metrics, asks each for its results, and joins their dicts;
later entries replace earlier ones of the same name. So each layer answers for
itself and all layers before it in the line, and the last answer is for the
whole model. A new line begins when Keras lists the metrics again, or asks a
layer a second time.
"""

import re
import threading

import numpy as np
from keras import ops


class LogLine(threading.local):
    """The line that is being written."""

    def __init__(self):
        self._begin()
        self._listed = False

    def _begin(self):
        self._members, self._labels, self._summaries = [], [], []

    def list(self):
        """Notes that Keras lists metrics, so that a new line follows."""
        self._listed = True

    def add(self, member, label, summary):
        """Adds a layer's figures to the line.

        Args:
            member: The layer that is asked.
            label: str. Prefix of the entries of this layer.
            summary: A `Summary`.

        Returns:
            `(name, entries)`: the label, numbered if an earlier layer of the
            line has the same one, and the entries for all layers so far.
        """
        if self._listed or any(other is member for other in self._members):
            self._begin()
            self._listed = False
        number = self._labels.count(label)
        self._members.append(member)
        self._labels.append(label)
        self._summaries.append(summary)
        name = f"{label}_{number}" if number else label
        return name, self._entries()

    def _entries(self):
        entries = {}
        for name, values in (
            ("max_violation", [s.max_violation for s in self._summaries]),
            (
                "dropped_fraction",
                [s.dropped_fraction for s in self._summaries if s.may_drop],
            ),
        ):
            if values:
                entries[f"routing_{name}"] = sum(values) / len(values)
            if len(values) > 1:
                entries[f"routing_{name}_worst"] = _largest(values)
        number = len(self._summaries)
        total = sum(s.entropy for s in self._summaries)
        entries["routing_entropy"] = total / number
        dead = sum(s.dead_experts for s in self._summaries)
        entries["routing_dead_experts"] = dead
        return entries


class Summary:
    """Figures of one layer, from its counts as arrays or tensors.

    Attributes:
        load: `(E,)`. Each expert's share of all choices; they sum to 1.
        max_violation: Largest load over the mean load, minus 1: 0 at perfect
            balance, `E - 1` if one expert gets all choices. MaxVio of Wang
            et al., 2024 (https://arxiv.org/abs/2408.15664), section 4.1.
        dropped_fraction: Share of the choices dropped for lack of capacity.
        entropy: Mean entropy of the tokens' probabilities, in nats.
        dead_experts: Number of experts that no token chose.
        may_drop: bool. Whether choices may be dropped at all.
    """

    def __init__(
        self, expert_counts, dropped_count, entropy_sum, token_count, may_drop
    ):
        lib = np if isinstance(expert_counts, np.ndarray) else ops
        choices = lib.maximum(lib.sum(expert_counts), 1.0)
        self.load = expert_counts / choices
        num_experts = expert_counts.shape[0]
        self.max_violation = lib.max(self.load) * num_experts - 1.0
        self.dropped_fraction = dropped_count / choices
        self.entropy = entropy_sum / lib.maximum(token_count, 1.0)
        # Computed like this, NaN stays NaN.
        self.dead_experts = lib.sum(1.0 - lib.minimum(expert_counts, 1.0))
        self.may_drop = may_drop

    def own_entries(self, detail):
        """The entries of this layer, without its name as a prefix."""
        if detail == "auto":
            return {}
        lib = np if isinstance(self.load, np.ndarray) else ops
        if detail == "per_expert":
            entries = {
                f"load_{e}": self.load[e] for e in range(self.load.shape[0])
            }
        else:
            entries = {
                "load_min": lib.min(self.load),
                "load_max": lib.max(self.load),
            }
        return {
            **entries,
            "dropped_fraction": self.dropped_fraction,
            "routing_entropy": self.entropy,
            "dead_experts": self.dead_experts,
        }


def _largest(values):
    if all(
        isinstance(value, (float, np.generic, np.ndarray)) for value in values
    ):
        return np.max(values)
    return ops.max(ops.stack(values))


def label_of(name):
    """The prefix of a layer's entries, without the running number of Keras.

    Names that users chose stay. Automatic names (`moe_7`) depend on how many
    layers the process made before.
    """
    return "moe" if re.fullmatch(r"moe(_\d+)?", name) else name
