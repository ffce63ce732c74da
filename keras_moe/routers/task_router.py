import keras
import numpy as np
from keras import ops

from keras_moe import backend
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.ops.masking import zero_masked
from keras_moe.routers.top_k_router import TopKRouter

KERNELS = ("per_task", "shared", "task")


@keras.saving.register_keras_serializable("keras_moe")
class TaskRouter(TopKRouter):
    """Routes each token by its task, or domain, language or modality.

    ```
    logits[t] = tokens[t] @ kernel[task[t]]          "per_task"
              = tokens[t] @ kernel                   "shared"
              = kernel[task[t]]                      "task"
    logits[t] = -inf where not allowed_experts[task[t]]
    ```

    and from there on as in `TopKRouter`. The `context` of the call holds the
    ids of the tasks.

    With `"per_task"` each task has its own gate, as in MMoE. The logits of all
    tasks are computed, `num_tasks` times the work, as this is cheaper than a
    kernel gathered for each token. With `"task"` all tokens of a task go to the
    same experts, the only ones that serving the task needs. `allowed_experts`
    can give tasks their own experts, besides shared ones, as the groups for
    text and images in ERNIE 4.5.

    Args:
        num_experts: int. Number of experts to choose from.
        num_tasks: int. Ids run from 0 to `num_tasks - 1`.
        top_k: int. Experts per token. Defaults to `2`.
        kernel: `"per_task"` for a kernel `(num_tasks, D, E)`, `"shared"` for
            one `(D, E)`, `"task"` for learned logits `(num_tasks, E)`. Defaults
            to `"per_task"`.
        allowed_experts: Nested sequence of bools `(num_tasks, E)`, or `None`:
            the experts that each task may use, at least `top_k`. Defaults to
            `None`, all of them.
        **kwargs: Arguments of `keras_moe.routers.TopKRouter`. A bias is the
            same for all tasks.

    Call arguments:
        tokens: Tensor of shape `(T, D)`.
        mask: Boolean tensor of shape `(T,)`, or `None`. Each token is routed on
            its own. Masked tokens and their ids have no effect.
        training: bool. Whether to apply jitter, noise and expert dropout.
        context: Integer tensor of shape `(T,)`, the id of each token's task.
            An id out of range is an error where its value is known. In
            compiled code it is not, and the nearest id is taken.

    Input shape:
        `(T, D)`

    Output:
        A `keras_moe.routers.Routing`, as `TopKRouter` returns it. The logits of
        experts that are not allowed are `-inf`.

    Raises:
        ValueError: If an argument is out of range, `D` is not static, or
            `context` is missing, not of whole numbers or out of range.

    Example:

    >>> router = keras_moe.routers.TaskRouter(
    ...     num_experts=3, num_tasks=2, top_k=1,
    ...     allowed_experts=[[True, False, True], [False, True, False]],
    ... )
    >>> routing = router(keras.ops.ones((2, 8)), context=[1, 1])
    >>> keras.ops.convert_to_numpy(routing.expert_indices).tolist()
    [[1], [1]]

    Reference:

    - [Ma et al., 2018](https://dl.acm.org/doi/10.1145/3219819.3220007),
      equation 7 (a gate for each task)
    - [Kudugunta et al., 2021](https://arxiv.org/abs/2110.03742), section 3
      (task-level routing)
    - [Mustafa et al., 2022](https://arxiv.org/abs/2206.02770), section 2
      (routing by modality)
    """

    uses_context = True
    needs_context = True

    def __init__(
        self,
        num_experts,
        num_tasks,
        top_k=2,
        kernel="per_task",
        allowed_experts=None,
        **kwargs,
    ):
        super().__init__(num_experts, top_k, **kwargs)
        check_int("num_tasks", num_tasks, minimum=1)
        check_one_of("kernel", kernel, KERNELS)
        self.num_tasks = num_tasks
        self.kernel_kind = kernel
        self.allowed_experts = self._as_allowed(allowed_experts)
        self.check_eval_top_k(self.eval_top_k)

    def _as_allowed(self, allowed):
        """`allowed_experts` as a list of lists, or `None`."""
        if allowed is None:
            return None
        allowed = np.asarray(allowed)
        shape = (self.num_tasks, self.num_experts)
        if allowed.shape != shape or allowed.dtype != bool:
            raise ValueError(
                "`allowed_experts` must be bools of the shape (num_tasks, "
                f"num_experts), {shape}. Received: shape {allowed.shape}, "
                f"dtype {allowed.dtype}"
            )
        # With groups or dropout, too few allowed experts might be left, and
        # quantiles would count the tokens that may not have an expert.
        by_quantile = self.bias_kind and self.bias_update == "quantile"
        if self.num_expert_groups > 1 or self.expert_dropout or by_quantile:
            raise ValueError(
                "`allowed_experts` goes neither with `num_expert_groups` nor "
                "with `expert_dropout` nor with `bias_update='quantile'`. "
                f"Received: num_expert_groups={self.num_expert_groups}, "
                f"expert_dropout={self.expert_dropout}, "
                f"bias_update={self.bias_update!r}"
            )
        self._check_enough("top_k", self.top_k, allowed)
        return allowed.tolist()

    def _check_enough(self, name, number, allowed):
        candidates = self.num_experts - self.num_always_on
        enough = allowed[:, :candidates].sum(axis=1) >= number
        enough = np.logical_and(enough, allowed[:, candidates:].all(axis=1))
        if not enough.all():
            raise ValueError(
                f"Each task must be allowed at least `{name}` experts, and all "
                f"of the last `num_always_on`. Received: {name}={number}, "
                f"num_always_on={self.num_always_on}, "
                f"allowed_experts[{np.argmin(enough)}]="
                f"{allowed[np.argmin(enough)].tolist()}"
            )

    def check_eval_top_k(self, eval_top_k):
        super().check_eval_top_k(eval_top_k)
        # Not there yet as the base class asks.
        allowed = getattr(self, "allowed_experts", None)
        if eval_top_k is not None and allowed is not None:
            self._check_enough("eval_top_k", eval_top_k, np.asarray(allowed))

    def build_logits(self, dim):
        if self.kernel_kind == "shared":
            return super().build_logits(dim)
        shape = {
            "per_task": (self.num_tasks, dim, self.num_experts),
            "task": (self.num_tasks, self.num_experts),
        }[self.kernel_kind]
        self.kernel = self.add_weight(
            name="kernel",
            shape=shape,
            initializer=self._initialize,
            regularizer=self.kernel_regularizer,
        )

    def _initialize(self, shape, dtype=None):
        if len(shape) == 2:
            return self.kernel_initializer(shape, dtype=dtype)
        # Drawn as one matrix, so that no two tasks have the same kernel. Keras
        # would take three axes for the kernel of a convolution.
        num_tasks, dim, num_experts = shape
        kernel = self.kernel_initializer(
            (dim, num_tasks * num_experts), dtype=dtype
        )
        kernel = ops.reshape(kernel, (dim, num_tasks, num_experts))
        return ops.transpose(kernel, (1, 0, 2))

    def raw_logits(self, tokens):
        """Logits `(T, E)`, or of all tasks: `(T, N, E)`, `(1, N, E)`."""
        if self.kernel_kind == "shared":
            return super().raw_logits(tokens)
        if self.kernel_kind == "per_task":
            return ops.einsum("td,nde->tne", tokens, self.kernel)
        return ops.expand_dims(ops.convert_to_tensor(self.kernel), 0)

    def call(self, tokens, mask=None, training=None, context=None):
        tokens = zero_masked(tokens, mask)
        tasks = self._tasks(context, mask)  # (T,)
        is_task = ops.one_hot(tasks, self.num_tasks, dtype=self.compute_dtype)
        logits = self.logits(tokens, training)
        if self.kernel_kind == "task":
            logits = ops.einsum("tn,ne->te", is_task, logits[0])
        if self.kernel_kind == "per_task":
            where = ops.reshape(tasks, (-1, 1, 1))
            shape = (ops.shape(tokens)[0], 1, self.num_experts)
            logits = ops.take_along_axis(
                logits, ops.broadcast_to(where, shape), axis=1
            )[:, 0]
        if self.allowed_experts is not None:
            table = ops.convert_to_tensor(
                np.array(self.allowed_experts, "float32")
            )
            is_task = ops.cast(is_task, "float32")
            allowed = ops.einsum("tn,ne->te", is_task, table) > 0.5
            logits = ops.where(allowed, logits, float("-inf"))
        noisy = self.noisy_logits(logits, training)
        return self.route(logits, noisy, mask, training)

    def ranked(self, noisy, probs=None):
        ranked = super().ranked(noisy, probs)
        if self.allowed_experts is None:
            return ranked
        # A bias might lift scores of 0 above others.
        return ops.where(noisy > float("-inf"), ranked, float("-inf"))

    def compute_output_spec(
        self, tokens, mask=None, training=None, context=None
    ):
        self._check_context(context)
        return super().compute_output_spec(
            tokens, mask=mask, training=training, context=context
        )

    def _check_context(self, context):
        if context is None:
            raise ValueError(
                "`context` must be given to TaskRouter: the ids of the tasks. "
                "Received: context=None"
            )
        dtype = keras.backend.standardize_dtype(context.dtype)
        if "int" not in dtype or len(context.shape) != 1:
            raise ValueError(
                "`context` must be whole numbers of shape (T,), the ids of "
                f"the tasks. Received: dtype={dtype}, "
                f"context.shape={tuple(context.shape)}"
            )

    def _tasks(self, context, mask):
        """The ids `(T,)` int32, in range."""
        if context is not None:
            context = ops.convert_to_tensor(context)
        self._check_context(context)
        tasks = zero_masked(ops.cast(context, "int32"), mask)
        if not backend.is_symbolic(tasks):
            values = ops.convert_to_numpy(tasks)
            wrong = values[(values < 0) | (values >= self.num_tasks)]
            if wrong.size:
                raise ValueError(
                    "`context` must hold ids from 0 to `num_tasks - 1`. "
                    f"Received: {wrong[0]}, num_tasks={self.num_tasks}"
                )
        return ops.clip(tasks, 0, self.num_tasks - 1)

    def get_config(self):
        return {
            **super().get_config(),
            "num_tasks": self.num_tasks,
            "kernel": self.kernel_kind,
            "allowed_experts": self.allowed_experts,
        }
