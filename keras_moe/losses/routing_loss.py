from keras_moe.checks import check_at_least


class RoutingLoss:
    """Base class of losses on routing decisions.

    A subclass computes a float32 scalar in `call(routing, mask=None)`. Called
    as a function, the loss returns that times its weight, which is what `MoE`
    adds to the model's loss in training.

    Where several devices train together, `call` gets the tokens of its own
    device, and training averages over the devices. Every loss of this library
    counts the whole batch: its means come from
    `keras_moe.ops.masked_mean(values, mask, all_reduce=True)`.

    `call` takes more if a subclass says so in class attributes:

    - `uses_sequences = True`: `num_sequences`. The `T` tokens are that many
      sequences of equal length, one after the other.
    - `uses_context = True`: `context`, the context of the layer, `(T, ...)` or
      `None`.

    Args:
        weight: float. Factor of the loss, not negative.

    Raises:
        ValueError: If `weight` is negative or not finite.
    """

    uses_sequences = False
    uses_context = False

    def __init__(self, weight):
        check_at_least("weight", weight, 0)
        self.weight = weight

    def __call__(self, routing, mask=None, num_sequences=1, context=None):
        kwargs = {}
        if self.uses_sequences:
            kwargs["num_sequences"] = num_sequences
        if self.uses_context:
            kwargs["context"] = context
        return self.weight * self.call(routing, mask, **kwargs)

    def check_router(self, router):
        """Raises if the loss cannot be computed from what the router returns.

        `MoE` calls it as it is made. By default nothing is checked.

        Args:
            router: A `keras_moe.routers.Router`.
        """

    def call(self, routing, mask=None):
        raise NotImplementedError(
            f"{type(self).__name__} must define `call(routing, mask=None)`."
        )

    def get_config(self):
        return {"weight": self.weight}

    @classmethod
    def from_config(cls, config):
        return cls(**config)
