class OneGate:
    """A trunk of one `MultiGateMoE` of a single gate, for all tasks.

    Args:
        tasks: Tuple of `TaskSpec`.
        level: Layer with `num_tasks=1` and `return_gates=True`.
    """

    def __init__(self, tasks, level):
        self.tasks = tasks
        self.level = level
        self.gates = []

    def __call__(self, x):
        y, gates = self.level(x)
        gate = gates[:, 0]
        self.gates.append({task.name: gate for task in self.tasks})
        return y[:, 0]
