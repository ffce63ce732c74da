import keras
from keras import ops

from keras_moe import backend
from keras_moe.checks import as_keras_object
from keras_moe.checks import check_int
from keras_moe.ops.grouped_matmul import check_implementation
from keras_moe.ops.grouped_matmul import grouped_matmul
from keras_moe.stacked import expert_shards
from keras_moe.stacked import per_expert


class Experts(keras.layers.Layer):
    """Base class of expert banks: rows grouped by expert in, rows out.

    A subclass makes its weights in `build(rows_shape)`, with a first axis of
    `num_experts` (`add_bank` does that), and computes in
    `call(rows, group_sizes, training=None)`. The first `group_sizes[0]` rows
    belong to expert 0, and so on. Rows after the last group (masked and dropped
    tokens) are not used, and may give any finite numbers.

    With the class attribute `uses_max_group_size = True`, `call` also takes
    `max_group_size`, an int or a scalar tensor that no group exceeds.

    Args:
        num_experts: int. Number of experts in the bank.
        kernel_initializer: Initializer of each expert's kernels, each drawn
            separately as a matrix. An initializer with a `seed` gets a
            different seed for each expert. A function is called once per
            expert, and should return different numbers each time. Defaults to
            `"glorot_uniform"`.
        bias_initializer: Initializer of each expert's biases. Defaults to
            `"zeros"`.
        kernel_regularizer: Regularizer of each expert's kernels, summed over
            the experts. Defaults to `None`.
        bias_regularizer: Regularizer of each expert's biases. Defaults to
            `None`.
        bank_regularizer: Regularizer of the kernels of all experts at once. It
            is called with each whole bank, `(E, D, F)`, for example to keep
            experts different. Defaults to `None`.
        kernel_constraint: Constraint of each expert's kernels. Defaults to
            `None`.
        bias_constraint: Constraint of each expert's biases. Defaults to
            `None`.
        implementation: Name of the grouped matmul to use, one of
            `keras_moe.ops.grouped_matmul_implementations()`. `None` takes the
            first that can run. Defaults to `None`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If `num_experts` is not a positive int, or
            `implementation` is not known on the backend.

    Example:

    ```python
    class LinearExperts(keras_moe.experts.Experts):
        def build(self, rows_shape):
            width = rows_shape[-1]
            self.kernel = self.add_bank("kernel", (width, width))

        def call(self, rows, group_sizes, training=None):
            return self.grouped_dense(rows, group_sizes, self.kernel)
    ```
    """

    uses_max_group_size = False
    # Whether a router chooses among them; the layer that has it says so. Shared
    # experts, which all tokens go through, stay whole on every device.
    routed = False
    # What computes divided experts, from where they were built.
    engine = None

    def __init__(
        self,
        num_experts,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        bank_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        implementation=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_int("num_experts", num_experts, 1)
        # A model may be loaded on another backend, and get another
        # implementation before it runs.
        check_implementation(implementation, backend.KNOWN_GROUPED_MATMULS)
        self.num_experts = num_experts
        for name, given in (
            ("kernel_initializer", kernel_initializer),
            ("bias_initializer", bias_initializer),
            ("kernel_regularizer", kernel_regularizer),
            ("bias_regularizer", bias_regularizer),
            ("bank_regularizer", bank_regularizer),
            ("kernel_constraint", kernel_constraint),
            ("bias_constraint", bias_constraint),
        ):
            setattr(self, name, as_part_of_bank(name, given))
        self.implementation = implementation
        self._num_banks = 0

    def add_bank(self, name, shape, kind="kernel", hidden_axis=None):
        """Adds the weights of all experts as one variable.

        Args:
            name: str. Name of the variable.
            shape: tuple. Shape of one expert's weights.
            kind: str. `"kernel"` uses `kernel_initializer`,
                `kernel_regularizer` and `kernel_constraint`, `"bias"` the
                same for biases. A subclass may add a kind `"a"` with an
                attribute `a_initializer`, and optionally `a_regularizer` and
                `a_constraint`. `bank_regularizer` applies to all kinds but
                `"bias"`. Defaults to `"kernel"`.
            hidden_axis: int. The axis of `shape` that is the hidden width,
                along which devices may divide an expert: the outputs of the
                parts add up. Defaults to `None`.

        Returns:
            A variable of shape `(num_experts,) + shape`. Where experts are
            divided among processes, the first axis is that of the own experts.
        """
        initializer = getattr(self, f"{kind}_initializer")
        regularizer = getattr(self, f"{kind}_regularizer", None)
        constraint = getattr(self, f"{kind}_constraint", None)
        of_bank = None if kind == "bias" else self.bank_regularizer
        num_experts = self.num_experts
        shard = expert_shards.active() if self.routed else None
        if shard is not None:
            start, stop = shard.bounds(num_experts)
            num_experts = stop - start
            self._check_divisible(shard, of_bank)
        self._num_banks += 1
        path = f"{self.path}/{name}" if self.routed else None
        if hidden_axis is not None:
            hidden_axis += 1
        with expert_shards.making_bank(path, hidden_axis):
            variable = self.add_weight(
                name=name,
                shape=(num_experts, *shape),
                initializer=per_expert.PerExpertInitializer(
                    initializer, self._num_banks, shard
                ),
                regularizer=(regularizer or of_bank)
                and per_expert.PerExpertRegularizer(
                    regularizer, of_bank, shard
                ),
                constraint=constraint
                and per_expert.PerExpertConstraint(constraint),
            )
        if self.routed:
            expert_shards.note_bank(variable, hidden_axis)
        if shard is not None:
            expert_shards.mark(variable, shard)
            self.engine = shard.engine
        return variable

    def _check_divisible(self, shard, of_bank):
        if shard.count > 1 and (of_bank or self.activity_regularizer):
            raise ValueError(
                "Experts that are divided among processes take no "
                "`bank_regularizer` and no `activity_regularizer`, which look "
                f"at all experts. Received: bank_regularizer={of_bank}, "
                f"activity_regularizer={self.activity_regularizer}"
            )

    def save_own_variables(self, store):
        own = {}
        super().save_own_variables(own)
        for key, value in own.items():
            store[key] = expert_shards.to_file(value, value)

    def load_own_variables(self, store):
        own = {}
        super().save_own_variables(own)  # which variable has which key
        super().load_own_variables(
            {
                key: expert_shards.from_file(own[key], store[key])
                if key in own
                else store[key]
                for key in store.keys()
            }
        )

    def grouped_dense(self, rows, group_sizes, kernel, bias=None):
        """`rows @ kernel[expert] + bias[expert]`.

        Args:
            rows: `(N, D)`, grouped by expert.
            group_sizes: `(E,)` int32.
            kernel: `(E, D, F)`.
            bias: `(E, F)`, or `None`.

        Returns:
            `(N, F)`.
        """
        out = grouped_matmul(rows, kernel, group_sizes, self.implementation)
        if bias is not None:
            # A product with ones, not a gather of the bias, so that the
            # gradient is a grouped sum and not a scatter-add.
            ones = ops.ones((ops.shape(rows)[0], 1), rows.dtype)
            # Without `implementation`, which may not take one column.
            out = out + grouped_matmul(
                ones, ops.expand_dims(bias, 1), group_sizes
            )
        return out

    def mix(self, tokens, row_weights, choices, group_sizes, training=None):
        """Dispatches, computes and combines in one step, if possible.

        The result is the same as of `dispatch`, a call and `combine`. It is
        faster if the backend has a kernel for these experts.

        Args:
            tokens: `(T, D)`.
            row_weights: `(N,)`.
            choices: `(N,)` int32. The `choices` of a `DispatchPlan`.
            group_sizes: `(E,)` int32. Rows of each expert.
            training: bool. Whether to apply dropout.

        Returns:
            `(T, ...)`, or `None` if the rows must be dispatched, as here.
        """
        return None

    def compute_output_shape(self, rows_shape, group_sizes_shape=None):
        return tuple(rows_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "bias_initializer": keras.initializers.serialize(
                self.bias_initializer
            ),
            "kernel_regularizer": keras.regularizers.serialize(
                self.kernel_regularizer
            ),
            "bias_regularizer": keras.regularizers.serialize(
                self.bias_regularizer
            ),
            "bank_regularizer": keras.regularizers.serialize(
                self.bank_regularizer
            ),
            "kernel_constraint": keras.constraints.serialize(
                self.kernel_constraint
            ),
            "bias_constraint": keras.constraints.serialize(
                self.bias_constraint
            ),
            "implementation": self.implementation,
        }


class PlainExperts(Experts):
    """Base of banks without kernels, which need only `num_experts`."""

    def __init__(self, num_experts, *, name=None, dtype=None, trainable=True):
        super().__init__(
            num_experts, name=name, dtype=dtype, trainable=trainable
        )

    def get_config(self):
        return {
            **keras.layers.Layer.get_config(self),
            "num_experts": self.num_experts,
        }


def as_part_of_bank(name, identifier):
    """The initializer, regularizer or constraint for an argument."""
    get = {
        "initializer": keras.initializers.get,
        "regularizer": keras.regularizers.get,
        "constraint": keras.constraints.get,
    }[name.rpartition("_")[2]]
    return as_keras_object(name, get, identifier)
