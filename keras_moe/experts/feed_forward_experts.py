import keras

from keras_moe.experts.experts import Experts


class FeedForwardExperts(Experts):
    """What `MLPExperts` and `GLUExperts` share: all but the hidden layer."""

    def __init__(
        self,
        num_experts,
        intermediate_dim,
        activation,
        use_bias,
        dropout=0.0,
        seed=None,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        if not isinstance(intermediate_dim, int) or intermediate_dim < 1:
            raise ValueError(
                "`intermediate_dim` must be a positive int. "
                f"Received: intermediate_dim={intermediate_dim!r}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(
                "`dropout` must be at least 0 and below 1. "
                f"Received: dropout={dropout}"
            )
        self.intermediate_dim = intermediate_dim
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
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
        self.down_kernel, self.down_bias = self.add_dense(
            "down", self.intermediate_dim, rows_shape[-1]
        )

    def add_dense(self, name, input_dim, output_dim):
        """Adds `<name>_kernel` and, with `use_bias`, `<name>_bias`."""
        kernel = self.add_bank(f"{name}_kernel", (input_dim, output_dim))
        bias = None
        if self.use_bias:
            bias = self.add_bank(f"{name}_bias", (output_dim,), kind="bias")
        return kernel, bias

    def call(self, rows, group_sizes, training=None):
        hidden = self.hidden(rows, group_sizes)  # (N, F)
        if training and self.dropout > 0:
            hidden = keras.random.dropout(
                hidden, self.dropout, seed=self.seed_generator
            )
        return self.grouped_dense(
            hidden, group_sizes, self.down_kernel, self.down_bias
        )

    def get_config(self):
        return {
            **super().get_config(),
            "intermediate_dim": self.intermediate_dim,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "dropout": self.dropout,
            "seed": self.seed,
        }
