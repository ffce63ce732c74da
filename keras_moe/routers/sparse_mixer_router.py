import keras
from keras import ops

from keras_moe.checks import check_at_least
from keras_moe.ops.masking import zero_masked
from keras_moe.ops.noise import gumbel
from keras_moe.ops.routing import Routing
from keras_moe.ops.scores import rankable
from keras_moe.ops.scores import softmax
from keras_moe.ops.selection import take_chosen
from keras_moe.ops.selection import top_k_indices
from keras_moe.routers.eval_top_k import EvalTopK
from keras_moe.routers.linear_router import LinearRouter


@keras.saving.register_keras_serializable("keras_moe")
class SparseMixerRouter(EvalTopK, LinearRouter):
    """Samples experts one after the other, with a gradient for the choice.

    ```
    best     = max of logits, without the experts chosen so far
    near     = best - logits <= 2 * jitter_epsilon * max(|logits|, best)
    probs    = softmax of those logits, without the experts chosen so far
    expert   = sample from probs                training
             = argmax of probs                  inference
    weight   = probs[expert]
    ```

    This is done `top_k` times. The weights are not normalized together: each is
    a probability among the experts that the earlier choices left, so that their
    sum may be anything up to `top_k`.

    A router that learns from the weights of its choices alone is not told what
    another choice would have done. Sampling makes the expectation of the output
    differentiable. Heun's method of third order estimates its gradient, from
    the experts' derivative at 1 and at 1/3 of the weight:

    ```
    if expert is the argmax:     weight is handed on as it is
    else with probability 1/4:   weight is handed on as it is
    else:                        weight / 3 is handed on
    ```

    and in all three cases the gradient of what is handed on is taken for the
    gradient of `weight`. Thus a sampled output may be smaller than the expected
    one. In inference there is no sampling, and the weight stays as it is.

    Args:
        num_experts: int. Number of experts to choose from.
        top_k: int. Experts per token. Defaults to `2`.
        jitter_epsilon: float. How near to the best logit another one has to be
            to be sampled and to count in the softmax. Not to be confused with
            `jitter`, the noise of the inputs. Defaults to `0.01`.
        eval_top_k: int, or `None` for `top_k`. Experts per token in inference;
            see `keras_moe.conversion.set_eval_top_k`. Defaults to `None`.
        **kwargs: Arguments of `keras_moe.routers.LinearRouter`: `jitter`,
            `temperature`, `use_bias`, `normalize_inputs`, initializers, `seed`.

    Call arguments:
        tokens: Tensor of shape `(T, D)`.
        mask: Boolean tensor of shape `(T,)`, or `None`. Each token is routed on
            its own, and what masked ones hold reaches nothing.
        training: bool. Whether to sample.

    Input shape:
        `(T, D)`

    Output:
        A `keras_moe.routers.Routing` with `K = top_k`, in inference
        `eval_top_k`, and the experts in the order in which they were chosen.
        Its `probs` are the softmax of all logits, which is what a balancing
        loss needs; the weights are other numbers.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> router = keras_moe.routers.SparseMixerRouter(num_experts=4)
    >>> routing = router(keras.ops.ones((3, 8)), training=True)
    >>> tuple(routing.expert_indices.shape)
    (3, 2)

    Reference:

    - [Liu et al., 2023](https://arxiv.org/abs/2310.00811), section 3 (the
      estimator)
    - [Liu et al., 2024](https://arxiv.org/abs/2409.12136), section 2.1
      (sampling `top_k` experts, third order)
    """

    distinct_choices = True
    routing_class = Routing

    def __init__(
        self,
        num_experts,
        top_k=2,
        jitter_epsilon=0.01,
        eval_top_k=None,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        self.assign_top_k(top_k, eval_top_k)
        check_at_least("jitter_epsilon", jitter_epsilon, 0)
        self.jitter_epsilon = jitter_epsilon
        self.add_seed_generator()

    def call(self, tokens, mask=None, training=None):
        logits = self.logits(zero_masked(tokens, mask), training)  # (T, E)
        left = ops.ones_like(logits, dtype="bool")
        indices, weights = [], []
        for _ in range(self.num_choices(training)):
            expert, weight = self._choose(logits, left, training)  # (T, 1)
            left = ops.logical_and(
                left, ops.logical_not(_is_expert(expert, self.num_experts))
            )
            indices.append(expert)
            weights.append(weight)
        return Routing(
            logits,
            softmax(logits),
            ops.concatenate(indices, axis=-1),
            ops.concatenate(weights, axis=-1),
        )

    def _choose(self, logits, left, training):
        """The next expert and its weight, `(T, 1)` each."""
        values = rankable(ops.stop_gradient(logits))
        values = ops.where(left, values, float("-inf"))
        first = top_k_indices(values, 1)
        best = take_chosen(values, first)  # (T, 1)
        # Not a quotient: all of them may be 0.
        tolerance = 2 * self.jitter_epsilon
        tolerance = tolerance * ops.maximum(
            ops.abs(ops.stop_gradient(logits)), best
        )
        near = ops.logical_and(left, best - values <= tolerance)
        # The best one is near, even if it is NaN.
        near = ops.logical_or(near, _is_expert(first, self.num_experts))
        candidates = ops.where(near, logits, float("-inf"))
        probs = softmax(candidates)
        if not training:
            return first, take_chosen(probs, first)
        draws = gumbel(
            ops.shape(logits), self.compute_dtype, self.seed_generator
        )
        drawn = ops.where(near, rankable(candidates + draws), float("-inf"))
        expert = top_k_indices(drawn, 1)
        weight = take_chosen(probs, expert)
        draws = keras.random.uniform(
            ops.shape(weight),
            dtype=self.compute_dtype,
            seed=self.seed_generator,
        )
        whole = ops.logical_or(ops.equal(expert, first), draws > 0.75)
        third = ops.stop_gradient(weight) * (-2.0 / 3.0)
        return expert, weight + ops.where(whole, ops.zeros_like(third), third)

    def get_config(self):
        return {
            **super().get_config(),
            "jitter_epsilon": self.jitter_epsilon,
        }


def _is_expert(expert, num_experts):
    """`(T, 1)` -> `(T, E)` bool."""
    experts = ops.expand_dims(ops.arange(num_experts, dtype="int32"), 0)
    return ops.equal(experts, expert)
