"""Every recorded routing case belongs to one family, which builds its part."""

import keras
from absl.testing import parameterized

from tests import oracle
from tests.routing_cases import cases
from tests.test_case import TestCase

NAMED = cases.named(lambda config, arrays: True)


class OracleTest(TestCase):
    def test_number_of_cases(self):
        self.assertGreaterEqual(len(NAMED), 71)

    @parameterized.named_parameters(NAMED)
    def test_router_from_case(self, case):
        _, config, arrays = case
        taking = [f for f in oracle.families() if f.matches(config, arrays)]
        self.assertLen(taking, 1, [family.__name__ for family in taking])
        part = oracle.router_from_case(config, arrays)
        if isinstance(part, keras.layers.Layer):
            self.assertTrue(part.built)
        self.assertTrue(type(part).__module__.startswith("keras_moe."))

    def test_unknown_case(self):
        with self.assertRaisesRegex(NotImplementedError, "'unheard': 1"):
            oracle.router_from_case({"unheard": 1}, {})
