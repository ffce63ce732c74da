import keras
from keras import ops

from keras_moe.backend import jacobian
from keras_moe.recommendation.features.feature import layer_name


def gradient_products(model, *args):
    """Inner products of the gradients of all tasks' losses.

    Args:
        model: A compiled `MultiTaskModel`.
        *args: The arguments of its `train_step`: `(state, data)` on JAX,
            `(data,)` elsewhere.

    Returns:
        Tensor `(T, T)`.
    """
    *state, data = args
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    variables = list(model.trainable_variables)
    if state:  # On JAX the variables themselves are empty in a step.
        values, non_trainable = list(state[0][0]), state[0][1]
        mapping = list(
            zip(model.non_trainable_variables, non_trainable, strict=True)
        )
    else:
        values, mapping = [v.value for v in variables], []
    shared = [v for v in variables if id(v) in model._shared_ids]
    selected = {id(v) for v in model.task_weighting.select(variables, shared)}

    def losses(values):
        # Assignments in this scope are discarded, so that the step itself
        # starts from the same state and draws the same dropout masks.
        trained = zip(variables, values, strict=True)
        with keras.StatelessScope([*trained, *mapping]):
            y_pred = model(x, training=True)
            return model.weighted_losses(y, y_pred, sample_weight)[0]

    rows = []
    for row in jacobian(losses, values):
        gradients = [
            ops.reshape(ops.cast(gradient, "float32"), (-1,))
            for variable, gradient in zip(variables, row, strict=True)
            if id(variable) in selected
        ]
        rows.append(ops.concatenate(gradients))
    rows = ops.stack(rows)
    return ops.stop_gradient(ops.matmul(rows, ops.transpose(rows)))


def shared_variable_ids(model):
    """The ids of the variables of layers that more than one task uses.

    Variables of towers do not count, although the prediction of a task depends
    on other towers in ESMM, which multiplies predictions, and in AITM.
    """
    inputs, outputs = model._graph
    towers = tuple(
        layer_name(f"{task.name}_{part}")
        for task in model.tasks
        for part in ("tower_", "logits")
    )
    users = {}
    for output in outputs.values():
        for layer in keras.Model(inputs, output).layers:
            users.setdefault(layer, []).append(output)
    return frozenset(
        id(variable)
        for layer, of_layer in users.items()
        if len(outputs) == 1
        or (len(of_layer) > 1 and not layer.name.startswith(towers))
        for variable in layer.variables
    )
