"""The number of experts per token, in training and in inference.

Routers that choose by rank can use fewer (or more) experts in inference than
they were trained with. What Keras has compiled knows the number that there was
when it was traced, so a router does not let anyone assign another one:
`keras_moe.conversion.set_eval_top_k` sets it and has the model compiled anew.
"""


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


def num_choices(top_k, eval_top_k, training):
    """Experts per token, where `eval_top_k=None` stands for `top_k`."""
    return top_k if training or eval_top_k is None else eval_top_k


def has_eval_top_k(layer):
    """Whether it is a router with another number of experts in inference."""
    return isinstance(getattr(type(layer), "eval_top_k", None), FixedNumber)


def replace_eval_top_k(router, eval_top_k):
    """Changes the number, if the router's `check_eval_top_k` lets it pass."""
    router.check_eval_top_k(eval_top_k)
    vars(router)[type(router).eval_top_k.key] = eval_top_k
