"""A model that several processes train, evaluate and save together."""

import contextlib
import os

import keras
from keras import ops

from keras_moe.backend.torch import collectives
from keras_moe.distribution.process_optimizer import ProcessOptimizer
from keras_moe.stacked import expert_shards


class ProcessModel:
    """Changes the methods of a model, which stays of its class.

    Args:
        model: A built model.
        engine: A `ProcessEngine`.
    """

    def __init__(self, model, engine):
        self._model, self._engine = model, engine
        self._optimizer = None
        check_same("model", _signature(model))
        self._share_values()
        self._leave_to_us()
        for name in (
            *("compile", "fit", "evaluate", "predict", "train_step"),
            *("compute_loss", "get_metrics_result", "save", "save_weights"),
            *("load_weights", "export"),
        ):
            own, of_model = getattr(self, name), getattr(model, name)
            setattr(model, name, _Changed(own, of_model))
        self._take_optimizer()

    def _share_values(self):
        """Gives equal variables equal values, and seeds different ones."""
        engine, whole, divided = self._engine, [], []
        for variable in self._model.variables:
            if _is_seed(variable):
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
        if optimizer is not None and self._optimizer is None:
            self._optimizer = ProcessOptimizer(
                optimizer, self._model, self._engine
            )

    def compile(self, of_model, *args, **kwargs):
        of_model(*args, **kwargs)
        if self._model.jit_compile:
            raise ValueError(
                "Steps of several processes are not compiled. "
                "Received: jit_compile=True"
            )
        self._optimizer = None
        self._take_optimizer()

    # Training.

    def fit(self, of_model, x=None, *args, **kwargs):
        check_same("data", _sizes(x, args, kwargs))
        if self._engine.process_index and len(args) < 4:
            kwargs["verbose"] = 0  # one progress bar will do
        history = of_model(x, *args, **kwargs)
        self._average_state()
        return history

    def evaluate(self, of_model, x=None, *args, **kwargs):
        check_same("data", _sizes(x, args, kwargs))
        if self._engine.process_index and len(args) < 3:
            kwargs["verbose"] = 0
        self._average_state()
        return of_model(x, *args, **kwargs)

    def predict(self, of_model, x, *args, **kwargs):
        check_same("data", _sizes(x, args, kwargs))
        if self._engine.process_index and len(args) < 2:
            kwargs["verbose"] = 0
        self._average_state()
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
        training=True,
    ):
        weights = self._weights_of_masked(y_pred, sample_weight)
        loss = of_model(x, y, y_pred, weights, training=training)
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
        with self._summed(self._counters()):
            return of_model()

    def _counters(self):
        """Variables that count what this process alone has seen."""
        found = [v for v in self._model.variables if _is_counter(v)]
        # From Keras 3.16 on, the model may add up its metrics itself.
        if getattr(self._model, "ddp_model", None) is None:
            for metric in self._model.metrics:
                found += [v for v in metric.variables if v.aggregation == "sum"]
        return list({id(v): v for v in found}.values())

    @contextlib.contextmanager
    def _summed(self, counters):
        """Inside, the variables have their sums over the processes."""
        before = [ops.copy(v.value) for v in counters]
        sums = collectives.add_up([ops.cast(b, "float64") for b in before])
        for variable, total in zip(counters, sums, strict=True):
            variable.assign(ops.cast(total, variable.dtype))
        try:
            yield
        finally:
            for variable, value in zip(counters, before, strict=True):
                variable.assign(value)

    def _average_state(self):
        """Moving averages, as of a batch normalization, see all examples.

        They are linear in what they average, so that once in a while will do.
        """
        state = [
            variable
            for variable in self._model.non_trainable_variables
            if "float" in variable.dtype
            and not _is_counter(variable)
            and expert_shards.mark_of(variable) is None
        ]
        sums = collectives.add_up([variable.value for variable in state])
        for variable, total in zip(state, sums, strict=True):
            variable.assign(total / self._engine.num_processes)

    # Files.

    def save(self, of_model, filepath, overwrite=True, **kwargs):
        self._write(of_model, filepath, overwrite, ".keras", kwargs)

    def save_weights(self, of_model, filepath, overwrite=True, **kwargs):
        self._write(of_model, filepath, overwrite, ".weights.h5", kwargs)

    def load_weights(self, of_model, filepath, *args, **kwargs):
        optimizer = self._model.optimizer
        if optimizer is not None and not optimizer.built:
            optimizer.build(self._model.trainable_variables)
        of_model(filepath, *args, **kwargs)
        if self._engine.process_index:
            for variable in self._model.variables:
                if _is_counter(variable):  # the first process has them
                    variable.assign(ops.zeros_like(variable.value))

    def export(self, of_model, *args, **kwargs):
        raise NotImplementedError(
            "A model whose experts are divided among processes cannot be "
            "exported: save it, load it in one process, and export that one."
        )

    def _write(self, of_model, filepath, overwrite, ending, kwargs):
        """Lets the first process write what all have."""
        filepath = os.fspath(filepath)
        if not filepath.endswith(ending) or any(
            kwargs.get(name) not in (None, True) for name in kwargs
        ):
            raise ValueError(
                f"A distributed model is saved in one file `*{ending}`. "
                f"Received: filepath={filepath}, {kwargs}"
            )
        self._average_state()
        shard, error = self._engine.shard, None
        values, sums = self._full_values()
        if self._engine.process_index == 0:
            shard.full_values = values
            try:
                with _replaced(sums):
                    _write_whole(of_model, filepath, overwrite)
            except Exception as caught:  # the others wait for the outcome
                error = caught
            finally:
                shard.full_values = None
        messages = collectives.gather_objects(error and repr(error))
        if error is not None:
            raise error
        if messages[0]:
            raise RuntimeError(
                f"The first process could not save the model: {messages[0]}"
            )

    def _full_values(self):
        """Whole banks by variable, and sums of counters, in the first process.

        Only the first expert group sends, and only the first process keeps.
        """
        engine, variables = self._engine, list(self._model.variables)
        optimizer = self._model.optimizer
        if optimizer is not None:
            self._optimizer.mark_state(optimizer)
            variables += optimizer.variables
        counters = [v for v in variables if _is_counter(v)]
        sums = collectives.add_up([variable.value for variable in counters])
        values = {}
        if engine.process_index < engine.num_expert_shards:
            for variable in variables:
                if expert_shards.mark_of(variable) is not None:
                    value = collectives.gather_to_first(
                        variable.value,
                        engine.num_expert_shards,
                        engine.expert_group,
                    )
                    if value is not None:
                        values[id(variable)] = ops.convert_to_numpy(value)
        return values, list(zip(counters, sums, strict=True))


