"""Gradients, clipping and state of an optimizer over several processes."""

import keras
from keras import ops

from keras_moe.backend.torch import collectives
from keras_moe.distribution.process_state import mark_state
from keras_moe.stacked import expert_shards

# They divide by norms or means of whole variables.
WHOLE_VARIABLES = ("Adafactor", "Lamb", "Muon")


class ProcessOptimizer:
    """Makes an optimizer step as it would with the whole batch.

    Each process has the gradients of the mean loss over its part of the batch.
    Those of shared variables are averaged over all processes. Those of experts
    come from all processes of an expert group already, as sums.

    Args:
        optimizer: A `keras.optimizers.Optimizer`, changed in place.
        model: The model that it trains.
        engine: A `ProcessEngine`.
    """

    def __init__(self, optimizer, model, engine):
        self._model, self._engine = model, engine
        self._is_divided = []
        self._apply = optimizer.apply
        optimizer.apply = self.apply
        while True:
            _check(optimizer, engine)
            self._change(optimizer)
            inner = getattr(optimizer, "inner_optimizer", None)
            if inner is None:
                break
            self._change_scaling(optimizer)
            optimizer = inner

    def _change(self, optimizer):
        clip = optimizer._clip_gradients
        save, load = optimizer.save_own_variables, optimizer.load_own_variables

        def clip_gradients(grads):
            if optimizer.clipnorm or optimizer.global_clipnorm:
                return self._clip(optimizer, grads)
            return clip(grads)

        def save_own_variables(store):
            own, variables = {}, optimizer.variables
            save(own)
            for key, value in own.items():
                store[key] = expert_shards.to_file(variables[int(key)], value)

        def load_own_variables(store):
            variables = optimizer.variables
            mark_state(optimizer, self._model)
            if len(store.keys()) != len(variables):
                return load(store)  # which says so
            return load(
                {
                    key: expert_shards.from_file(
                        variables[int(key)], store[key]
                    )
                    for key in store.keys()
                }
            )

        optimizer._clip_gradients = clip_gradients
        optimizer.save_own_variables = save_own_variables
        optimizer.load_own_variables = load_own_variables

    def _change_scaling(self, optimizer):
        check_finite = optimizer.check_finite

        def all_finite(grads):
            # Each process sees other experts.
            finite = ops.cast(check_finite(grads), "float32")
            (number,) = collectives.add_up([finite])
            return number >= self._engine.num_processes

        optimizer.check_finite = all_finite

    def apply(self, grads, trainable_variables=None):
        variables = trainable_variables
        if variables is None:
            variables = self._model.trainable_variables
        grads = self._mean(list(grads), list(variables))
        self._is_divided = [
            expert_shards.mark_of(variable) is not None
            for variable, grad in zip(variables, grads, strict=True)
            if grad is not None
        ]
        return self._apply(grads, trainable_variables)

    def _mean(self, grads, variables):
        """The gradients of the mean loss of all processes."""
        engine = self._engine
        # A variable that one process did not use has a gradient of zero there.
        used = ops.convert_to_tensor([g is not None for g in grads], "float32")
        (used,) = collectives.add_up([used])
        used = ops.convert_to_numpy(used) > 0
        grads = [
            ops.zeros_like(variable.value) if u and g is None else g
            for u, g, variable in zip(used, grads, variables, strict=True)
        ]
        whole, divided = [], []
        for number, variable in enumerate(variables):
            if used[number]:
                mark = expert_shards.mark_of(variable)
                (whole if mark is None else divided).append(number)
        # From Keras 3.16 on, the model may average them itself.
        if getattr(self._model, "ddp_model", None) is None:
            self._add_up(grads, whole, None)
            self._divide(grads, whole)
        if engine.num_replicas > 1:
            self._add_up(grads, divided, engine.replica_group)
        self._divide(grads, divided)
        return grads

    def _add_up(self, grads, numbers, group):
        sums = collectives.add_up([grads[n] for n in numbers], group)
        for number, total in zip(numbers, sums, strict=True):
            grads[number] = total

    def _divide(self, grads, numbers):
        for number in numbers:
            grads[number] = grads[number] / self._engine.num_processes

    def _clip(self, optimizer, grads):
        """Clips by norms over the experts of all processes."""
        squares = [ops.sum(ops.square(ops.cast(g, "float32"))) for g in grads]
        divided = [
            n for n, is_divided in enumerate(self._is_divided) if is_divided
        ]
        if divided and self._engine.num_expert_shards > 1:
            (sums,) = collectives.add_up(
                [ops.stack([squares[n] for n in divided])],
                self._engine.expert_group,
            )
            for number, total in zip(divided, sums, strict=True):
                squares[number] = total
        if optimizer.clipnorm:
            limit, norms = optimizer.clipnorm, [ops.sqrt(s) for s in squares]
        else:
            limit = optimizer.global_clipnorm
            norms = [ops.sqrt(ops.sum(ops.stack(squares)))] * len(grads)
        return [
            g * ops.cast(limit / ops.maximum(norm, limit), g.dtype)
            for g, norm in zip(grads, norms, strict=True)
        ]


def _check(optimizer, engine):
    classes = tuple(
        getattr(keras.optimizers, name)
        for name in WHOLE_VARIABLES
        if hasattr(keras.optimizers, name)
    )
    if engine.num_expert_shards > 1 and isinstance(optimizer, classes):
        raise ValueError(
            "This optimizer computes with norms or means of whole variables, "
            "which no process has if experts are divided. Take one that works "
            "element by element, such as Adam. Received: "
            f"optimizer={type(optimizer).__name__}, "
            f"num_expert_shards={engine.num_expert_shards}"
        )
