"""A model that several processes train, evaluate and save together."""

import keras
from keras import ops

from keras_moe.backend.torch import collectives
from keras_moe.distribution.process_files import ProcessFiles
from keras_moe.distribution.process_optimizer import ProcessOptimizer
from keras_moe.distribution.process_state import check_same
from keras_moe.distribution.process_state import is_seed
from keras_moe.distribution.process_state import replace_methods
from keras_moe.distribution.process_state import signature
from keras_moe.stacked import expert_shards


class ProcessModel:
    """Changes the methods of a model, which stays of its class.

    Args:
        model: A built model.
        engine: A `ProcessEngine`.
    """

    def __init__(self, model, engine):
        self._model, self._engine = model, engine
        self.optimizer = None
        check_same("model", signature(model))
        self._share_values()
        self._leave_to_us()
        replace_methods(
            model,
            self,
            *("compile", "fit", "evaluate", "predict", "train_step"),
            *("compute_loss", "get_metrics_result"),
        )
        ProcessFiles(model, engine, self)
        self._take_optimizer()

    def _share_values(self):
        """Gives equal variables equal values, and seeds different ones."""
        engine, whole, divided = self._engine, [], []
        for variable in self._model.variables:
            if is_seed(variable):
                # Other tokens, other noise.
                first = ops.convert_to_numpy(variable.value).copy()
                first[0] += engine.process_index
                variable.assign(first)
            elif expert_shards.mark_of(variable) is None:
                whole.append(variable)
            else:
                divided.append(variable)
        collectives.broadcast(whole, 0)
        if engine.num_replicas > 1:
            collectives.broadcast(
                divided, engine.shard.index, engine.replica_group
            )

    def _leave_to_us(self):
        """From Keras 3.16 on, a model would average the experts as well."""
        divided = {
            id(variable.value)
            for variable in self._model.variables
            if expert_shards.mark_of(variable) is not None
        }
        ignored = [
            name
            for name, value in self._model.named_parameters()
            if id(value) in divided
        ]
        self._model._ddp_params_and_buffers_to_ignore = ignored

    def _take_optimizer(self):
        optimizer = getattr(self._model, "optimizer", None)
        if optimizer is not None and self.optimizer is None:
            self._check_compiled()
            self.optimizer = ProcessOptimizer(
                optimizer, self._model, self._engine
            )

    def compile(self, of_model, *args, **kwargs):
        of_model(*args, **kwargs)
        self.optimizer = None
        self._take_optimizer()

    def _check_compiled(self):
        if self._model.jit_compile:
            raise ValueError(
                "The steps of several processes are not compiled. "
                "Received: jit_compile=True"
            )
        losses = keras.tree.flatten(self._model.loss)
        if any(getattr(loss, "reduction", None) == "sum" for loss in losses):
            raise ValueError(
                "Losses are averaged over processes: take the reduction "
                "'sum_over_batch_size'. Received: reduction='sum'"
            )

    # Training.

    def fit(self, of_model, x=None, *args, **kwargs):
        check_same("data", _sizes(x, args, kwargs))
        if self._engine.process_index and len(args) < 4:
            kwargs["verbose"] = 0  # one progress bar will do
        history = of_model(x, *args, **kwargs)
        self.average_state()
        return history

    def evaluate(self, of_model, x=None, *args, **kwargs):
        check_same("data", _sizes(x, args, kwargs))
        if self._engine.process_index and len(args) < 3:
            kwargs["verbose"] = 0
        self.average_state()
        return of_model(x, *args, **kwargs)

    def predict(self, of_model, x, *args, **kwargs):
        check_same("data", _sizes(x, args, kwargs))
        if self._engine.process_index and len(args) < 2:
            kwargs["verbose"] = 0
        self.average_state()
        return of_model(x, *args, **kwargs)

    def train_step(self, of_model, data):
        with self._engine.linked():
            return of_model(data)

    def compute_loss(
        self,
        of_model,
        x=None,
        y=None,
        y_pred=None,
        sample_weight=None,
        **kwargs,
    ):
        weights = self._weights_of_masked(y_pred, sample_weight)
        loss = of_model(x, y, y_pred, weights, **kwargs)
        return self._engine.close_link(loss)

    def _weights_of_masked(self, y_pred, sample_weight):
        """Sample weights for losses over unmasked positions.

        Keras divides by the number in this process, and all processes count
        the same: those with more must weigh more.
        """
        outputs = keras.tree.flatten(y_pred)
        masks = [getattr(output, "_keras_mask", None) for output in outputs]
        if all(mask is None for mask in masks):
            return sample_weight
        weights = [None] * len(outputs)
        if sample_weight is not None:
            weights = keras.tree.flatten(sample_weight)
        for number, mask in enumerate(masks):
            if mask is not None:
                own = ops.sum(ops.cast(mask, "float32"))
                (total,) = collectives.add_up([own])
                weight = own * self._engine.num_processes
                weight = weight / ops.maximum(total, 1.0)
                # Of the shape of the mask, which Keras multiplies in place.
                weight = ops.broadcast_to(weight, mask.shape)
                if weights[number] is not None:
                    given = ops.cast(weights[number], "float32")
                    missing = (1,) * (len(mask.shape) - len(given.shape))
                    weight = weight * ops.reshape(
                        given, (*given.shape, *missing)
                    )
                weights[number] = ops.copy(weight)
        return keras.tree.pack_sequence_as(y_pred, weights)

    def get_metrics_result(self, of_model):
        """The metrics of what all processes have seen."""
        # From Keras 3.16 on, the model may add them up itself.
        if getattr(self._model, "ddp_model", None) is not None:
            return of_model()
        own = {
            id(variable): variable
            for metric in self._model.metrics
            for variable in metric.variables
            if variable.aggregation == "sum"
        }.values()
        before = [ops.copy(variable.value) for variable in own]
        sums = collectives.add_up([ops.cast(b, "float64") for b in before])
        _assign(own, sums)
        try:
            return of_model()
        finally:
            _assign(own, before)

    def average_state(self):
        """Moving averages, as of a batch normalization, see all examples.

        They are linear in what they average, so that once in a while will do.
        """
        state = [
            variable
            for variable in self._model.non_trainable_variables
            if "float" in variable.dtype
            and expert_shards.mark_of(variable) is None
        ]
        sums = collectives.add_up([variable.value for variable in state])
        for variable, total in zip(state, sums, strict=True):
            variable.assign(total / self._engine.num_processes)


def _assign(variables, values):
    for variable, value in zip(variables, values, strict=True):
        variable.assign(ops.cast(value, variable.dtype))


def _sizes(x, args, kwargs):
    """Numbers of examples and of steps, as far as they are known."""
    kwargs = {
        name: value
        for name, value in kwargs.items()
        if isinstance(value, (int, float)) and name != "verbose"
    }
    lengths = [
        len(part) if hasattr(part, "__len__") else None
        for part in keras.tree.flatten(x)
    ]
    return [lengths, kwargs, [a for a in args if isinstance(a, int)]]
