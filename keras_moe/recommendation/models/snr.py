import keras

from keras_moe.recommendation.layers.sub_network_routing import (
    SubNetworkRouting,
)
from keras_moe.recommendation.models.layer_arguments import split_arguments
from keras_moe.recommendation.models.recommender import Recommender
from keras_moe.recommendation.models.routed_levels import RoutedLevels
from keras_moe.recommendation.tasks.task_spec import as_tasks


@keras.saving.register_keras_serializable("keras_moe")
class SNR(Recommender):
    """Levels of experts whose connections are learned on or off (SNR).

    ```
    v[0, i] = x                                     for each expert i
    u[l, i] = expert[l, i](v[l - 1, i])
    v[l, j] = sum over i of code[l, j, i] * u[l, i] @ kernel[l, j, i]
    y[t] = tower[t](v[last, t])
    ```

    An expert of the next level, or after the last a task, is a `j`. A code is
    between 0 and 1, drawn in training and fixed in inference, see
    `keras_moe.layers.SubNetworkRouting`. With `l0_weight` connections cost, and
    vanish where they are not worth it.

    Args:
        tasks: Sequence of `keras_moe.models.TaskSpec`, or names of binary
            tasks.
        embedding: What makes a vector of the features: a
            `keras_moe.layers.FeatureEmbedding`, an adapted
            `keras.utils.FeatureSpace`, or a layer called with the dict of
            inputs.
        num_levels: int. Number of levels of experts. Defaults to `2`.
        num_experts: int, or a sequence with an int for each level. Defaults to
            `4`.
        expert_units: Sequence of ints. Widths of the layers of each expert, in
            all levels; or a sequence with such a sequence for each level.
            Defaults to `(16,)`.
        routing_units: int, or `None`. Width of what the experts of the next
            level and the towers read (SNR-Trans). `None` for no kernels
            (SNR-Aver): the width is then the experts'. Defaults to `16`.
        expert_activation: Activation of each layer of the experts. Defaults to
            `"relu"`.
        expert_dropout: float. Dropout after each layer of the experts, in
            training. Defaults to `0.0`.
        heads: `"towers"`, `"esmm"`, `"aitm"` or a function
            `(list of tensors, tasks) -> {task: prediction}`. Defaults to
            `"towers"`.
        inputs: Dict of `keras.Input` by name, if `embedding` has no
            `inputs()`.
        **kwargs: Further arguments of `keras_moe.layers.SubNetworkRouting`
            (`l0_weight`, `temperature`, `stochastic`, ...), and `name` and
            `trainable` of the model.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> data = {"city": ["Rome", "Oslo", "Rome"], "age": [31.0, 40.0, 25.0]}
    >>> features = keras_moe.layers.FeatureEmbedding.from_data(data)
    >>> model = keras_moe.models.SNR(["click", "buy"], features, l0_weight=1e-4)
    >>> [codes.shape for codes in model.connections()]
    [(4, 4), (2, 4)]

    Reference:

    - [Ma et al., 2019](https://doi.org/10.1609/aaai.v33i01.3301216)
    """

    def __init__(
        self,
        tasks,
        embedding,
        num_levels=2,
        num_experts=4,
        expert_units=(16,),
        routing_units=16,
        expert_activation="relu",
        expert_dropout=0.0,
        heads="towers",
        inputs=None,
        **kwargs,
    ):
        tasks = as_tasks(tasks)
        fixed = ("num_outputs", "units")
        options, kwargs = split_arguments(SubNetworkRouting, kwargs, fixed)
        structure = {
            "num_levels": num_levels,
            "num_experts": num_experts,
            "expert_units": expert_units,
            "routing_units": routing_units,
            "expert_activation": expert_activation,
            "expert_dropout": expert_dropout,
        }
        trunk = RoutedLevels(len(tasks), options=options, **structure)
        super().__init__(
            tasks,
            embedding,
            trunk,
            heads,
            inputs,
            arguments={**structure, **options},
            **kwargs,
        )

    def connections(self):
        """How far each connection is on, in inference.

        Returns:
            List of NumPy arrays `(number of readers, number of experts)`, one
            a level: the readers are the experts of the next level, and after
            the last the tasks.
        """
        return [
            keras.ops.convert_to_numpy(layer.codes())
            for layer in self.layers
            if isinstance(layer, SubNetworkRouting)
        ]
