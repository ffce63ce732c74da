"""The number of experts per token, in training and in inference.

Routers that choose by rank can use fewer (or more) experts in inference than
they were trained with. What Keras has compiled knows the number that there was
when it was traced, so a router does not let anyone assign another one:
`keras_moe.conversion.set_eval_top_k` sets it and has the model compiled anew.
"""

from keras_moe.checks import check_int_up_to


class FixedNumber:
    """An attribute of a router that is assigned once, as the router is made."""

    def __set_name__(self, owner, name):
        self.name = name
        self.key = f"_{name}"

    def __get__(self, router, owner=None):
        if router is None:
            return self
        if self.key not in vars(router):
            raise AttributeError(self.name)
        return vars(router)[self.key]

    def __set__(self, router, value):
        if self.key in vars(router):
            raise AttributeError(
                f"`{self.name}` cannot be assigned once the router is made: "
                "compiled functions would not see it. To change the number of "
                "experts per token in inference, call "
                "`keras_moe.conversion.set_eval_top_k(model, top_k)`. "
                f"Received: {self.name}={value!r}"
            )
        vars(router)[self.key] = value


class EvalTopK:
    """Mixin of routers with another number of experts in inference.

    A router calls `assign_top_k` as it is made, and makes
    `num_choices(training)` choices. `eval_top_k=None` stands for `top_k`.
    """

    top_k = FixedNumber()
    eval_top_k = FixedNumber()

    def assign_top_k(self, top_k, eval_top_k):
        self.check_top_k("top_k", top_k)
        self.check_eval_top_k(eval_top_k)
        self.top_k = top_k
        self.eval_top_k = eval_top_k

    def check_top_k(self, name, number):
        """Raises unless a token may have that many experts."""
        check_int_up_to(name, number, "num_experts", self.num_experts)

    def check_eval_top_k(self, eval_top_k):
        """Raises unless it may be the number of experts in inference."""
        if eval_top_k is not None:
            self.check_top_k("eval_top_k", eval_top_k)

    def num_choices(self, training):
        if training or self.eval_top_k is None:
            return self.top_k
        return self.eval_top_k

    def max_choices(self, eval_top_k):
        return max(self.top_k, eval_top_k or 0)

    @property
    def choices_per_token(self):
        return self.max_choices(self.eval_top_k)

    def replace_eval_top_k(self, eval_top_k):
        """Changes the number; what is compiled does not see it."""
        self.check_eval_top_k(eval_top_k)
        vars(self)[type(self).eval_top_k.key] = eval_top_k

    def get_config(self):
        return {
            **super().get_config(),
            "top_k": self.top_k,
            "eval_top_k": self.eval_top_k,
        }
