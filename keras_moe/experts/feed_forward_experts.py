import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_rate
from keras_moe.checks import is_int
from keras_moe.experts.experts import Experts
from keras_moe.ops import activations
from keras_moe.ops.fused_experts import fused_experts
from keras_moe.ops.grouped_matmul import check_operands_of


class FeedForwardExperts(Experts):
    """Base of `MLPExperts` and `GLUExperts`.

    A subclass defines `hidden_layers`, the names of the layers that take the
    rows, and `join_hidden`.
    """

    def __init__(
        self,
        num_experts,
        intermediate_dim,
        activation,
        use_bias,
        output_dim=None,
        dropout=0.0,
        seed=None,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        check_int("intermediate_dim", intermediate_dim, 1)
        if output_dim is not None and (
            not is_int(output_dim) or output_dim < 1
        ):
            raise ValueError(
                "`output_dim` must be a positive int or None. "
                f"Received: output_dim={output_dim!r}"
            )
        check_bool("use_bias", use_bias)
        check_rate("dropout", dropout)
        self.intermediate_dim = intermediate_dim
        self.activation = as_keras_object(
            "activation", activations.get, activation
        )
        self.use_bias = use_bias
        self.output_dim = output_dim
        self.dropout = dropout
        self.seed = seed
        # Only if used: a seed generator is state of the layer.
        if dropout > 0:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, rows_shape):
        if len(rows_shape) != 2 or rows_shape[-1] is None:
            raise ValueError(
                "The rows of experts must be of shape (N, D) with a static D. "
                f"Received: rows_shape={tuple(rows_shape)}"
            )
        for name in self.hidden_layers:
            self.add_dense(name, rows_shape[-1], self.intermediate_dim)
        self.add_dense(
            "down", self.intermediate_dim, self.output_dim or rows_shape[-1]
        )

    def add_dense(self, name, input_dim, output_dim):
        """Makes `self.<name>_kernel` and `self.<name>_bias`, or `None`."""
        check_operands_of(
            self.implementation,
            (self.num_experts, input_dim, output_dim),
            self.compute_dtype,
        )
        of_kernel = of_bias = None
        if self._is_by_unit():
            of_kernel, of_bias = (0, None) if name == "down" else (1, 0)
        kernel = self.add_bank(
            f"{name}_kernel", (input_dim, output_dim), hidden_axis=of_kernel
        )
        bias = None
        if self.has_bias(name):
            bias = self.add_bank(
                f"{name}_bias", (output_dim,), "bias", hidden_axis=of_bias
            )
        setattr(self, f"{name}_kernel", kernel)
        setattr(self, f"{name}_bias", bias)

    def has_bias(self, name):
        """Whether the layer of this name has a bias."""
        return self.use_bias

    def dense(self, name, rows, group_sizes):
        """Applies the layer that `add_dense` made to rows grouped by expert."""
        return self.grouped_dense(
            rows,
            group_sizes,
            getattr(self, f"{name}_kernel"),
            getattr(self, f"{name}_bias"),
        )

    def join_hidden(self, *products):
        """The hidden layer, from the outputs of each of `hidden_layers`."""
        raise NotImplementedError

    def call(self, rows, group_sizes, training=None):
        hidden = self.join_hidden(
            *(
                self.dense(name, rows, group_sizes)
                for name in self.hidden_layers
            )
        )  # (N, F)
        if training and self.dropout > 0:
            hidden = keras.random.dropout(
                hidden, self.dropout, seed=self.seed_generator
            )
        return self.dense("down", hidden, group_sizes)

    def mix(self, tokens, row_weights, choices, group_sizes, training=None):
        if not self._can_mix(training):
            return None
        layers = (*self.hidden_layers, "down")
        weights = [
            None
            if (weight := getattr(self, f"{name}_{kind}")) is None
            else ops.cast(weight, self.compute_dtype)
            for kind in ("kernel", "bias")
            for name in layers
        ]
        return fused_experts(
            ops.cast(tokens, self.compute_dtype),
            row_weights,
            choices,
            group_sizes,
            tuple(weights[: len(layers)]),
            tuple(weights[len(layers) :]),
            self.join_hidden,
        )

    def _is_by_unit(self):
        """Whether no hidden unit is known to depend on another one.

        Only then devices may divide the hidden width among them.
        """
        return (
            self._computes_as_usual()
            and getattr(type(self).join_hidden, "is_by_unit", False)
            and activations.is_elementwise(self.activation)
        )

    def _computes_as_usual(self):
        return all(
            getattr(type(self), name) is getattr(FeedForwardExperts, name)
            for name in ("call", "dense", "grouped_dense")
        )

    def _can_mix(self, training):
        # Overridden methods and other options are only respected by `call`.
        return (
            self._computes_as_usual()
            and self.implementation is None
            and activations.is_pure(self.activation)
            and not (training and self.dropout > 0)
            and self.activity_regularizer is None
        )

    def compute_output_shape(self, rows_shape, group_sizes_shape=None):
        return (*rows_shape[:-1], self.output_dim or rows_shape[-1])

    def get_config(self):
        return {
            **super().get_config(),
            "intermediate_dim": self.intermediate_dim,
            "activation": activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "output_dim": self.output_dim,
            "dropout": self.dropout,
            "seed": self.seed,
        }
