import keras

from keras_moe.experts import activations
from keras_moe.experts.experts import Experts


class FeedForwardExperts(Experts):
    """What `MLPExperts` and `GLUExperts` share: all but the hidden layer."""

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
        for name, dim in (
            ("intermediate_dim", intermediate_dim),
            ("output_dim", output_dim),
        ):
            optional = name == "output_dim"
            if (not isinstance(dim, int) or dim < 1) and not (
                optional and dim is None
            ):
                raise ValueError(
                    f"`{name}` must be a positive int"
                    f"{' or None' if optional else ''}. "
                    f"Received: {name}={dim!r}"
                )
        if not 0 <= dropout < 1:
            raise ValueError(
                "`dropout` must be at least 0 and below 1. "
                f"Received: dropout={dropout}"
            )
        self.intermediate_dim = intermediate_dim
        self.activation = activations.get(activation)
        self.use_bias = use_bias
        self.output_dim = output_dim
        self.dropout = dropout
        self.seed = seed
        # A seed generator is state that every call advances: none without use.
        if dropout > 0:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, rows_shape):
        if len(rows_shape) != 2 or rows_shape[-1] is None:
            raise ValueError(
                "The rows of experts must be of shape (N, D) with a static D. "
                f"Received: rows_shape={tuple(rows_shape)}"
            )
        self.build_hidden(rows_shape[-1])
        self.add_dense(
            "down", self.intermediate_dim, self.output_dim or rows_shape[-1]
        )

    def add_dense(self, name, input_dim, output_dim):
        """Makes `self.<name>_kernel` and, or `None`, `self.<name>_bias`."""
        kernel = self.add_bank(f"{name}_kernel", (input_dim, output_dim))
        bias = None
        if self.use_bias:
            bias = self.add_bank(f"{name}_bias", (output_dim,), kind="bias")
        setattr(self, f"{name}_kernel", kernel)
        setattr(self, f"{name}_bias", bias)

    def dense(self, name, rows, group_sizes):
        """The layer that `add_dense` made, for rows grouped by expert."""
        return self.grouped_dense(
            rows,
            group_sizes,
            getattr(self, f"{name}_kernel"),
            getattr(self, f"{name}_bias"),
        )

    def call(self, rows, group_sizes, training=None):
        hidden = self.hidden(rows, group_sizes)  # (N, F)
        if training and self.dropout > 0:
            hidden = keras.random.dropout(
                hidden, self.dropout, seed=self.seed_generator
            )
        return self.dense("down", hidden, group_sizes)

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
