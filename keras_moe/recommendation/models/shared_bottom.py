import keras

from keras_moe.checks import as_units
from keras_moe.recommendation.models.layer_arguments import split_arguments
from keras_moe.recommendation.models.recommender import Recommender
from keras_moe.stacked.stacked_mlp import StackedMLP


@keras.saving.register_keras_serializable("keras_moe")
class SharedBottom(Recommender):
    """One network that all tasks share, and a tower for each: the baseline.

    ```
    y[t] = tower[t](bottom(x))
    ```

    Args:
        tasks: Sequence of `keras_moe.models.TaskSpec`, or names of binary
            tasks.
        embedding: Turns the features into a vector: a
            `keras_moe.layers.FeatureEmbedding`, an adapted
            `keras.utils.FeatureSpace`, or a layer that is called with the dict
            of inputs.
        bottom_units: Sequence of ints. Widths of the layers of the network.
            Defaults to `(64,)`.
        heads: `"towers"`, `"esmm"`, `"aitm"` or a function
            `(list of tensors, tasks) -> {task: prediction}`. Defaults to
            `"towers"`.
        inputs: Dict of `keras.Input` by name, if `embedding` has no
            `inputs()`.
        **kwargs: Further arguments of `keras_moe.layers.StackedMLP`
            (`activation`, `normalization`, `dropout`, ...), and `name` and
            `trainable` of the model.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> data = {"city": ["Rome", "Oslo", "Rome"], "age": [31.0, 40.0, 25.0]}
    >>> features = keras_moe.layers.FeatureEmbedding.from_data(data)
    >>> model = keras_moe.models.SharedBottom(["click", "buy"], features, (32,))
    >>> predictions = model.predict(features.encode(data), verbose=0)
    >>> predictions["buy"].shape
    (3, 1)

    Reference:

    - [Caruana, 1997](https://doi.org/10.1023/A:1007379606734)
    """

    def __init__(
        self,
        tasks,
        embedding,
        bottom_units=(64,),
        heads="towers",
        inputs=None,
        **kwargs,
    ):
        fixed = ("num_networks", "units", "output_units", "output_use_bias")
        options, kwargs = split_arguments(StackedMLP, kwargs, fixed)
        bottom_units = as_units("bottom_units", bottom_units)
        bottom = StackedMLP(1, bottom_units, name="bottom", **options)
        super().__init__(
            tasks,
            embedding,
            lambda x: bottom(x)[:, 0],
            heads,
            inputs,
            arguments={"bottom_units": bottom_units, **options},
            **kwargs,
        )
