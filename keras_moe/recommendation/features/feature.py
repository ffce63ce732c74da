import keras
import numpy as np

from keras_moe.checks import check_name

NUMBERS = ("bool", "int", "uint", "float", "bfloat")  # prefixes of dtypes


class Feature:
    """Base class of the features of a `FeatureEmbedding`.

    A feature says what the model takes (`input_shape`, `input_dtype`), turns
    raw columns into inputs (`encode`), learns from data what it lacks
    (`statistics`, `adapt`), and turns inputs into vectors (`embed`).

    Args:
        name: str. Name of the feature, of its column and of the model's input.
    """

    input_dtype = "float32"
    input_shape = ()
    # Features with a table set its name, and define `num_ids`.
    table = None

    def __init__(self, name):
        check_name("name", name)
        self.name = name

    @property
    def lacks(self):
        """What `adapt` must learn before the feature can be used, or `None`."""
        return None

    def statistics(self):
        """An object with `update(values, missing)`, or `None`."""
        return None

    def adapt(self, statistics):
        """Sets what the feature lacks, from the statistics of all data."""

    def encode(self, values, missing):
        """Turns a raw column into the NumPy array that the model takes."""
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
                f"Feature {self.name!r} must be made of numbers when the model "
                "takes it; `FeatureEmbedding.encode` converts strings and "
                f"other columns. Received: dtype={dtype}"
            )
        takes_ids = self.input_dtype == "int32"
        if takes_ids and unseen and dtype.startswith(("float", "bfloat")):
            raise ValueError(
                f"Feature {self.name!r} must be made of whole numbers: a "
                "missing id is -1, not NaN. Convert the column with "
                "`FeatureEmbedding.encode`, or cast it. Received: "
                f"dtype={dtype}"
            )

    def embed(self, inputs, table=None):
        """Turns inputs into vectors `(B, width)`.

        Args:
            inputs: Tensor of shape `(B, *input_shape)`.
            table: Function from rows to vectors. Defaults to `None`: the
                feature has no table.
        """
        raise NotImplementedError

    @property
    def width(self):
        """Width of the vectors."""
        raise NotImplementedError

    def keras_input(self):
        """A `keras.Input` of the feature's name, shape and dtype."""
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
    """A name for a layer with variables: PyTorch forbids dots in it."""
    return name.replace(".", "-dot-")


def check_finite(name, values):
    """Raises if values of a feature are infinite in float32."""
    if values.dtype.kind in "biu":
        return
    wrong = np.abs(values) > np.finfo("float32").max
    if wrong.any():
        raise ValueError(
            f"Feature {name!r} must not have infinite values, or values "
            f"beyond float32. Received: {values[wrong][:5]}"
        )
