"""Pure functions on tensors, the same on every backend.

Axis letters, the same in every file of this library:

    B batch, L length, T tokens (all positions of all examples),
    D model dim, F intermediate dim, E experts, K top_k, C capacity,
    N routed rows (T * K), G groups.

Trailing comments use them, as in `# (T, E)`.
"""

from keras_moe.ops.balanced_assignment import (
    balanced_assignment as balanced_assignment,
)
from keras_moe.ops.capacity import expert_capacity as expert_capacity
from keras_moe.ops.dispatch import combine as combine
from keras_moe.ops.dispatch import dispatch as dispatch
from keras_moe.ops.dispatch_plan import DispatchPlan as DispatchPlan
from keras_moe.ops.dispatch_plan import (
    normalize_kept_weights as normalize_kept_weights,
)
from keras_moe.ops.dispatch_plan import row_weights as row_weights
from keras_moe.ops.entmax import entmax as entmax
from keras_moe.ops.entmax import entmax15 as entmax15
from keras_moe.ops.entmax import sparsemax as sparsemax
from keras_moe.ops.grouped_matmul import grouped_matmul as grouped_matmul
from keras_moe.ops.grouped_matmul import (
    grouped_matmul_implementations as grouped_matmul_implementations,
)
from keras_moe.ops.groups import num_groups as num_groups
from keras_moe.ops.groups import to_groups as to_groups
from keras_moe.ops.masking import masked_mean as masked_mean
from keras_moe.ops.noise import expected_load as expected_load
from keras_moe.ops.routing import Routing as Routing
from keras_moe.ops.routing import expert_counts as expert_counts
from keras_moe.ops.scores import normalize_weights as normalize_weights
from keras_moe.ops.scores import score as score
from keras_moe.ops.selection import top_k_indices as top_k_indices
from keras_moe.ops.sinkhorn import sinkhorn as sinkhorn
from keras_moe.ops.smooth_step import smooth_step as smooth_step
