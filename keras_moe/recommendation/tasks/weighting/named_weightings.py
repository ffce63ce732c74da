import keras

from keras_moe.checks import as_keras_object
from keras_moe.recommendation.tasks.weighting.dynamic_weight_average import (
    DynamicWeightAverage,
)
from keras_moe.recommendation.tasks.weighting.famo import FAMO
from keras_moe.recommendation.tasks.weighting.geometric_loss import (
    GeometricLoss,
)
from keras_moe.recommendation.tasks.weighting.grad_norm import GradNorm
from keras_moe.recommendation.tasks.weighting.pc_grad import PCGrad
from keras_moe.recommendation.tasks.weighting.random_loss_weighting import (
    RandomLossWeighting,
)
from keras_moe.recommendation.tasks.weighting.static_weighting import (
    StaticWeighting,
)
from keras_moe.recommendation.tasks.weighting.task_weighting import (
    TaskWeighting,
)
from keras_moe.recommendation.tasks.weighting.uncertainty_weighting import (
    UncertaintyWeighting,
)

_NAMED = {
    "static": StaticWeighting,
    "uncertainty": UncertaintyWeighting,
    "dwa": DynamicWeightAverage,
    "rlw": RandomLossWeighting,
    "gls": GeometricLoss,
    "famo": FAMO,
    "gradnorm": GradNorm,
    "pcgrad": PCGrad,
}


def get(identifier):
    """A task weighting from its name, its config or itself.

    Raises:
        ValueError: If it is something else.
    """
    if isinstance(identifier, str) and identifier in _NAMED:
        return _NAMED[identifier]()
    if isinstance(identifier, dict):
        identifier = as_keras_object(
            "task_weighting",
            keras.saving.deserialize_keras_object,
            identifier,
        )
    if not isinstance(identifier, TaskWeighting):
        raise ValueError(
            f"`task_weighting` must be one of {tuple(_NAMED)} or a "
            "keras_moe.models.TaskWeighting. "
            f"Received: task_weighting={identifier!r}"
        )
    return identifier
