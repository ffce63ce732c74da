import keras
from keras import ops

from keras_moe.checks import as_units
from keras_moe.checks import check_int
from keras_moe.recommendation.layers.epnet import EPNet
from keras_moe.recommendation.layers.ppnet import PPNet
from keras_moe.recommendation.models.domains import check_num_domains
from keras_moe.recommendation.models.domains import known_of
from keras_moe.recommendation.models.recommender import Recommender
from keras_moe.recommendation.tasks.task_spec import without_towers


@keras.saving.register_keras_serializable("keras_moe")
class PEPNet(Recommender):
    """Scales the features by domain and the towers by user and item (PEPNet).

    ```
    e    = x * gate([domain, x])                        EPNet
    h[t] = relu(dense[t](h[t])) * gate[t]([prior, e]), ...   PPNet, h[t] = e
    p[t] = sigmoid(dense[t](h[t]))
    ```

    The layers are `keras_moe.layers.EPNet` and `keras_moe.layers.PPNet`. Their
    gates send no gradient back to `x` and `e`.

    Args:
        tasks: Sequence of `keras_moe.models.TaskSpec`, or names of binary
            tasks, which then have no hidden layers besides PPNet's.
        embedding: A `keras_moe.layers.FeatureEmbedding`, or another embedding,
            as in `keras_moe.models.MMoE`, that returns a dict of vectors.
        domain: Name, or sequence of names, of features that describe the
            domain; or the name of another integer input with values from `0`
            to `num_domains - 1`. An empty sequence leaves EPNet out.
        prior_features: Name, or sequence of names, of the features that
            describe the user and the item.
        num_domains: int. Number of domains, if `domain` is not a feature.
            Defaults to `None`.
        units: Sequence of ints. Widths of the layers of each tower. Defaults
            to `(64, 32)`.
        main_features: Name, or sequence of names, of the features that make up
            `x`. Defaults to `None`, all features.
        domain_gate_units: int. Width of the hidden layer of EPNet's gate.
            Defaults to `None`, the width of `x`.
        gate_units: int. Width of the hidden layers of PPNet's gates. Defaults
            to `None`, the width of the tensor that is gated.
        gate_place: `"output"` or `"input"`: which side of PPNet's layers is
            gated. Defaults to `"output"`.
        gate_reads: `"prior_and_inputs"`, as above, or `"prior"` alone. Defaults
            to `"prior_and_inputs"`.
        scale: float. Largest factor of all gates. Defaults to `2.0`.
        activation: Activation of the towers. Defaults to `"relu"`.
        normalization: `None`, `"batch"` or `"layer"`. Normalization in the
            towers. Defaults to `None`.
        heads: As in `keras_moe.models.MMoE`.
        inputs: As in `keras_moe.models.MMoE`.
        **kwargs: `name` and `trainable` of the model.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> data = {"tab": ["a", "b"], "user": ["x", "y"], "age": [31.0, 40.0]}
    >>> features = keras_moe.layers.FeatureEmbedding.from_data(data)
    >>> model = keras_moe.models.PEPNet(
    ...     ["click", "like"], features, domain="tab", prior_features=["user"])
    >>> tuple(model(features.encode(data))["like"].shape)
    (2, 1)

    Reference:

    - [Chang et al., 2023](https://arxiv.org/abs/2302.01115)
    """

    def __init__(
        self,
        tasks,
        embedding,
        domain,
        prior_features,
        num_domains=None,
        units=(64, 32),
        main_features=None,
        domain_gate_units=None,
        gate_units=None,
        gate_place="output",
        gate_reads="prior_and_inputs",
        scale=2.0,
        activation="relu",
        normalization=None,
        heads="towers",
        inputs=None,
        **kwargs,
    ):
        tasks = without_towers(tasks)
        check_num_domains(num_domains)
        if domain_gate_units is not None:
            check_int("domain_gate_units", domain_gate_units, 1)
        epnet = EPNet(domain_gate_units, scale, name="epnet")
        ppnet = PPNet(
            len(tasks),
            as_units("units", units),
            gate_units=gate_units,
            gate_place=gate_place,
            gate_reads=gate_reads,
            scale=scale,
            activation=activation,
            normalization=normalization,
            name="ppnet",
        )
        names = {
            "domain": domain,
            "prior_features": prior_features,
            "num_domains": num_domains,
            "main_features": main_features,
        }
        trunk = PEPNetTrunk(embedding, epnet, ppnet, **names)
        super().__init__(
            tasks,
            embedding,
            trunk,
            heads,
            inputs,
            arguments={
                **names,
                "units": ppnet.units,
                "domain_gate_units": domain_gate_units,
                "gate_units": gate_units,
                "gate_place": gate_place,
                "gate_reads": gate_reads,
                "scale": scale,
                "activation": activation,
                "normalization": normalization,
            },
            **kwargs,
        )


class PEPNetTrunk:
    """EPNet, then PPNet."""

    uses_vectors = True

    def __init__(
        self,
        embedding,
        epnet,
        ppnet,
        domain,
        prior_features,
        num_domains,
        main_features,
    ):
        self.embedding = embedding
        self.epnet = epnet
        self.ppnet = ppnet
        self.domain = [] if domain is None else as_names("domain", domain, 0)
        self.prior_features = as_names("prior_features", prior_features)
        self.num_domains = num_domains
        self.main_features = main_features
        if main_features is not None:
            self.main_features = as_names("main_features", main_features)

    def __call__(self, x, inputs, vectors):
        if self.main_features is not None:
            x = joined("main_features", vectors, self.main_features)
        if self.domain:
            known = known_of(
                self.domain, inputs, self.embedding, vectors, self.num_domains
            )
            x = self.epnet(x, known)
        return self.ppnet(
            x, joined("prior_features", vectors, self.prior_features)
        )


def as_names(argument, names, minimum=1):
    """A list of at least `minimum` names, from one or several."""
    given = [names] if isinstance(names, str) else names
    if (
        not isinstance(given, (list, tuple))
        or len(given) < minimum
        or not all(isinstance(name, str) for name in given)
    ):
        least = ", at least one" if minimum else ""
        raise ValueError(
            f"`{argument}` must be names of features{least}. "
            f"Received: {argument}={names!r}"
        )
    return list(given)


def joined(argument, vectors, names):
    """The vectors of some features as one tensor."""
    missing = [name for name in names if name not in vectors]
    if missing:
        raise ValueError(
            f"`{argument}` must be names of features; there are no features "
            f"{missing}. Received: {argument}={names}, "
            f"features={sorted(vectors)}"
        )
    chosen = [vectors[name] for name in names]
    return chosen[0] if len(chosen) == 1 else ops.concatenate(chosen, axis=-1)
