import keras

from keras_moe.checks import as_units
from keras_moe.recommendation.layers.aitm_transfer import AITMTransfer
from keras_moe.recommendation.models.layer_arguments import split_arguments
from keras_moe.recommendation.models.recommender import Recommender
from keras_moe.recommendation.tasks.heads import AITMHeads
from keras_moe.recommendation.tasks.task_spec import as_tasks


@keras.saving.register_keras_serializable("keras_moe")
class AITM(Recommender):
    """Towers of events in a sequence, each informed by the one before (AITM).

    ```
    h[t] = hidden layers of tower[t](bottom(x))
    z[t] = transfer(h[t], z[t - 1]),  z[0] = h[0]
    p[t] = sigmoid(dense[t](z[t]))
    loss = losses + calibration_weight * sum of mean(max(p[t] - p[t - 1], 0))
    ```

    with `keras_moe.layers.AITMTransfer` as `transfer`. All tasks predict their
    probability among everything that was shown, and are trained on all
    examples, unless the task has a `sample_space`.

    For the same towers on a mixture of experts, give another model
    `heads=keras_moe.models.AITMHeads()`.

    Args:
        tasks: Sequence of at least two `keras_moe.models.TaskSpec`, or names of
            binary tasks, in the order of the events. The last width in
            `tower_units` must be the same for all.
        embedding: As in `keras_moe.models.MMoE`.
        bottom_units: Sequence of ints. Widths of layers, with ReLU, that all
            towers share. Defaults to `()`, none, as in the paper.
        calibration_weight: float. Weight of the loss for events that are
            predicted as more probable than the event before. Must be 0 unless
            all tasks are binary. Defaults to `0.6`.
        inputs: As in `keras_moe.models.MMoE`.
        **kwargs: Arguments of `keras_moe.layers.AITMTransfer`, and `name` and
            `trainable` of the model.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> data = {"city": ["Rome", "Oslo", "Rome"], "age": [31.0, 40.0, 25.0]}
    >>> features = keras_moe.layers.FeatureEmbedding.from_data(data)
    >>> model = keras_moe.models.AITM(["click", "cart", "buy"], features)
    >>> tuple(model(features.encode(data))["buy"].shape)
    (3, 1)

    Reference:

    - [Xi et al., 2021](https://arxiv.org/abs/2105.08489)
    """

    def __init__(
        self,
        tasks,
        embedding,
        bottom_units=(),
        calibration_weight=0.6,
        inputs=None,
        **kwargs,
    ):
        tasks = as_tasks(tasks)
        if len(tasks) < 2:
            raise ValueError(
                "`tasks` must be at least two, in the order of the events. "
                f"Received: tasks={[task.name for task in tasks]}"
            )
        bottom_units = as_units("bottom_units", bottom_units, 0)
        options, kwargs = split_arguments(AITMTransfer, kwargs, ())
        transfer = AITMTransfer(name="transfer", **options)

        def bottom(x):
            for i, units in enumerate(bottom_units):
                name = f"bottom_{i}"
                x = keras.layers.Dense(units, "relu", name=name)(x)
            return x

        super().__init__(
            tasks,
            embedding,
            bottom,
            AITMHeads(transfer, calibration_weight),
            inputs,
            arguments={
                "bottom_units": bottom_units,
                "calibration_weight": calibration_weight,
                **options,
            },
            **kwargs,
        )

    def get_config(self):
        config = super().get_config()
        del config["heads"]
        return config
