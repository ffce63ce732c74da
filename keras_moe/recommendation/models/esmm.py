import keras

from keras_moe.recommendation.models.mmoe import MMoE
from keras_moe.recommendation.tasks.task_spec import in_a_chain


@keras.saving.register_keras_serializable("keras_moe")
class ESMM(MMoE):
    """Probabilities of a chain of events, in the space of all examples (ESMM).

    ```
    p[t] = sigmoid(tower[t](mixture[t](x))) * p[sample space of t]
    ```

    with the mixtures of `keras_moe.models.MMoE`; the paper has towers on the
    features alone. The model predicts, and learns from all examples, the
    probability that something shown is clicked and bought. The factor, the
    probability of "bought if clicked", has no loss of its own; it is the output
    of the layer `<task>_conditional`.

    Args:
        tasks: Sequence of `keras_moe.models.TaskSpec`; at least one must have a
            `sample_space`. Names alone become a chain of binary tasks, each in
            the sample space of the one before.
        embedding: As in `keras_moe.models.MMoE`.
        num_experts: int. Number of experts. Defaults to `8`.
        expert_units: Sequence of ints. Widths of the layers of each expert.
            Defaults to `(16,)`.
        inputs: As in `keras_moe.models.MMoE`.
        **kwargs: As in `keras_moe.models.MMoE`.

    Raises:
        ValueError: If arguments are out of range or do not fit together, or no
            task has a sample space.

    Example:

    >>> data = {"city": ["Rome", "Oslo", "Rome"], "age": [31.0, 40.0, 25.0]}
    >>> features = keras_moe.layers.FeatureEmbedding.from_data(data)
    >>> model = keras_moe.models.ESMM(["click", "buy"], features)
    >>> p = model(features.encode(data))
    >>> bool(keras.ops.all(p["buy"] <= p["click"]))
    True

    Reference:

    - [Ma et al., 2018](https://arxiv.org/abs/1804.07931)
    """

    def __init__(
        self,
        tasks,
        embedding,
        num_experts=8,
        expert_units=(16,),
        inputs=None,
        **kwargs,
    ):
        super().__init__(
            in_a_chain(tasks),
            embedding,
            num_experts,
            expert_units,
            "esmm",
            inputs,
            **kwargs,
        )

    def get_config(self):
        config = super().get_config()
        del config["heads"]
        return config
