import keras

from keras_moe.checks import is_int
from keras_moe.moe.model_config import deserialized
from keras_moe.moe.model_config import made_again
from keras_moe.moe.model_config import settings_of
from keras_moe.recommendation.tasks.assemble import assemble
from keras_moe.recommendation.tasks.multi_task_model import MultiTaskModel
from keras_moe.recommendation.tasks.training_arguments import check_data


class Recommender(MultiTaskModel):
    """The base class of the ready-made models.

    A model is its embedding, its trunk and its heads. A subclass makes the
    trunk from its arguments, which are saved.

    Args:
        tasks: Sequence of `keras_moe.models.TaskSpec`, or names of binary
            tasks.
        embedding: Turns the features into a vector: a
            `keras_moe.layers.FeatureEmbedding`, an adapted
            `keras.utils.FeatureSpace`, or a layer that is called with the dict
            of inputs.
        trunk: Function or layer, see `keras_moe.recommendation.tasks.assemble`.
            For `gate_weights` it has an attribute `gates`, a list with a dict
            `{unit: tensor (B, E)}` for each of its levels.
        heads: `"towers"`, `"esmm"`, `"aitm"` or a function
            `(list of tensors, tasks) -> {task: prediction}`.
        inputs: Dict of `keras.Input` by name, if `embedding` has no
            `inputs()`, or beside them: `{**embedding.inputs(), "domain":
            keras.Input((), dtype="int32", name="domain")}`.
        arguments: Dict of the other arguments of the subclass.
        **kwargs: Arguments of `keras.Model`.
    """

    def __init__(
        self,
        tasks,
        embedding,
        trunk,
        heads="towers",
        inputs=None,
        arguments=None,
        **kwargs,
    ):
        _check_embedding(embedding, inputs)
        graph = assemble(tasks, embedding, trunk, heads, inputs)
        super().__init__(**graph, **kwargs)
        self.heads = heads
        self._gates = list(getattr(trunk, "gates", ()))
        self._arguments = {
            "embedding": embedding,
            "heads": heads,
            "inputs": inputs,
            **(arguments or {}),
        }
        self._quantized = False

    @property
    def num_gate_levels(self):
        """Number of levels that `gate_weights` can read."""
        return len(self._gates)

    def gate_weights(self, x, level=-1, batch_size=None):
        """The weight that each task gives to each expert, for each example.

        Args:
            x: Features, as for `predict`. A stream must yield the features of
                the model and no others.
            level: int. Index of the level of experts. Defaults to `-1`, the
                last.
            batch_size: int. As for `predict`. Defaults to `None`, 32.

        Returns:
            Dict of NumPy arrays `(B, E)` by task, and by `"shared"` in levels
            whose shared unit has a gate. Experts are in the order of
            `keras_moe.layers.MultiGateMoE`: by task, the shared ones last. The
            weights of experts that a task does not see are 0.

        Raises:
            ValueError: If the model has no gates, or no such level.
        """
        number = self.num_gate_levels
        if not number:
            raise ValueError(f"A {type(self).__name__} has no gates to read.")
        if not is_int(level) or not -number <= level < number:
            raise ValueError(
                f"`level` must be an int from {-number} to {number - 1}: this "
                f"model has {number} levels of gates. Received: level={level!r}"
            )
        inputs, _ = self._graph
        check_data(self, x)
        if isinstance(inputs, dict):
            inputs = dict(inputs)
            if isinstance(x, dict):
                x = {name: x[name] for name in inputs}
        # Local, since Keras would save a model that is an attribute.
        gates = keras.Model(inputs, dict(self._gates[level]))
        return gates.predict(x, batch_size=batch_size, verbose=0)

    def quantize(self, *args, **kwargs):
        super().quantize(*args, **kwargs)
        self._quantized = True

    def save(self, *args, **kwargs):
        self._check_not_quantized()  # Before Keras opens the file.
        super().save(*args, **kwargs)

    def _check_not_quantized(self):
        if self._quantized:
            raise ValueError(
                f"The {type(self).__name__} {self.name!r} is quantized, and a "
                "model made from its config would not be. Export it; or save "
                "it before quantizing, and quantize the loaded model."
            )

    def get_config(self):
        self._check_not_quantized()
        config = {"tasks": list(self.tasks), **self._arguments}
        if config["inputs"] is not None:
            config["inputs"] = {
                # Keras would load a tensor as one that is not an input.
                name: {
                    "batch_shape": tuple(x.shape),
                    "dtype": x.dtype,
                    "sparse": x.sparse,
                }
                for name, x in config["inputs"].items()
            }
        # Serialized, or a copy of the model would share its embedding.
        return {
            "name": self.name,
            "trainable": self.trainable,
            **settings_of(self),
            **keras.saving.serialize_keras_object(config),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        arguments, settings = deserialized(config, custom_objects)
        if arguments.get("inputs") is not None:
            arguments["inputs"] = {
                name: keras.Input(**kwargs, name=name)
                for name, kwargs in arguments["inputs"].items()
            }
        return made_again(cls, arguments, settings)


def _check_embedding(embedding, inputs):
    if not callable(embedding):
        raise ValueError(
            "`embedding` must be a layer, a FeatureSpace, or a function of the "
            f"inputs. Received: embedding={embedding!r}"
        )
    tensors = keras.tree.flatten(inputs)
    if inputs is not None and not (
        tensors and all(isinstance(x, keras.KerasTensor) for x in tensors)
    ):
        raise ValueError(
            "`inputs` must be a dict of `keras.Input` by name, or None. "
            f"Received: inputs={inputs!r}"
        )