class _Changed:
    """A method that is called with the one it replaces."""

    def __init__(self, method, of_model):
        self._method, self._of_model = method, of_model

    def __call__(self, *args, **kwargs):
        return self._method(self._of_model, *args, **kwargs)


def check_same(what, value):
    """Raises in all processes unless all have the same value."""
    if collectives.num_processes() == 1:
        return
    values = collectives.gather_objects(value)
    if any(other != values[0] for other in values):
        number = next(n for n, v in enumerate(values) if v != values[0])
        raise ValueError(
            f"All processes must have the same {what}. Received: "
            f"{_difference(values[0], values[number])} "
            f"in the processes 0 and {number}"
        )


def _difference(first, second):
    if isinstance(first, list) and isinstance(second, list):
        if len(first) == len(second):
            pairs = zip(first, second, strict=True)
            first, second = next(pair for pair in pairs if pair[0] != pair[1])
    return f"{first} and {second}"


def _signature(model):
    """What must be equal in all processes."""
    return [
        (
            tuple(variable.shape),
            variable.dtype,
            variable.trainable,
            expert_shards.mark_of(variable) is not None,
        )
        for variable in model.variables
    ]


def _sizes(x, args, kwargs):
    """Numbers of examples and of steps, as far as they are known."""
    kwargs = {
        name: value
        for name, value in kwargs.items()
        if isinstance(value, (int, float)) and name != "verbose"
    }
    try:
        number = len(x)
    except TypeError:
        number = None
    return [number, kwargs, [a for a in args if isinstance(a, int)]]


def _is_counter(variable):
    return variable.synchronization == "on_read"


def _is_seed(variable):
    return variable.path.endswith("seed_generator_state")


@contextlib.contextmanager
def _replaced(pairs):
    before = [ops.copy(variable.value) for variable, _ in pairs]
    for variable, value in pairs:
        variable.assign(value)
    try:
        yield
    finally:
        for (variable, _), value in zip(pairs, before, strict=True):
            variable.assign(value)


def _write_whole(write, filepath, overwrite):
    """Writes beside the file and then replaces it, so that one is whole."""
    if "://" in filepath:
        write(filepath, overwrite=overwrite)
        return
    if not overwrite and os.path.exists(filepath):
        raise FileExistsError(
            f"The file exists. Received: filepath={filepath}, overwrite=False"
        )
    folder, name = os.path.split(filepath)
    beside = os.path.join(folder, f".{os.getpid()}-{name}")
    try:
        write(beside)
        os.replace(beside, filepath)
    finally:
        if os.path.exists(beside):
            os.remove(beside)
