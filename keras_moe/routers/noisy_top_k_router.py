from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_moe.checks import check_at_least
from keras_moe.checks import check_one_of
from keras_moe.checks import is_int
from keras_moe.checks import is_number
from keras_moe.ops.noise import expected_load
from keras_moe.routers.top_k_router import TopKRouter


class NoisyRouting(NamedTuple):
    """A `Routing` of a noisy router, with the load it expects.

    Fields:
        logits: `(T, E)`. Raw scores, without the noise.
        probs: `(T, E)`. Scores that the weights come from.
        expert_indices: `(T, K)` int32. The chosen experts.
        expert_weights: `(T, K)`. Their weights.
        load: `(T, E)`. The probability that the expert would be among the
            `top_k` if its noise were drawn anew; 0 or 1 without noise.
    """

    logits: Any
    probs: Any
    expert_indices: Any
    expert_weights: Any
    load: Any


@keras.saving.register_keras_serializable("keras_moe")
class NoisyTopKRouter(TopKRouter):
    """Sends each token to the `top_k` experts that are best under noise.

    ```
    noisy  = logits + stddev * normal               only in training
    stddev = softplus(tokens @ noise_kernel) + noise_epsilon
    ```

    or, with a number as `noise_stddev`, `stddev = noise_stddev`; and from there
    on as in `TopKRouter`. The noise makes the probability of each choice a
    smooth function of the logits, so that `keras_moe.losses.LoadLoss` can
    balance the load.

    Args:
        num_experts: int. Number of experts to choose from.
        top_k: int. Experts per token. Defaults to `2`.
        noise_stddev: `"learned"` for a width of the noise that depends on the
            token and the expert, or a positive float (V-MoE: `1 /
            num_experts`). Defaults to `"learned"`.
        noise_epsilon: float. Smallest width of the learned noise. Defaults to
            `1e-2`.
        load_threshold: What a noisy logit has to exceed to be chosen, as
            `load` counts it. `"exact"` is the `top_k`-th largest logit among
            the other experts (Shazeer et al.), `"shared"` among all experts
            (V-MoE). Defaults to `"exact"`.
        score_after_selection: bool. Defaults to `True`, the softmax over the
            chosen logits of the paper, for `top_k > 1`.
        kernel_initializer: Initializer of the kernel. Defaults to `"zeros"`
            with learned noise, so that training starts with equal loads.
        **kwargs: Arguments of `keras_moe.routers.TopKRouter`.

    Call arguments:
        tokens: Tensor of shape `(T, D)`.
        mask: Boolean tensor of shape `(T,)`, or `None`; as in `TopKRouter`.
        training: bool. Whether there is noise.

    Input shape:
        `(T, D)`

    Output:
        A `NoisyRouting`: a `Routing` with a field `load`.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> router = keras_moe.routers.NoisyTopKRouter(num_experts=4, top_k=2)
    >>> routing = router(keras.ops.ones((3, 8)), training=True)
    >>> tuple(routing.load.shape)
    (3, 4)

    Reference:

    - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), equations 3 to 5
      and appendix A
    - [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), appendix A
    """

    routing_class = NoisyRouting

    def __init__(
        self,
        num_experts,
        top_k=2,
        noise_stddev="learned",
        noise_epsilon=1e-2,
        load_threshold="exact",
        score_after_selection=None,
        kernel_initializer=None,
        **kwargs,
    ):
        learned = noise_stddev == "learned"
        if not learned and not (is_number(noise_stddev) and noise_stddev > 0):
            raise ValueError(
                "`noise_stddev` must be 'learned' or a positive number. "
                f"Received: noise_stddev={noise_stddev!r}"
            )
        check_at_least("noise_epsilon", noise_epsilon, 0)
        check_one_of("load_threshold", load_threshold, ("exact", "shared"))
        if score_after_selection is None:
            score_after_selection = is_int(top_k) and top_k > 1
        if kernel_initializer is None and learned:
            kernel_initializer = "zeros"
        super().__init__(
            num_experts,
            top_k,
            score_after_selection=score_after_selection,
            kernel_initializer=kernel_initializer,
            noise_stddev=0.0 if learned else noise_stddev,
            **kwargs,
        )
        if self.gumbel_noise or self.num_always_on or self.bias_kind:
            raise ValueError(
                "NoisyTopKRouter goes neither with `gumbel_noise` nor with "
                "`num_always_on` nor with `expert_bias`: its expected load "
                "would be wrong. Received: "
                f"gumbel_noise={self.gumbel_noise}, "
                f"num_always_on={self.num_always_on}, "
                f"expert_bias={self.bias_kind}"
            )
        self.learned_noise = learned
        self.noise_epsilon = noise_epsilon
        self.load_threshold = load_threshold
        self.add_seed_generator()

    def build_logits(self, dim):
        super().build_logits(dim)
        if self.learned_noise:
            self.noise_kernel = self.add_weight(
                name="noise_kernel",
                shape=(dim, self.num_experts),
                initializer="zeros",
            )

    def call(self, tokens, mask=None, training=None):
        logits = self.logits(tokens, training)  # (T, E)
        noisy, stddev = logits, 0.0
        if training:
            stddev = self._stddev(tokens) + ops.zeros_like(logits)
            noisy = logits + stddev * keras.random.normal(
                ops.shape(logits),
                dtype=self.compute_dtype,
                seed=self.seed_generator,
            )
        top_k = self.num_choices(training)
        load = expected_load(logits, noisy, stddev, top_k, self.load_threshold)
        return NoisyRouting(*self.route(logits, noisy, mask, training), load)

    def _stddev(self, tokens):
        if not self.learned_noise:
            return self.noise_stddev
        width = ops.einsum("td,de->te", tokens, self.noise_kernel)
        return ops.softplus(width) + self.noise_epsilon

    def get_config(self):
        noise_stddev = "learned" if self.learned_noise else self.noise_stddev
        return {
            **super().get_config(),
            "noise_stddev": noise_stddev,
            "noise_epsilon": self.noise_epsilon,
            "load_threshold": self.load_threshold,
        }
