import keras
import numpy as np

from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_int_up_to
from keras_moe.checks import check_rate
from keras_moe.moe.model_config import deserialized
from keras_moe.moe.model_config import made_again
from keras_moe.moe.model_config import settings_of
from keras_moe.moe.moe import MoE
from keras_moe.recommendation.models.layer_arguments import split_arguments
from keras_moe.recommendation.models.next_item_model import NextItemModel
from keras_moe.recommendation.models.sasrec_graph import NEVER
from keras_moe.recommendation.models.sasrec_graph import sasrec_graph

# The arguments of the `MoE` layers that the model sets.
_STRUCTURE = (
    *("num_experts", "intermediate_dim", "top_k", "activation", "causal"),
    *("route_per", "return_routing", "capacity", "shared_experts"),
    *("pre_experts", "post_experts", "dispatcher"),
)


@keras.saving.register_keras_serializable("keras_moe")
class SASRecMoE(NextItemModel):
    """Predicts the next item of a sequence with attention and experts (SASRec).

    ```
    x = item table[ids] * sqrt(dim) + position table
    for each block:
        x = x + causal self-attention(normalization(x))
        x = x + MoE(normalization(x))
    y = normalization(x) @ transpose(item table)
    ```

    The experts replace the feed-forward layers of SASRec. Items are numbered
    from 1; 0 is padding, on either side of a sequence. No position looks at
    later ones or at padding, and padding goes to no expert.

    The model is trained on sequences of ids. The label of each position is the
    id of the next item, or 0 if there is none:

    ```python
    model.compile("adam")
    model.fit(sequences[:, :-1], sequences[:, 1:])
    model.recommend(sequences[:, 1:], k=10)
    ```

    SASRec compares the next item with one random item; the loss here is the
    cross-entropy over all items.

    Args:
        num_items: int. Number of items, whose ids are 1 to `num_items`.
        length: int. Length of the sequences.
        embedding_dim: int. Width of the vectors. Defaults to `64`.
        num_blocks: int. Number of blocks. Defaults to `2`.
        num_heads: int. Attention heads; must divide `embedding_dim`. Defaults
            to `1`.
        num_experts: int. Experts in each block. Defaults to `8`.
        top_k: int. Experts per position. Defaults to `2`.
        intermediate_dim: int. Width of the hidden layer of an expert. Defaults
            to `None`, `embedding_dim`.
        activation: Activation of the experts. Defaults to `"relu"`.
        dropout: float. Rate of the dropout of the embedding, of the attention
            weights and of the output of each part of a block. Defaults to
            `0.2`.
        **kwargs: Further arguments of `keras_moe.layers.MoE`, and `name` and
            `trainable` of the model. `router` and `experts` (by default
            `"mlp"`) must be names.

    Input shape:
        `(batch, length)`, int32.

    Output shape:
        `(batch, length, num_items + 1)`: the logits of the next item at each
        position, in float32. The logit of item 0 is -1e9.

    Raises:
        ValueError: If arguments are out of range or do not fit together, or if
            NumPy arrays hold ids out of range.

    Example:

    >>> model = keras_moe.models.SASRecMoE(num_items=20, length=5)
    >>> ids = np.array([[0, 0, 3, 4, 5], [7, 8, 9, 10, 11]])
    >>> model.recommend(ids, k=3).shape
    (2, 3)

    Reference:

    - [Kang and McAuley, 2018](https://arxiv.org/abs/1808.09781)
    """

    def __init__(
        self,
        num_items,
        length,
        embedding_dim=64,
        num_blocks=2,
        num_heads=1,
        num_experts=8,
        top_k=2,
        intermediate_dim=None,
        activation="relu",
        dropout=0.2,
        **kwargs,
    ):
        for name, value in (
            ("num_items", num_items),
            ("length", length),
            ("embedding_dim", embedding_dim),
            ("num_blocks", num_blocks),
            ("num_heads", num_heads),
        ):
            check_int(name, value, 1)
        if intermediate_dim is not None:
            check_int("intermediate_dim", intermediate_dim, 1)
        check_rate("dropout", dropout)
        if embedding_dim % num_heads:
            raise ValueError(
                "`num_heads` must divide `embedding_dim`. Received: "
                f"num_heads={num_heads}, embedding_dim={embedding_dim}"
            )
        options, kwargs = split_arguments(MoE, kwargs, _STRUCTURE)
        for name in ("router", "experts"):
            if not isinstance(options.get(name, ""), str):
                raise ValueError(
                    f"`{name}` must be a name: each block makes its own. "
                    f"Received: {name}={options[name]!r}"
                )
        arguments = {
            "num_items": num_items,
            "length": length,
            "embedding_dim": embedding_dim,
            "num_blocks": num_blocks,
            "num_heads": num_heads,
            "num_experts": num_experts,
            "top_k": top_k,
            "intermediate_dim": intermediate_dim,
            "activation": activation,
            "dropout": dropout,
            **options,
        }
        moe = {
            "num_experts": num_experts,
            "intermediate_dim": intermediate_dim or embedding_dim,
            "top_k": top_k,
            "activation": activation,
            "causal": True,
            **{"experts": "mlp", **options},
        }
        ids, logits, last_logits = sasrec_graph(
            num_items,
            length,
            embedding_dim,
            num_blocks,
            num_heads,
            dropout,
            moe,
        )
        super().__init__(inputs=ids, outputs=logits, **kwargs)
        self.num_items = num_items
        self.length = length
        scorer = keras.Model(ids, last_logits)
        # Functions, since Keras would save plain attributes.
        self._scorer = lambda: scorer
        self._arguments = lambda: dict(arguments)

    def fit(self, x=None, y=None, **kwargs):
        """As `keras.Model.fit`; NumPy arrays are checked first."""
        self._check_ids(x)
        self._check_ids(y)
        return super().fit(x, y, **kwargs)

    def evaluate(self, x=None, y=None, **kwargs):
        """As `keras.Model.evaluate`; NumPy arrays are checked first."""
        self._check_ids(x)
        self._check_ids(y)
        return super().evaluate(x, y, **kwargs)

    def predict(self, x, *args, **kwargs):
        """As `keras.Model.predict`; NumPy arrays are checked first."""
        self._check_ids(x)
        return super().predict(x, *args, **kwargs)

    def recommend(self, ids, k=10, exclude_seen=False, batch_size=None):
        """The most likely next items of each sequence.

        Args:
            ids: NumPy array `(B, length)` of item ids. The items recommended
                follow the last item of the sequence.
            k: int. How many items. Defaults to `10`.
            exclude_seen: bool. Whether to leave out the items of the sequence.
                If fewer than `k` items are left, the last ids are 0. Defaults
                to `False`.
            batch_size: int. As for `predict`. Defaults to `None`, 32.

        Returns:
            NumPy array `(B, k)` of item ids, the most likely first.

        Raises:
            ValueError: If ids are out of range, a sequence has no item, or `k`
                is larger than the number of items.
        """
        check_int_up_to("k", k, "num_items", self.num_items)
        check_bool("exclude_seen", exclude_seen)
        ids = np.asarray(ids)
        self._check_ids(ids)
        if not (ids > 0).any(axis=1).all():
            raise ValueError(
                "Each sequence must have an item. Received only padding in "
                f"rows {np.flatnonzero(~(ids > 0).any(axis=1))[:5]}"
            )
        ids = ids.astype("int32")
        scores = self._scorer().predict(ids, batch_size=batch_size, verbose=0)
        if exclude_seen:
            np.put_along_axis(scores, ids, NEVER, axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        values = np.take_along_axis(scores, best, axis=1)
        return np.where(values > NEVER, best, 0).astype("int32")

    def _check_ids(self, ids):
        if not isinstance(ids, np.ndarray):
            return
        if ids.ndim != 2 or ids.shape[1] != self.length:
            raise ValueError(
                f"Ids must be of shape (batch, {self.length}). "
                f"Received: shape={ids.shape}"
            )
        wrong = (ids < 0) | (ids > self.num_items) | (ids != np.floor(ids))
        if wrong.any():
            raise ValueError(
                f"Ids must be whole numbers from 0 to {self.num_items}. "
                f"Received: {ids[wrong][:5]}"
            )

    def get_config(self):
        return {
            "name": self.name,
            "trainable": self.trainable,
            **settings_of(self),
            **self._arguments(),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return made_again(cls, *deserialized(config, custom_objects))
