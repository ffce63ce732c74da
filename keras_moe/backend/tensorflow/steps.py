"""A training step over the replicas of a strategy, without `fit`."""

import itertools

import tensorflow as tf


def train_step(model):
    """`step(x, y, sample_weight=None)`, which returns the logs.

    `fit` fails with several workers as it adds up their logs. Here each replica
    runs the model's `train_step`; the metrics are read outside the replicas,
    which adds up what each of them has counted.
    """
    strategy = model.distribute_strategy
    with strategy.scope():
        model.optimizer.build(model.trainable_variables)
    is_ready = False

    @tf.function(reduce_retracing=True)
    def compiled(batch):
        strategy.run(model.train_step, args=(batch,))
        return model.get_metrics_result()

    def step(x, y, sample_weight=None):
        nonlocal is_ready
        batch = (x, y) if sample_weight is None else (x, y, sample_weight)
        with strategy.scope():
            batch = _distributed(strategy, batch)
            if not is_ready:
                strategy.run(_build_metrics, args=(model, *batch))
                model.reset_metrics()
                is_ready = True
            logs = compiled(batch)
        return {name: float(value) for name, value in logs.items()}

    return step


def _build_metrics(model, x, y, sample_weight=None):
    """Makes the variables of the metrics, which a graph must not."""
    outputs = tf.nest.map_structure(
        lambda spec: tf.zeros(spec.shape, spec.dtype),
        model.compute_output_spec(x),
    )
    arguments = {"x": x, "y": y, "y_pred": outputs}
    model.compute_loss(**arguments, sample_weight=sample_weight)
    model.compute_metrics(**arguments, sample_weight=sample_weight)


def _distributed(strategy, batch):
    """Each of the replicas of this process gets an equal part."""
    batch = tf.nest.map_structure(tf.convert_to_tensor, batch)
    if strategy.num_replicas_in_sync == 1:
        return batch
    number = len(strategy.extended.worker_devices)
    if number == 1:
        return batch
    sizes = {len(array) for array in tf.nest.flatten(batch)}
    if len(sizes) > 1 or sizes.pop() % number:
        raise ValueError(
            "A batch must divide among the replicas of this process. Received: "
            f"{number} replicas, a batch of the shapes "
            f"{[tuple(array.shape) for array in tf.nest.flatten(batch)]}"
        )
    replicas = itertools.count()

    def own(context):
        n = next(replicas)
        return tf.nest.map_structure(lambda x: tf.split(x, number)[n], batch)

    return strategy.experimental_distribute_values_from_function(own)
