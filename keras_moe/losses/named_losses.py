import keras

from keras_moe.losses.entropy_loss import EntropyLoss
from keras_moe.losses.importance_loss import ImportanceLoss
from keras_moe.losses.load_balancing_loss import LoadBalancingLoss
from keras_moe.losses.load_loss import LoadLoss
from keras_moe.losses.mutual_information_loss import MutualInformationLoss
from keras_moe.losses.router_z_loss import RouterZLoss

_NAMED = {
    "load_balancing": lambda: [LoadBalancingLoss()],
    "router_z": lambda: [RouterZLoss()],
    "importance": lambda: [ImportanceLoss()],
    "load": lambda: [LoadLoss()],
    "entropy": lambda: [EntropyLoss()],
    "mutual_information": lambda: [MutualInformationLoss()],
    "default": lambda: [LoadBalancingLoss(), RouterZLoss()],
}


def get(identifier):
    """A list of losses from a name, a config, a loss or a list of these.

    Args:
        identifier: `"load_balancing"`, `"router_z"`, `"importance"`, `"load"`,
            `"entropy"` or `"mutual_information"` for that loss as it is by
            default, `"default"` for the first two, `None` for none, a config
            dict of `keras.saving.serialize_keras_object`, a callable
            `(routing, mask) -> scalar`, or a list of these.

    Returns:
        A list of callables.

    Raises:
        ValueError: If a name is not known or an entry is not callable.

    Example:

    >>> [loss.weight for loss in keras_moe.losses.get("default")]
    [0.01, 0.001]
    """
    if identifier is None:
        return []
    if isinstance(identifier, (list, tuple)):
        return [loss for entry in identifier for loss in get(entry)]
    if isinstance(identifier, str) and identifier in _NAMED:
        return _NAMED[identifier]()
    if isinstance(identifier, dict):
        return [keras.saving.deserialize_keras_object(identifier)]
    if not callable(identifier) or isinstance(identifier, type):
        raise ValueError(
            f"`losses` must be made of {tuple(_NAMED)}, callables "
            "`(routing, mask) -> scalar`, or be None. "
            f"Received: losses={identifier!r}"
        )
    return [identifier]
