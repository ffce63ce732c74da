"""`per="global"`, and that routers' own choices and logits differ."""

from unittest import mock

import numpy as np
from keras import ops

from keras_moe import backend
from keras_moe.losses import LoadBalancingLoss
from keras_moe.routers import Routing
from tests.losses import loops
from tests.losses.cases import LoadRouting
from tests.losses.cases import arrays
from tests.losses.cases import routing_of
from tests.losses.cases import tensors
from tests.test_case import TestCase


class GlobalTest(TestCase):
    def test_counts_of_all_replicas_and_own_probabilities(self):
        r = routing_of(*arrays(num_tokens=20))
        half = [LoadRouting(*(x[i : i + 10] for x in r)) for i in (0, 10)]
        for normalize in (True, False):
            loss = LoadBalancingLoss(
                1.0, per="global", normalize_by_top_k=normalize
            )
            # First what each replica has to add, then the loss of each.
            added = [self.run_with(loss, r, lambda x: x)[1] for r in half]
            for i in (0, 1):
                others = iter(added[1 - i])
                value, _ = self.run_with(
                    loss,
                    half[i],
                    lambda x, others=others: x + ops.array(next(others)),
                )
                # The shares of all 20 tokens, the probabilities of 10.
                mean = loops.mean_scores(half[i], range(10))
                same = r._replace(probs=np.tile(mean, (20, 1)))
                expected = loops.load_balancing(
                    same, range(20), normalize=normalize
                )
                self.assertAllClose(value, expected, rtol=1e-5)

    def run_with(self, loss, r, all_reduce_sum):
        """The loss, and what it has summed over all replicas."""
        added = []

        def noting(x):
            added.append(ops.convert_to_numpy(x))
            return all_reduce_sum(x)

        with mock.patch.object(backend, "all_reduce_sum", noting):
            return loss(tensors(r)), added

    def test_a_single_replica(self):
        r = tensors(routing_of(*arrays()))
        for normalize in (True, False):
            of_all, of_batch = (
                LoadBalancingLoss(1.0, per, normalize)(r, None, 3)
                for per in ("global", "batch")
            )
            self.assertEqual(float(of_all), float(of_batch))

    def test_config(self):
        loss = LoadBalancingLoss(per="global", scores="raw")
        again = LoadBalancingLoss.from_config(loss.get_config())
        self.assertEqual(vars(again), vars(loss))
        self.assertEqual(again.per, "global")


class AssignmentsTest(TestCase):
    def test_logits_ignore_what_the_router_chose(self):
        # A bias made the router choose expert 1; the logits say expert 0.
        logits = ops.array([[np.log(3.0), 0.0]] * 2, "float32")
        routing = Routing(
            logits,
            ops.softmax(logits),
            ops.ones((2, 1), "int32"),
            ops.ones((2, 1)),
        )
        for assignments, expected in (
            ("all", 2 * 0.25),
            ("first", 2 * 0.25),
            ("logits", 2 * 0.75),
        ):
            loss = LoadBalancingLoss(1.0, assignments=assignments)
            self.assertAllClose(loss(routing), expected)
