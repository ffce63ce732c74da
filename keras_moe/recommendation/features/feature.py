import keras
import numpy as np

from keras_moe.checks import check_name

NUMBERS = ("bool", "int", "uint", "float", "bfloat")  # how their dtypes begin


class Feature:
    """Base class of the features of a `FeatureEmbedding`.

    A feature is a description. It says what the model takes (`input_shape`,
    `input_dtype`), makes its inputs of raw columns (`encode`), learns what it
    lacks from data (`statistics`, `adapt`), and makes a vector of it (`embed`).

    Args:
        name: str. Name of the feature: of its column and of the model's input.
    """

    input_dtype = "float32"
    input_shape = ()
    # Those with a table have a name for it, and say how many ids it has.
    table = None

    def __init__(self, name):
        check_name("name", name)
        self.name = name

    @property
    def lacks(self):
        """What has to be learned from data before it can be used, or `None`."""
        return None

    def statistics(self):
        """An object with `update(values, missing)`, or `None`."""
        return None

    def adapt(self, statistics):
        """Takes what it lacks from the statistics of all data."""

    def encode(self, values, missing):
        """What the model takes, a NumPy array, of a raw column."""
        raise NotImplementedError

    def check(self, values):
        """Raises if a NumPy array is not what the model takes."""
        rank = 1 + len(self.input_shape)
        shape = values.shape
        if shape[1:] == (1,) and rank == 1:
            shape = shape[:1]
        fits = len(shape) == rank and all(
            expected in (None, size)
            for expected, size in zip(self.input_shape, shape[1:], strict=True)
        )
        if not fits:
            raise ValueError(
                f"Feature {self.name!r} must be of shape "
                f"{('batch', *self.input_shape)}. Received: {values.shape}"
            )
        self.check_dtype(str(values.dtype))

    def check_dtype(self, dtype, unseen=False):
        """Raises if values of a dtype are not what the model takes.

        Args:
            dtype: str.
            unseen: bool. Whether the values themselves cannot be checked.
        """
        if not dtype.startswith(NUMBERS):
            raise ValueError(
                f"Feature {self.name!r} must be made of numbers in what the "
                "model takes; `FeatureEmbedding.encode` makes them of strings "
                f"and other columns. Received: dtype={dtype}"
            )
        takes_ids = self.input_dtype == "int32"
        if takes_ids and unseen and dtype.startswith(("float", "bfloat")):
            raise ValueError(
                f"Feature {self.name!r} must be made of whole numbers: a "
                "missing id is -1, and not NaN. `FeatureEmbedding.encode` "
                "makes ids of what is missing; or cast them. Received: "
                f"dtype={dtype}"
            )

    def embed(self, inputs, table=None):
        """The feature's vector `(B, width)` of its input."""
        raise NotImplementedError

    @property
    def width(self):
        """Width of the vector."""
        raise NotImplementedError

    def keras_input(self):
        return keras.Input(
            self.input_shape, dtype=self.input_dtype, name=self.name
        )

    def get_config(self):
        return {"name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __repr__(self):
        return f"{type(self).__name__}({self.name!r})"


def layer_name(name):
    """A name that a layer with variables can have: PyTorch takes no dots."""
    return name.replace(".", "-dot-")


def check_finite(name, values):
    if values.dtype.kind in "biu":
        return
    wrong = np.abs(values) > np.finfo("float32").max
    if wrong.any():
        raise ValueError(
            f"Feature {name!r} must not have infinite values, or such beyond "
            f"float32. Received: {values[wrong][:5]}"
        )
