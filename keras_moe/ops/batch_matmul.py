import keras
from keras import ops


def batch_matmul(x, y):
    """`(B, N, K)` times `(B, K, M)`, in float64 where these are.

    On torch, `ops.matmul` would make float32 of them. Elsewhere it is the
    faster one on TensorFlow, with gradients.
    """
    if keras.backend.standardize_dtype(x.dtype) == "float64":
        return ops.einsum("bnk,bkm->bnm", x, y)
    return ops.matmul(x, y)
