"""The sizes that are measured."""

from typing import NamedTuple


class Shape(NamedTuple):
    """A feed-forward layer and what goes in: axis letters as in the library."""

    tokens: int
    dim: int
    intermediate_dim: int
    num_experts: int
    top_k: int

    def __str__(self):
        return (
            f"T {self.tokens}, D {self.dim}, F {self.intermediate_dim}, "
            f"E {self.num_experts}, k {self.top_k}"
        )


CPU = {
    "S": Shape(256, 128, 256, 8, 2),
    "A": Shape(2048, 512, 1024, 8, 2),
    "B": Shape(2048, 512, 1024, 32, 4),
    "C": Shape(2048, 512, 256, 128, 8),
}
GPU = {
    "mixtral": Shape(8192, 4096, 14336, 8, 2),
    "mixtral-32k": Shape(32768, 4096, 14336, 8, 2),
    "deepseek": Shape(8192, 7168, 2048, 64, 8),
    "deepseek-32k": Shape(32768, 7168, 2048, 64, 8),
    "qwen3": Shape(8192, 2048, 768, 128, 8),
    "qwen3-32k": Shape(32768, 2048, 768, 128, 8),
}
KNOWN = {**CPU, **GPU}
