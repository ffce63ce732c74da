"""The trunk of M3oE."""

from keras import ops

from keras_moe.checks import as_units
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_seed
from keras_moe.recommendation.gates.multi_gate_moe import MultiGateMoE
from keras_moe.recommendation.layers.balanced_experts import BalancedExperts
from keras_moe.recommendation.layers.star_dense import STARDense
from keras_moe.recommendation.layers.star_dense import of_domain
from keras_moe.recommendation.models.domains import check_domain
from keras_moe.recommendation.models.domains import domain_of
from keras_moe.stacked.draws import own_seed
from keras_moe.stacked.stacked_mlp import StackedMLP


class DomainExperts:
    """Shared experts, experts of domains and experts of tasks.

    Args:
        tasks: Tuple of `TaskSpec`.
        embedding: The embedding of the model.
        domain, num_domains, num_experts, star_units, expert_units,
            normalization, dropout, stop_gate_gradients, seed: As for
            `keras_moe.models.M3oE`.
    """

    uses_inputs = True

    def __init__(
        self,
        tasks,
        embedding,
        domain,
        num_domains,
        num_experts,
        star_units,
        expert_units,
        normalization,
        dropout,
        stop_gate_gradients,
        seed,
    ):
        check_domain(domain, num_domains)
        check_int("num_experts", num_experts, 1)
        check_bool("stop_gate_gradients", stop_gate_gradients)
        check_seed("seed", seed)
        self.tasks = tasks
        self.embedding = embedding
        self.domain = domain
        self.num_domains = num_domains
        self.num_experts = num_experts
        self.star_units = as_units("star_units", star_units, minimum=2)
        self.expert_units = as_units("expert_units", expert_units)
        self.stop_gate_gradients = stop_gate_gradients
        self.seed = seed
        self.options = {"normalization": normalization, "dropout": dropout}
        self.gates = []

    def __call__(self, x, inputs):
        domain, number = domain_of(
            inputs, self.embedding, self.domain, self.num_domains
        )
        h = self._bottom(x, domain, number)
        mixed = self._mixed(h, domain, number)  # (B, domains, T, O)
        own = self._networks(number, self.expert_units, 2, "domain_experts")(h)
        # All tasks get the same experts of domains: their outputs stand side by
        # side in one row.
        shape = (-1, number, len(self.tasks) * self.expert_units[-1])
        y = BalancedExperts(name="domain_balance")(
            ops.reshape(mixed, shape), ops.tile(own, (1, 1, len(self.tasks)))
        )
        shape = (-1, len(self.tasks), self.expert_units[-1])
        y = ops.reshape(of_domain(y, domain), shape)
        own = self._networks(
            len(self.tasks), self.expert_units, 3, "task_experts"
        )
        return BalancedExperts(name="task_balance")(y, own(h))

    def _bottom(self, x, domain, number):
        star = STARDense(number, self.star_units[0], name="star")(x, domain)
        star = self._networks(1, self.star_units[1:], 0, "star_mlp")(star)
        skip = self._networks(1, self.star_units[-1:], 1, "skip_mlp")(x)
        return star[:, 0] + skip[:, 0]

    def _mixed(self, h, domain, number):
        """The shared experts, mixed by the gates of each domain and task."""
        experts = MultiGateMoE(
            number * len(self.tasks),
            self.expert_units,
            num_shared_experts=self.num_experts,
            expert_normalization=self.options["normalization"],
            expert_dropout=self.options["dropout"],
            return_gates=True,
            seed=own_seed(self.seed, 4),
            name="experts",
        )
        reads = ops.stop_gradient(h) if self.stop_gate_gradients else h
        mixed, gates = experts(h, reads)
        shape = (-1, number, len(self.tasks))
        gates = ops.reshape(gates, (*shape, self.num_experts))
        gates = of_domain(gates, domain)
        self.gates.append(
            {task.name: gates[:, i] for i, task in enumerate(self.tasks)}
        )
        return ops.reshape(mixed, (*shape, self.expert_units[-1]))

    def _networks(self, number, units, stream, name):
        return StackedMLP(
            number,
            units,
            seed=own_seed(self.seed, stream),
            name=name,
            **self.options,
        )
