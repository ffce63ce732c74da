import keras

from keras_moe.recommendation.models.domain_experts import DomainExperts
from keras_moe.recommendation.models.recommender import Recommender
from keras_moe.recommendation.tasks.task_spec import as_tasks


@keras.saving.register_keras_serializable("keras_moe")
class M3oE(Recommender):
    """Shared experts, experts of domains and experts of tasks (M3oE).

    ```
    h    = star_mlp(star(x, d)) + skip_mlp(x)            d the domain of x
    z[t] = sum_e softmax(stop_gradient(h) @ gate[d, t])[e] * expert[e](h)
           + domain_weight * balanced(domain_experts(h))[d]
           + task_weight * balanced(task_experts(h))[t]
    balanced(f)[n] = balance * f[n]
                     + (1 - balance) * mean over the other m of f[m]
    y[t] = tower[t](z[t])
    ```

    `star` is a `keras_moe.layers.STARDense`. Each layer of an `mlp` or an
    expert is dense, layer normalization, ReLU. The two weights and the two
    balances are sigmoids of learned scalars, see
    `keras_moe.layers.BalancedExperts`.

    The paper's code differs in two ways: it has a tower for each pair of a
    domain and a task, where this model has one for each task, so that all
    `heads` fit; and it offers other ways to learn the scalars.

    Args:
        tasks: Sequence of `keras_moe.models.TaskSpec`, or names of binary
            tasks.
        embedding: Turns the features into a vector: a
            `keras_moe.layers.FeatureEmbedding`, an adapted
            `keras.utils.FeatureSpace`, or a layer that is called with the dict
            of inputs.
        domain: str. Name of a `keras_moe.layers.Categorical` feature, or of
            another integer input with values from `0` to `num_domains - 1`.
            Each id of the feature is a domain, and so are unknown and missing
            values.
        num_domains: int. Number of domains, unless `domain` is a
            `Categorical`. Defaults to `None`.
        num_experts: int. Experts shared by all domains and tasks. Defaults to
            `4`.
        star_units: Sequence of at least two ints: the width of `star`, and
            the widths of the layers of `star_mlp`; the last is also the width
            of `skip_mlp`. Defaults to `(64, 32)`.
        expert_units: Sequence of ints. Widths of the layers of each expert of
            all three kinds. Defaults to `(16,)`.
        normalization: `"layer"`, `"batch"` or `None`. Normalization in each
            `mlp` and expert. Defaults to `"layer"`.
        dropout: float. Rate of the dropout after each layer of an `mlp` or
            expert, in training. Defaults to `0.0`.
        stop_gate_gradients: bool. Whether to stop the gradients from the gates
            to their input `h`. Defaults to `True`.
        seed: int, or `None`. Seed of the dropout. Defaults to `None`.
        heads: `"towers"`, `"esmm"`, `"aitm"` or a function
            `(list of tensors, tasks) -> {task: prediction}`. Defaults to
            `"towers"`.
        inputs: Dict of `keras.Input` by name, if `embedding` has no
            `inputs()`.
        **kwargs: `name` and `trainable` of the model.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    `gate_weights` returns the gate of each task in the domain of the example:

    >>> data = {"city": ["Rome", "Oslo", "Rome"], "age": [31.0, 40.0, 25.0]}
    >>> features = keras_moe.layers.FeatureEmbedding.from_data(data)
    >>> model = keras_moe.models.M3oE(["click", "buy"], features, domain="city")
    >>> model.gate_weights(features.encode(data))["buy"].shape
    (3, 4)

    Reference:

    - [Zhang et al., 2024](https://arxiv.org/abs/2404.18465)
    """

    def __init__(
        self,
        tasks,
        embedding,
        domain,
        num_domains=None,
        num_experts=4,
        star_units=(64, 32),
        expert_units=(16,),
        normalization="layer",
        dropout=0.0,
        stop_gate_gradients=True,
        seed=None,
        heads="towers",
        inputs=None,
        **kwargs,
    ):
        tasks = as_tasks(tasks)
        arguments = {
            "num_experts": num_experts,
            "star_units": star_units,
            "expert_units": expert_units,
            "normalization": normalization,
            "dropout": dropout,
            "stop_gate_gradients": stop_gate_gradients,
            "seed": seed,
        }
        domains = {"domain": domain, "num_domains": num_domains}
        super().__init__(
            tasks,
            embedding,
            DomainExperts(tasks, embedding, **domains, **arguments),
            heads,
            inputs,
            arguments={**domains, **arguments},
            **kwargs,
        )
