import keras
import numpy as np
from keras import ops

from keras_moe import backend
from keras_moe.ops.grouped_matmul import batch_matmul


@keras.saving.register_keras_serializable("keras_moe")
class DotProducts(keras.layers.Layer):
    """Of each pair of vectors, `(B, N, D)` -> `(B, N (N - 1) / 2)`.

    Row by row below the diagonal of the matrix of all products.
    """

    def call(self, inputs):
        number = int(inputs.shape[1])  # a tensor while PyTorch traces
        products = batch_matmul(inputs, ops.transpose(inputs, (0, 2, 1)))
        products = ops.reshape(products, (-1, number * number))
        rows, columns = np.tril_indices(number, -1)
        places = (rows * number + columns).astype("int32")
        return backend.take(products, places, axis=1)

    def compute_output_shape(self, input_shape):
        number = input_shape[1]
        return (input_shape[0], number * (number - 1) // 2)
