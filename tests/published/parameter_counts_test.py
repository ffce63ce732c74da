"""Parameter counts that others published, from configurations alone.

The MoE blocks are layers of the library, built without values; the rest of
each model is arithmetic (`models.py`). The numbers are in `systems.py`, with
how sure each of them is.
"""

from absl.testing import parameterized
from keras import ops

from tests.published.counting import Block
from tests.published.counting import Drawn
from tests.published.counting import build_without_values
from tests.published.counting import count
from tests.published.counting import num_weights
from tests.published.systems import SYSTEMS
from tests.test_case import TestCase

ASSERTED = ("run", "calc", "seen")


def cases():
    for name, (make, *figures) in SYSTEMS.items():
        for figure in figures:
            if figure.mark in ASSERTED:
                label = f"{name}_{figure.count}_{figure.value / 1e9:g}b"
                yield label.replace(".", "_"), make, figure


class PublishedCountsTest(TestCase):
    @parameterized.named_parameters(cases())
    def test_count(self, make, figure):
        actual = getattr(make(), figure.count)
        error = abs(actual - figure.value)
        if figure.differs:
            # Close, and still not the same: else the remark is out of date.
            self.assertLess(error, 0.025 * figure.value)
            self.assertGreater(error, figure.unit / 2, figure.differs)
        elif figure.unit == 1:
            self.assertEqual(actual, figure.value)
        else:
            self.assertLessEqual(error, figure.unit / 2)

    def test_marks(self):
        for name, (_, *figures) in SYSTEMS.items():
            # Each system has a number to hold it to.
            marks = [f.mark for f in figures if not f.differs]
            self.assertNotEmpty(set(marks) & set(ASSERTED), name)
            self.assertEmpty(set(marks) - {*ASSERTED, "mem"}, name)


class CountingTest(TestCase):
    @parameterized.named_parameters(
        ("glu", Block(4, 3, 2, 5)),
        ("mlp", Block(4, 3, 1, 5, bank="mlp", use_bias=True)),
        (
            "shared",
            Block(4, 3, 2, 5, expert_bias=True, shared_dim=7, shared_gate=True),
        ),
        ("biases", Block(4, 3, 2, 5, use_bias=True, router_bias=True)),
    )
    def test_is_that_of_a_layer_with_values(self, block):
        layer = block.layer("zeros")
        layer.build((None, block.dim))
        values = [ops.convert_to_numpy(v) for v in layer.trainable_variables]
        total, active, buffers = count(block)
        self.assertEqual(sum(v.size for v in values), total)
        expert = [ops.convert_to_numpy(v[0]) for v in layer.experts.weights]
        unused = (block.num_experts - block.top_k) * sum(v.size for v in expert)
        self.assertEqual(total - active, unused)
        self.assertEqual(buffers, 3 if block.expert_bias else 0)

    def test_nothing_is_allocated(self):
        # One block of Kimi K2 would take 68 GB.
        block = Block(7168, 384, 8, 2048, expert_bias=True, shared_dim=2048)
        layer = build_without_values(block.layer(), block.dim)
        self.assertGreater(num_weights(layer.trainable_variables), 16 * 10**9)
        for variable in layer.trainable_variables:
            with self.assertRaises(Drawn):
                _ = variable.value
        # Outside of the scope, the same layer does draw.
        with self.assertRaises(Drawn):
            Block(4, 3, 2, 5).layer().build((None, 4))
