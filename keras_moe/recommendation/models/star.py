import keras
from keras import ops

from keras_moe.checks import as_units
from keras_moe.checks import check_bool
from keras_moe.recommendation.features.feature import layer_name
from keras_moe.recommendation.layers.partitioned_normalization import (
    PartitionedNormalization,
)
from keras_moe.recommendation.layers.star_dense import STARDense
from keras_moe.recommendation.models.domains import check_domain
from keras_moe.recommendation.models.domains import domain_of
from keras_moe.recommendation.models.domains import named_feature
from keras_moe.recommendation.models.domains import one_hot
from keras_moe.recommendation.models.recommender import Recommender
from keras_moe.recommendation.tasks.task_spec import without_towers


@keras.saving.register_keras_serializable("keras_moe")
class STAR(Recommender):
    """One network for several domains, with weights that each domain scales.

    ```
    h    = partitioned normalization(x)                 for domain d
    h    = relu(h @ (kernel * domain_kernel[d]) + bias + domain_bias[d]), ...
    p[t] = sigmoid(tower[t](h) + auxiliary(x)[t])
    ```

    The layers are `keras_moe.layers.PartitionedNormalization` and
    `keras_moe.layers.STARDense`. The auxiliary network takes the domain to the
    logits directly. All domains share the layer from `h` to the logits; in the
    paper each domain scales it too.

    Args:
        tasks: Sequence of `keras_moe.models.TaskSpec`, or names of binary
            tasks, which then have no hidden layers in their towers.
        embedding: As in `keras_moe.models.MMoE`.
        domain: str. Name of a `keras_moe.layers.Categorical` feature, or of
            another integer input with values from `0` to `num_domains - 1`.
            Each id of the feature is a domain, and so are unknown and missing
            values. For an example whose domain is out of range, `h` is 0.
        num_domains: int. Number of domains, unless `domain` is a
            `Categorical`. Defaults to `None`.
        units: Sequence of ints. Widths of the layers. Defaults to `(64, 32)`.
        normalization: bool. Whether to normalize by the statistics of each
            domain. Defaults to `True`.
        auxiliary_units: Sequence of ints, or `None`. Widths of the hidden
            layers of the auxiliary network, which reads the features, and the
            domain if it is not a feature. With `None` there is no auxiliary
            network. Defaults to `(32,)`.
        heads: As in `keras_moe.models.MMoE`, but a function is called as
            `(list of tensors, tasks, {task: logits to add})` if there is an
            auxiliary network.
        inputs: As in `keras_moe.models.MMoE`.
        **kwargs: `name` and `trainable` of the model.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> data = {"shop": ["fr", "it", "fr"], "age": [31.0, 40.0, 25.0]}
    >>> features = keras_moe.layers.FeatureEmbedding.from_data(data)
    >>> model = keras_moe.models.STAR(["click"], features, domain="shop")
    >>> tuple(model(features.encode(data))["click"].shape)
    (3, 1)

    Reference:

    - [Sheng et al., 2021](https://arxiv.org/abs/2101.11427)
    """

    def __init__(
        self,
        tasks,
        embedding,
        domain,
        num_domains=None,
        units=(64, 32),
        normalization=True,
        auxiliary_units=(32,),
        heads="towers",
        inputs=None,
        **kwargs,
    ):
        tasks = without_towers(tasks)
        check_domain(domain, num_domains)
        check_bool("normalization", normalization)
        arguments = {
            "domain": domain,
            "num_domains": num_domains,
            "units": as_units("units", units),
            "normalization": normalization,
            "auxiliary_units": auxiliary_units,
        }
        if auxiliary_units is not None:
            auxiliary_units = as_units("auxiliary_units", auxiliary_units, 0)
            arguments["auxiliary_units"] = auxiliary_units
        trunk = StarTrunk(tasks, embedding, **arguments)
        super().__init__(
            tasks, embedding, trunk, heads, inputs, arguments, **kwargs
        )


class StarTrunk:
    """Layers that each domain scales, and the auxiliary logits."""

    uses_inputs = True

    def __init__(
        self,
        tasks,
        embedding,
        domain,
        num_domains,
        units,
        normalization,
        auxiliary_units,
    ):
        self.tasks = tasks
        self.embedding = embedding
        self.domain = domain
        self.num_domains = num_domains
        self.units = units
        self.normalization = normalization
        self.auxiliary_units = auxiliary_units
        self.logits = None

    def __call__(self, x, inputs):
        domain, number = domain_of(
            inputs, self.embedding, self.domain, self.num_domains
        )
        if self.auxiliary_units is not None:
            self.logits = self._auxiliary(x, domain, number)
        if self.normalization:
            x = PartitionedNormalization(number, name="normalization")(
                x, domain
            )
        for i, units in enumerate(self.units):
            layer = STARDense(number, units, "relu", name=f"star_{i}")
            x = layer(x, domain)
        return x

    def _auxiliary(self, x, domain, number):
        if named_feature(self.embedding, self.domain) is None:
            x = ops.concatenate([x, one_hot(domain, number)], axis=-1)
        for i, units in enumerate(self.auxiliary_units):
            name = f"auxiliary_{i}"
            x = keras.layers.Dense(units, "relu", name=name)(x)
        return {
            task.name: keras.layers.Dense(
                task.output_dim, name=layer_name(f"{task.name}_auxiliary")
            )(x)
            for task in self.tasks
        }
