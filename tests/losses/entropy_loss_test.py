"""The modalities of `EntropyLoss`; its values are in `all_losses_test.py`."""

import numpy as np
from keras import ops

from keras_moe.losses import EntropyLoss
from tests.losses import loops
from tests.losses.cases import MASK
from tests.losses.cases import SEQUENCES
from tests.losses.cases import T
from tests.losses.cases import arrays
from tests.losses.cases import routing_of
from tests.losses.cases import tensors
from tests.test_case import TestCase


class ModalityTest(TestCase):
    def test_only_its_tokens_count(self):
        r = routing_of(*arrays())
        context = np.arange(T) % 3 > 0  # 1 for two of three tokens
        for per, groups in (("batch", 1), ("sequence", SEQUENCES)):
            for column in (False, True):
                loss = EntropyLoss(1.0, "marginal", modality=1, per=per)
                value = loss(
                    tensors(r),
                    ops.array(MASK),
                    SEQUENCES,
                    ops.array(context[:, None] if column else context, "int32"),
                )
                expected = loops.over_groups(
                    lambda tokens: -loops.marginal_entropy(r, tokens),
                    T,
                    MASK & context,
                    groups,
                )
                self.assertAllClose(float(value), expected, rtol=1e-5)

    def test_a_modality_that_is_not_there(self):
        r = tensors(routing_of(*arrays()))
        context = ops.zeros((T,), "int32")
        for kind, threshold in (("token", None), ("marginal", 2.0)):
            loss = EntropyLoss(1.0, kind, threshold, modality=7)
            self.assertEqual(float(loss(r, None, 1, context)), 0.0)

    def test_says_whether_it_wants_context(self):
        self.assertFalse(EntropyLoss().uses_context)
        self.assertTrue(EntropyLoss(modality=0).uses_context)
