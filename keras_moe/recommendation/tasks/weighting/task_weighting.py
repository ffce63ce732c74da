import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_moe")
class TaskWeighting(keras.layers.Layer):
    """Base class of task weightings, which combine the tasks' losses into one.

    It is a layer only to own variables that a model trains and saves; it is
    not called. A subclass defines

    - `create(tasks)`, which makes its variables, and
    - `combine(losses, present, gram=None)`, which returns the scalar that
      training minimizes.

    `losses (T,)` are the tasks' mean losses times their `TaskSpec.weight`, in
    float32; `present (T,)` is 1.0 for a task that has labels in the batch and a
    weight above 0, and 0.0 for others, whose loss is 0. State is updated in
    `combine`, which only training calls: the loss that `evaluate` reports is
    always `sum(losses)`, so that weightings can be compared.

    With `uses_gradients = True`, `combine` gets `gram (T, T)`, the inner
    products of the gradients of all losses with respect to the trainable
    variables that `select(variables, shared)` returns. `shared` are variables
    of layers that more than one task uses. This costs a second forward pass,
    and a backward pass for each task.

    Args:
        **kwargs: Arguments of `keras.layers.Layer`.

    Example:

    >>> class LargestLoss(keras_moe.models.TaskWeighting):
    ...     def combine(self, losses, present, gram=None):
    ...         return keras.ops.max(losses)
    >>> weighting = LargestLoss()
    >>> float(weighting.combine(np.array([0.5, 2.0]), np.ones(2)))
    2.0
    """

    uses_gradients = False

    def __init__(self, **kwargs):
        super().__init__(**{"dtype": "float32", **kwargs})
        self.num_tasks = None

    def set_tasks(self, tasks):
        """Makes the variables, once. `compile` calls it."""
        if self.num_tasks is None:
            self.num_tasks = len(tasks)
            self.create(tasks)
            self.built = True
        elif self.num_tasks != len(tasks):
            raise ValueError(
                f"The weighting was made for {self.num_tasks} tasks. "
                f"Received: {len(tasks)} tasks"
            )

    def create(self, tasks):
        """Makes the variables. By default there are none."""

    def combine(self, losses, present, gram=None):
        raise NotImplementedError(
            f"{type(self).__name__} must define "
            "`combine(losses, present, gram=None)`."
        )

    def task_weights(self):
        """The current factors of the losses, of shape `(T,)`."""
        return ops.ones((self.num_tasks,))

    def select(self, variables, shared):
        """The variables whose gradients are compared."""
        return variables

    def end_epoch(self):
        """Runs between two epochs of `fit`. By default it does nothing."""

    def add_state(self, name, value, shape=None):
        """Adds an untrained float32 variable, one number for each task.

        Args:
            name: str.
            value: float. Its initial value.
            shape: Tuple of ints. Defaults to `None`: `(T,)`.
        """
        return self.add_weight(
            name=name,
            shape=(self.num_tasks,) if shape is None else shape,
            initializer=keras.initializers.Constant(value),
            trainable=False,
            dtype="float32",
            autocast=False,
        )
