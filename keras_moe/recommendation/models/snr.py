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

    where `j` is an expert of the next level or, after the last level, a task.
    Codes are between 0 and 1, random in training and fixed in inference, see
    `keras_moe.layers.SubNetworkRouting`. `l0_weight` puts a price on
    connections, so that useless ones are switched off.

    Args:
        tasks: Sequence of `keras_moe.models.TaskSpec`, or names of binary
            tasks.
        embedding: Turns the features into a vector: a
            `keras_moe.layers.FeatureEmbedding`, an adapted
            `keras.utils.FeatureSpace`, or a layer that is called with the dict
            of inputs.
        num_levels: int. Number of levels of experts. Defaults to `2`.
        num_experts: int, or a sequence with an int for each level. Number of
            experts. Defaults to `4`.
        expert_units: Sequence of ints. Widths of the layers of each expert, in
            all levels; or a sequence of ints for each level.
            Defaults to `(16,)`.
        routing_units: int, or `None`. Output width of each routing (SNR-Trans).
            With `None` there are no kernels, and the width stays (SNR-Aver).
            Defaults to `16`.
        expert_activation: Activation of each layer of the experts. Defaults to
            `"relu"`.
        expert_dropout: float. Rate of the dropout after each layer of the
            experts, in training. Defaults to `0.0`.
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
        """The codes in inference: 0 for off, 1 for on.

        Returns:
            List of NumPy arrays `(readers, experts)`, one for each level. The
            readers are the experts of the next level, or the tasks after the
            last.
        """
        return [
            keras.ops.convert_to_numpy(layer.codes())
            for layer in self.layers
            if isinstance(layer, SubNetworkRouting)
        ]
