class RoutingLoss:
    """Base class of losses on routing decisions.

    A subclass computes a float32 scalar in `call(routing, mask=None)`. Called
    as a function, the loss returns that times its weight, which is what `MoE`
    adds to the model's loss in training.

    Args:
        weight: float. Factor of the loss, not negative.

    Raises:
        ValueError: If `weight` is negative.
    """

    def __init__(self, weight):
        if not weight >= 0:
            raise ValueError(
                f"`weight` must be at least 0. Received: weight={weight}"
            )
        self.weight = weight

    def __call__(self, routing, mask=None):
        return self.weight * self.call(routing, mask)

    def call(self, routing, mask=None):
        raise NotImplementedError(
            f"{type(self).__name__} must define `call(routing, mask=None)`."
        )

    def get_config(self):
        return {"weight": self.weight}

    @classmethod
    def from_config(cls, config):
        return cls(**config)
