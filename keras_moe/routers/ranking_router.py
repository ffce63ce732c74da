from keras import ops

from keras_moe import backend
from keras_moe.checks import check_at_least
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.checks import check_positive
from keras_moe.ops.noise import with_noise
from keras_moe.ops.routing import expert_counts
from keras_moe.routers.expert_bias import BIAS_KINDS
from keras_moe.routers.expert_bias import as_bias_update_rate
from keras_moe.routers.expert_bias import equalizing_bias
from keras_moe.routers.expert_bias import sign_change
from keras_moe.routers.linear_router import LinearRouter


class RankingRouter(LinearRouter):
    """Base class of routers that rank experts by noisy logits and a bias.

    ```
    logits = logits / temperature
    logits = logit_softcap * tanh(logits / logit_softcap)
    noisy  = logits + noise                         noise only in training
    ranked = score_activation(noisy) + expert_bias  or noisy + expert_bias
    ```

    The expert bias balances the load without a loss. It takes part in the
    choice alone, never in the weights. Each training step moves it, by one of
    two rules:

    ```
    "sign":     bias += rate * sign(mean(counts) - counts)
    "quantile": threshold[t] = the (top_k + 1)-th largest of ranked[t]
                target[e] = -(the (T * top_k // E + 1)-th largest over the
                              tokens of ranked[:, e] - bias[e] - threshold)
                bias += rate * (target - bias)
    ```

    Masked tokens do not count. Inference, and a router with
    `trainable=False`, leave the bias as it is.

    A subclass calls `self.logits(tokens, training)`,
    `self.noisy_logits(logits, training)`, `self.with_bias(ranked)`, `(T, E)`
    each, and when it has chosen, `self.balance(...)`.

    Args:
        num_experts: int. Number of experts to choose from.
        noise_stddev: float. Standard deviation of the normal noise added to
            the logits in training. Defaults to `0.0`.
        gumbel_noise: float. Factor of the Gumbel noise added to the logits in
            training. With 1 the best experts are a sample, without
            replacement, from the softmax of `logits`, whose sharpness
            `temperature` sets. Defaults to `0.0`.
        logit_softcap: float, or `None`. Bound of the logits, by a tanh.
            Defaults to `None`.
        expert_bias: `True` or `"scores"` adds a bias to the scores that are
            ranked, `"logits"` ranks logits plus bias. Defaults to `False`.
        bias_update: `"sign"`, or `"quantile"`, which finds the bias of equal
            loads at once and needs batches of many tokens. Defaults to
            `"sign"`.
        bias_update_rate: float. `rate`; 0 leaves the bias as it is. `None` is
            `1e-3` for `"sign"` and `1.0`, which forgets earlier batches, for
            `"quantile"`. Defaults to `None`.
        bias_update_centered: bool. Whether the mean of the steps is taken off
            them, so that the mean of the bias stays. Defaults to `False`.
        bias_update_steps: int. Calls that make one step of the bias: the
            `gradient_accumulation_steps` of the optimizer. Their counts are
            added up, their targets averaged. Defaults to `1`.
        **kwargs: Arguments of `keras_moe.routers.LinearRouter`: `jitter`,
            `temperature`, `use_bias`, `normalize_inputs`, initializers,
            regularizer, `seed`.

    Raises:
        ValueError: If an argument is out of range.

    Reference:

    - [Wang et al., 2024](https://arxiv.org/abs/2408.15664), algorithm 1
      (`"sign"`)
    - [Su, 2026](https://kexue.fm/archives/11619), as in
      [Megatron-LM](https://github.com/NVIDIA/Megatron-LM/pull/5349)
      (`"quantile"`)
    """

    def __init__(
        self,
        num_experts,
        noise_stddev=0.0,
        gumbel_noise=0.0,
        logit_softcap=None,
        expert_bias=False,
        bias_update="sign",
        bias_update_rate=None,
        bias_update_centered=False,
        bias_update_steps=1,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        check_at_least("noise_stddev", noise_stddev, 0)
        check_at_least("gumbel_noise", gumbel_noise, 0)
        if logit_softcap is not None:
            check_positive("logit_softcap", logit_softcap)
        check_one_of("expert_bias", expert_bias, BIAS_KINDS)
        check_bool("bias_update_centered", bias_update_centered)
        check_int("bias_update_steps", bias_update_steps, minimum=1)
        self.noise_stddev = noise_stddev
        self.gumbel_noise = gumbel_noise
        self.logit_softcap = logit_softcap
        self.bias_kind = expert_bias
        self.bias_update = bias_update
        self.bias_update_rate = as_bias_update_rate(
            bias_update_rate, bias_update
        )
        self.bias_update_centered = bias_update_centered
        self.bias_update_steps = bias_update_steps
        if noise_stddev > 0 or gumbel_noise > 0:
            self.add_seed_generator()

    def build(self, tokens_shape):
        super().build(tokens_shape)
        if not self.bias_kind:
            return
        self.expert_bias = self._add_state("expert_bias", self.num_experts)
        if self.bias_update_steps > 1:
            # Of the calls of a step: the counts, or the target biases.
            self.bias_counts = self._add_state("bias_counts", self.num_experts)
            self.bias_step = self._add_state("bias_step")

    def _add_state(self, name, *shape):
        # Every replica computes the same, from the tokens of all. With an
        # aggregation, TensorFlow would stop it here until all have come so far.
        return self.add_weight(
            name=name,
            shape=shape,
            initializer="zeros",
            trainable=False,
            aggregation="none",
        )

    def scale_logits(self, logits):
        logits = super().scale_logits(logits)
        if self.logit_softcap is not None:
            cap = self.logit_softcap
            logits = cap * ops.tanh(logits / cap)
        return logits

    def noisy_logits(self, logits, training):
        """The logits that the experts are chosen by, `(T, E)`."""
        if not training or not (self.noise_stddev or self.gumbel_noise):
            return logits
        return with_noise(
            logits, self.noise_stddev, self.gumbel_noise, self.seed_generator
        )

    def with_bias(self, ranked):
        """What the experts are ranked by, `(T, E)`, without a gradient."""
        if self.bias_kind:
            ranked = ranked + self.expert_bias
        return ops.stop_gradient(ranked)

    def balance(self, ranked, routing, top_k, mask, training):
        """Takes a step of the expert bias, if it is time for one.

        Args:
            ranked: `(T, C)`. What `C` experts were ranked by, before the bias.
            routing: The `keras_moe.routers.Routing` that came of it.
            top_k: int. Choices a token among these experts.
            mask: `(T,)` bool, or `None`.
            training: bool.
        """
        moves = self.bias_kind and self.bias_update_rate > 0
        if not (training and moves and self.trainable):
            return
        bias = ops.convert_to_tensor(self.expert_bias)
        candidates = ranked.shape[-1]
        found = self._found(ranked, bias[:candidates], routing, top_k, mask)
        found = ops.pad(found, [[0, self.num_experts - candidates]])
        if self.bias_update_steps == 1:
            change = self._bias_change(found, bias, candidates)
            self.expert_bias.assign(bias + change)
            return
        found = self.bias_counts + found
        step = self.bias_step + 1
        due = step >= self.bias_update_steps
        mean = found
        if self.bias_update == "quantile":  # of counts the sum will do
            mean = found / self.bias_update_steps
        change = self._bias_change(mean, bias, candidates)
        for state, if_due, otherwise in (
            (self.expert_bias, bias + change, bias),
            (self.bias_counts, ops.zeros_like(found), found),
            (self.bias_step, ops.zeros_like(step), step),
        ):
            state.assign(ops.where(due, if_due, otherwise))

    def _found(self, ranked, bias, routing, top_k, mask):
        """What one call says of the `C` experts: counts, or target biases."""
        if self.bias_update == "sign":
            counts = expert_counts(routing, self.num_experts, mask)
            found = backend.all_reduce_sum(counts)[: ranked.shape[-1]]
        else:
            found = equalizing_bias(
                ops.stop_gradient(ranked), bias, top_k, mask
            )
        return ops.cast(ops.stop_gradient(found), bias.dtype)

    def _bias_change(self, found, bias, candidates):
        """The step of the bias, `(E,)`; 0 beyond the candidates."""
        found = found[:candidates]
        if self.bias_update == "sign":
            change = sign_change(found)
        else:
            change = found - bias[:candidates]
        change = self.bias_update_rate * change
        if self.bias_update_centered:
            change = change - ops.mean(change)
        return ops.pad(change, [[0, self.num_experts - candidates]])

    def get_config(self):
        return {
            **super().get_config(),
            "noise_stddev": self.noise_stddev,
            "gumbel_noise": self.gumbel_noise,
            "logit_softcap": self.logit_softcap,
            "expert_bias": self.bias_kind,
            "bias_update": self.bias_update,
            "bias_update_rate": self.bias_update_rate,
            "bias_update_centered": self.bias_update_centered,
            "bias_update_steps": self.bias_update_steps,
        }
