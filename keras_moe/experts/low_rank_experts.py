import keras
from keras import ops

from keras_moe.checks import check_bool
from keras_moe.checks import is_int
from keras_moe.checks import is_number
from keras_moe.experts.experts import as_part_of_bank
from keras_moe.experts.glu_experts import GLUExperts
from keras_moe.experts.grouped_rows import clear_unused_rows
from keras_moe.ops.grouped_matmul import check_operands_of
from keras_moe.stacked import expert_shards
from keras_moe.stacked import per_expert


@keras.saving.register_keras_serializable("keras_moe")
class LowRankExperts(GLUExperts):
    """One feed-forward network with a low-rank correction for each expert.

    Each dense layer of the network, `gate`, `up` or `down`, is

    ```
    x @ kernel + bias + alpha / rank * (x @ lora_a[e]) @ lora_b[e]
    ```

    for a row `x` of expert `e`, in a network like `GLUExperts` or, with
    `gated=False`, like `MLPExperts`. All experts share the kernels and biases.
    An expert's full kernel is never made: a row costs one dense network and two
    thin products per layer.

    Each expert is the shared network fine-tuned with LoRA: the correction is
    inside the network, not added to its output. To fine-tune a dense network,
    assign its weights to `gate_kernel`, `up_kernel` and `down_kernel` and set
    `freeze_shared`. At the start `lora_b` is zero and every expert equals the
    shared network.

    Args:
        num_experts: int. Number of experts in the bank.
        intermediate_dim: int. Width of the hidden layer.
        rank: int. Width of the corrections. Defaults to `8`.
        alpha: float, or `None` for `rank`. The corrections are multiplied by
            `alpha / rank`. Defaults to `None`.
        gated: bool. Whether the hidden layer has a gate. Defaults to `True`.
        activation: As for `GLUExperts`. Defaults to `"silu"`.
        use_bias: bool. Whether the shared layers have a bias. Defaults to
            `False`.
        freeze_shared: bool. Whether the shared weights are frozen.
            Defaults to `False`.
        lora_a_initializer: Initializer of each expert's first matrices.
            Defaults to `"he_uniform"`.
        lora_b_initializer: Initializer of each expert's second matrices.
            Defaults to `"zeros"`.
        **kwargs: Arguments of `GLUExperts` (`limit` and `up_shift` need
            `gated`) and `keras_moe.experts.Experts`. Initializers,
            regularizers and constraints of kernels and biases apply to the
            shared weights; `bank_regularizer` is called with the corrections,
            `(E, D, rank)` and `(E, rank, F)`.

    Call arguments:
        rows: Tensor of shape `(N, D)`, the rows of expert 0 first.
        group_sizes: int32 tensor of shape `(E,)`. Rows of each expert.
        training: bool. Whether to apply dropout.

    Input shape:
        `(N, D)`

    Output shape:
        `(N, D)`, or `(N, output_dim)`.

    Weights:
        `up_kernel` `(D, F)`, `up_lora_a` `(E, D, rank)`, `up_lora_b` `(E,
        rank, F)`, the same for `gate` and, from `F` to `D`, for `down`, and
        with `use_bias` `up_bias` `(F,)` and so on.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> experts = keras_moe.experts.LowRankExperts(4, 16, rank=2)
    >>> rows = keras.ops.ones((5, 8))
    >>> tuple(experts(rows, keras.ops.array([3, 0, 2, 0], "int32")).shape)
    (5, 8)

    Reference:

    - [Hu et al., 2021](https://arxiv.org/abs/2106.09685), equation 3 (LoRA)
    - [Zadouri et al., 2023](https://arxiv.org/abs/2309.05444) (MoLoRA)
    - [Li et al., 2024](https://arxiv.org/abs/2404.15159) (MixLoRA: experts that
      are a shared feed-forward network with corrections inside)
    """

    def __init__(
        self,
        num_experts,
        intermediate_dim,
        rank=8,
        alpha=None,
        gated=True,
        activation="silu",
        use_bias=False,
        freeze_shared=False,
        lora_a_initializer="he_uniform",
        lora_b_initializer="zeros",
        **kwargs,
    ):
        super().__init__(
            num_experts, intermediate_dim, activation, use_bias, **kwargs
        )
        if not is_int(rank) or rank < 1:
            raise ValueError(
                f"`rank` must be a positive int. Received: rank={rank!r}"
            )
        if alpha is not None and (not is_number(alpha) or alpha <= 0):
            raise ValueError(
                f"`alpha` must be positive or None. Received: alpha={alpha!r}"
            )
        check_bool("gated", gated)
        check_bool("freeze_shared", freeze_shared)
        if not gated and (self.limit is not None or self.up_shift):
            raise ValueError(
                "`limit` and `up_shift` need `gated=True`. Received: "
                f"gated={gated}, limit={self.limit}, up_shift={self.up_shift}"
            )
        self.hidden_layers = ("gate", "up") if gated else ("up",)
        self.rank = rank
        self.alpha = alpha
        self.gated = gated
        self.freeze_shared = freeze_shared
        for name, given in (
            ("lora_a_initializer", lora_a_initializer),
            ("lora_b_initializer", lora_b_initializer),
        ):
            setattr(self, name, as_part_of_bank(name, given))

    def join_hidden(self, *products):
        if self.gated:
            return super().join_hidden(*products)
        return self.activation(*products)

    def call(self, rows, group_sizes, training=None):
        # The shared products read unused rows too.
        rows = clear_unused_rows(rows, group_sizes)
        return super().call(rows, group_sizes, training)

    def add_dense(self, name, input_dim, output_dim):
        shapes = {"kernel": (input_dim, output_dim)}
        if self.use_bias:
            shapes["bias"] = (output_dim,)
        for kind, shape in shapes.items():
            weight = self._add_shared(f"{name}_{kind}", shape, kind)
            setattr(self, f"{name}_{kind}", weight)
        for kind, shape in (
            ("lora_a", (input_dim, self.rank)),
            ("lora_b", (self.rank, output_dim)),
        ):
            check_operands_of(
                self.implementation,
                (self.num_experts, *shape),
                self.compute_dtype,
            )
            bank = self.add_bank(f"{name}_{kind}", shape, kind=kind)
            setattr(self, f"{name}_{kind}", bank)

    def _add_shared(self, name, shape, kind):
        self._num_banks += 1
        # Like a bank of one expert, so that each name gets its own seed.
        draw = per_expert.PerExpertInitializer(
            getattr(self, f"{kind}_initializer"), stream=self._num_banks
        )
        weight = self.add_weight(
            name=name,
            shape=shape,
            initializer=lambda shape, dtype=None: draw((1, *shape), dtype)[0],
            regularizer=getattr(self, f"{kind}_regularizer"),
            constraint=getattr(self, f"{kind}_constraint"),
            trainable=not self.freeze_shared,
        )
        expert_shards.note_shared(weight)
        return weight

    def dense(self, name, rows, group_sizes):
        out = ops.einsum("nd,df->nf", rows, getattr(self, f"{name}_kernel"))
        if self.use_bias:
            out = out + getattr(self, f"{name}_bias")
        thin = self.grouped_dense(
            rows, group_sizes, getattr(self, f"{name}_lora_a")
        )  # (N, rank)
        correction = self.grouped_dense(
            thin, group_sizes, getattr(self, f"{name}_lora_b")
        )
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        return out + scale * correction

    def get_config(self):
        return {
            **super().get_config(),
            "rank": self.rank,
            "alpha": self.alpha,
            "gated": self.gated,
            "freeze_shared": self.freeze_shared,
            "lora_a_initializer": keras.initializers.serialize(
                self.lora_a_initializer
            ),
            "lora_b_initializer": keras.initializers.serialize(
                self.lora_b_initializer
            ),
        }
