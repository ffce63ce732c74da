"""Two devices that train together, on one: each is run after the other."""

from unittest import mock

from keras import ops

from keras_moe import backend
from tests.losses.gradients import value_and_gradient


def values_and_gradients(functions, arrays):
    """`(value, gradient)` of each device's function of its own array.

    Their sums over the devices, `all_reduce_sum`, are the right ones, with the
    gradient that they have: twice that of the sum.
    """
    added = []
    for function, array in zip(functions, arrays, strict=True):
        sums = []
        with summing(lambda x, sums=sums: sums.append(x) or x):
            function(ops.array(array, "float32"))
        added.append([ops.convert_to_numpy(x) for x in sums])
    results = []
    for i, (function, array) in enumerate(zip(functions, arrays, strict=True)):

        def run(array, function=function, others=added[1 - i]):
            others = iter(others)
            with summing(lambda x: _plus(x, next(others))):
                return function(array)

        results.append(value_and_gradient(run, array))
    return results


def summing(all_reduce_sum):
    return mock.patch.object(backend, "all_reduce_sum", all_reduce_sum)


def _plus(x, other):
    return 2 * x + ops.stop_gradient(ops.convert_to_tensor(other) - x)
