"""Plans: published counts, hand counts, the variables of real models."""

import time
import tracemalloc

import keras
import numpy as np
from absl.testing import parameterized

from keras_moe.distribution import plan
from keras_moe.experts import GLUExperts
from keras_moe.experts import LayerExperts
from keras_moe.experts import MLPExperts
from keras_moe.layers import MoE
from keras_moe.layers import SoftMoE
from keras_moe.routers import ExpertChoiceRouter
from tests.distribution import configurations as configs
from tests.published.counting import refuse
from tests.test_case import TestCase

B = 10**9
# total, active with both embeddings; the published figures and how near they
# are: a count without one of the embeddings is behind some of them.
PUBLISHED = {
    "mixtral": (
        *(configs.MIXTRAL_8X7B, 46_702_792_704, 12_879_925_248),
        *(46.7 * B, 12.9 * B, 0.002),
    ),
    "deepseek_v3": (
        *(configs.DEEPSEEK_V3, 671_026_404_352, 37_552_297_472 - 14_848),
        *(671 * B, 37 * B, 0.016),
    ),
    "kimi_k2": (
        configs.KIMI_K2,
        1_026_408_232_448 - 23_040,
        32_861_500_928 - 23_040,
        *(1040 * B, 32.6 * B, 0.014),
    ),
    "qwen3": (
        *(configs.QWEN3_30B_A3B, 30_532_122_624, 3_353_032_704),
        *(30.5 * B, 3.3 * B, 0.017),
    ),
}


def numbers(variables):
    return sum(int(np.prod(v.shape)) for v in variables)


def small_model(initializer="glorot_uniform", dtype=None):
    arguments = {"kernel_initializer": initializer, "dtype": dtype}
    inputs = keras.Input((6, 4))
    x = keras.layers.Dense(8, activation="gelu", **arguments)(inputs)
    for _ in range(2):
        moe = MoE(
            experts=GLUExperts(8, 16, **arguments),
            shared_experts=MLPExperts(1, 12, **arguments),
            dtype=dtype,
        )
        x = keras.layers.Add(dtype=dtype)([x, moe(x)])
    return keras.Model(inputs, keras.layers.Dense(3, **arguments)(x))


class ConfigurationTest(TestCase):
    @parameterized.named_parameters(
        (name, *case) for name, case in PUBLISHED.items()
    )
    def test_published(self, config, total, active, said, active_said, near):
        tracemalloc.start()
        begin = time.perf_counter()
        devices = {"data": 2048 // 8, "expert": 8}
        result = plan(config, devices, 2048, sequence_length=4096)
        seconds = time.perf_counter() - begin
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.assertEqual(result.parameters, total)
        self.assertEqual(result.active_parameters, active)
        self.assertAllClose(total, said, rtol=near)
        self.assertAllClose(active, active_said, rtol=near)
        # Two for each weight that meets the token, of which the first
        # embedding has none, and attention.
        matrices = 2 * (active - config["vocab_size"] * config["hidden_size"])
        self.assertGreater(result.flops_per_token, matrices)
        self.assertLess(result.flops_per_token, 1.6 * matrices)
        self.assertLess(seconds, 10)
        self.assertLess(peak, 200e6)

    def test_counted_by_hand(self):
        mesh = {"data": 2, "expert": 4, "model": 2}
        result = plan(
            *(configs.SMALL, mesh, 16),
            sequence_length=5,
            dtype="mixed_bfloat16",
            optimizer="adamw",
        )
        attention = 8 * 8 + 2 * 8 * 4 + 8 * 8
        feed_forward = 3 * 8 * 16
        # A router and two shared experts in one.
        beside = 8 * 8 + 3 * 8 * 8
        kernels = 3 * attention + feed_forward + 2 * beside
        dense = kernels + 7 * 8 + 2 * 10 * 8
        bank = 8 * 3 * 8 * 4
        self.assertEqual(result.parameters, dense + 2 * bank)
        self.assertEqual(result.active_parameters, dense + 2 * bank // 4)
        held = dense + 2 * bank // 8
        self.assertEqual(result.weights, 4 * held)
        self.assertEqual(result.gradients, 4 * held)
        self.assertEqual(result.optimizer_state, 8 * held)
        self.assertEqual(result.tokens, 10)
        (layer,) = result.layers
        self.assertEqual(layer.num_layers, 2)
        self.assertEqual(layer.num_experts, 2)
        self.assertEqual(layer.weights, 4 * bank // 8)
        self.assertEqual(layer.rows, 20)
        # Out and back, forward and backward, 8 numbers of 2 bytes a row, three
        # quarters of them to others.
        exchanged = 20 * 8 * 2 * 4 * 3 // 4
        self.assertEqual(layer.all_to_all, exchanged)
        self.assertEqual(result.all_to_all, 2 * exchanged)
        # Gradients of the dense part over 8 replicas, of banks over 2, and
        # the two halves of each row's sum, forward and backward.
        gradients = 2 * 7 / 8 * dense * 4 + 2 * 1 / 2 * 2 * bank // 2
        halves = 2 * (2 * 1 / 2) * 20 * (8 + 8) * 2
        self.assertEqual(result.all_reduce, gradients + halves)
        # Of a token, that attends to five.
        products = kernels + 8 * 10 + 3 * 5 * 2 * 8
        experts = 2 * 2 * 3 * 8 * 4
        self.assertEqual(result.flops_per_token, 2 * (products + experts))
        flops = 3 * 10 * 2 * (products + experts // 2)
        self.assertEqual(result.flops, flops)
        of_token = (
            3 * (4 * 8 + 2 * (8 + 4)) + 3 * 16 + 2 * (8 + 3 * 8) + 2 * 8 + 10
        )
        of_row = result.imbalance * (8 + 3 * 4 / 2) + 8
        kept = 2 * (10 * of_token + 2 * 20 * of_row)
        self.assertAllClose(result.activations, kept, atol=2)
        self.assertEqual(
            result.memory,
            result.weights
            + result.gradients
            + result.optimizer_state
            + result.activations,
        )

    def test_options(self):
        mesh = {"data": 2, "expert": 4}
        base = plan(configs.SMALL, mesh, 8, 5)
        dense = base.weights // 4 - 2 * 8 * 3 * 8 * 4 // 4
        sharded = plan(configs.SMALL, mesh, 8, 5, shard_dense=True)
        self.assertEqual(base.weights - sharded.weights, 4 * dense * 7 // 8)
        # Two times gathered and once scattered, instead of scattered and
        # gathered.
        of_dense = dense * 4 * 7 // 8
        self.assertEqual(sharded.all_reduce - base.all_reduce, of_dense)
        again = plan(configs.SMALL, mesh, 8, 5, recompute=True)
        self.assertLess(again.activations, base.activations)
        self.assertEqual(again.all_to_all * 2, base.all_to_all * 3)
        self.assertEqual(again.flops * 3, base.flops * 4)
        inference = plan(configs.SMALL, mesh, 8, 5, optimizer=None)
        self.assertEqual(inference.weights, base.weights)
        self.assertEqual(inference.gradients, 0)
        self.assertEqual(inference.optimizer_state, 0)
        self.assertEqual(inference.all_reduce, 0)
        self.assertEqual(inference.all_to_all * 2, base.all_to_all)
        self.assertEqual(inference.flops * 3, base.flops)
        alone = plan(configs.SMALL, {}, 8, 5)
        self.assertEqual(alone.all_to_all, 0)
        self.assertEqual(alone.all_reduce, 0)
        self.assertEqual(alone.imbalance, 1.0)

    @parameterized.parameters(
        ("sgd", 0),
        ("lion", 1),
        ("adam", 2),
        (keras.optimizers.SGD(momentum=0.9), 1),
        (keras.optimizers.Adam(amsgrad=True, use_ema=True), 4),
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()), 2),
    )
    def test_optimizers(self, optimizer, number):
        result = plan(configs.SMALL, {}, 1, 5, optimizer=optimizer)
        self.assertEqual(result.optimizer_state, number * result.weights)

    def test_table(self):
        mesh = {"data": 32, "expert": 64}
        text = str(plan(configs.DEEPSEEK_V3, mesh, 2048, 4096))
        for part in (
            "2,048 = 32 data, 64 expert",
            "671 B, active 37.55 B",
            "all-to-all",
            "58 x moe",
            "32,768",
            "672.0 MiB",
        ):
            self.assertIn(part, text)


class ImbalanceTest(TestCase):
    @parameterized.parameters((1, 4, 64, 8, 2), (4, 8, 16, 16, 4))
    def test_against_simulated_tokens(self, groups, shards, tokens, experts, k):
        config = {
            **configs.SMALL,
            "n_routed_experts": experts,
            "num_experts_per_tok": k,
        }
        mesh = {"data": groups, "expert": shards}
        batch = groups * shards
        result = plan(config, mesh, batch, sequence_length=tokens)
        rng = np.random.default_rng(1)
        busiest = []
        for _ in range(100):
            scores = rng.random((groups, shards * tokens, experts))
            chosen = np.argsort(scores, axis=-1)[..., :k]
            shard = chosen // (experts // shards)
            counts = [np.bincount(s.ravel(), minlength=shards) for s in shard]
            busiest.append(np.max(counts) / (tokens * k))
        self.assertGreater(np.mean(busiest), 1.05)
        excess = np.mean(busiest) - 1
        self.assertAllClose(result.imbalance - 1, excess, rtol=0.1)

    def test_uneven_loads(self):
        loads = [4, 2, 1, 1, 1, 1, 1, 1]
        result = plan(configs.SMALL, {"expert": 4}, 4, 4096, expert_loads=loads)
        # Half of the rows are for the first of four devices.
        self.assertAllClose(result.imbalance, 2.0, rtol=0.01)
        even = plan(configs.SMALL, {"expert": 4}, 4, 4096)
        self.assertLess(even.imbalance, 1.02)


class KerasModelTest(TestCase):
    def test_one_device_is_the_model(self):
        model = small_model()
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)
        result = plan(model, {}, 2, optimizer=model.optimizer)
        trained = 4 * numbers(model.trainable_variables)
        self.assertEqual(result.parameters, trained // 4)
        self.assertEqual(result.weights, 4 * numbers(model.variables))
        self.assertEqual(result.gradients, trained)
        slots = [v for v in model.optimizer.variables if len(v.shape)]
        self.assertEqual(result.optimizer_state, 4 * numbers(slots))
        self.assertEqual(result.tokens, 12)
        # Dense, router, two of eight experts, shared experts, Dense.
        of_layer = 8 * 8 + 2 * 3 * 8 * 16 + 2 * 8 * 12
        products = 4 * 8 + 2 * of_layer + 8 * 3
        self.assertEqual(result.flops_per_token, 2 * products)

    def test_experts_are_divided(self):
        one = plan(small_model(), {}, 8)
        four = plan(small_model(), {"data": 2, "expert": 4}, 8)
        bank = 4 * 3 * 8 * 8 * 16
        self.assertEqual(one.weights - four.weights, 2 * bank * 3 // 4)
        self.assertEqual(one.gradients - four.gradients, 2 * bank * 3 // 4)
        (layer,) = four.layers
        self.assertEqual(layer.num_layers, 2)
        self.assertEqual(layer.num_experts, 2)
        self.assertEqual(layer.rows, 6 * 2)
        # 12 rows of 8 numbers of 4 bytes.
        self.assertEqual(layer.all_to_all, 12 * 8 * 4 * 4 * 3 // 4)

    @parameterized.parameters(
        (keras.layers.MultiHeadAttention(4, 5), 4),
        (keras.layers.GroupQueryAttention(5, 4, 2), 2),
    )
    def test_attention(self, layer, kv_heads):
        inputs = keras.Input((6, 8))
        model = keras.Model(inputs, layer(inputs, inputs))
        result = plan(model, {}, 2, sequence_length=6)
        kernels = 2 * 8 * 5 * (4 + kv_heads)
        pairs = 6 * 4 * 2 * 5
        self.assertEqual(result.flops_per_token, 2 * (kernels + pairs))

    def test_policy_of_the_layers(self):
        full = plan(small_model(), {"expert": 4}, 8)
        half = plan(small_model(dtype="mixed_bfloat16"), {"expert": 4}, 8)
        self.assertEqual(full.weights, half.weights)
        self.assertEqual(full.all_to_all, 2 * half.all_to_all)
        given = plan(small_model(), {"expert": 4}, 8, dtype="bfloat16")
        self.assertEqual(full.weights, 2 * given.weights)

    def test_a_function_allocates_nothing(self):
        built = plan(small_model(), {"expert": 2}, 4)
        planned = plan(lambda: small_model(refuse), {"expert": 2}, 4)
        self.assertEqual(planned, built)
        # Neither do variables that are made later set it off.
        with keras.StatelessScope():
            keras.layers.Dense(2).build((None, 2))

    def test_unbuilt(self):
        # 200 GB of weights.
        model = keras.Sequential([MoE(64, 2**16), keras.layers.Dense(3)])
        result = plan(model, {"expert": 2}, 4, input_shape=(6, 4096))
        self.assertFalse(model.built)
        dense = 4096 * 64 + 4096 * 3 + 3
        self.assertEqual(result.parameters, dense + 64 * 3 * 4096 * 2**16)
        self.assertEqual(result.tokens, 12)

    def test_other_experts_stay_where_they_are(self):
        layer = MoE(
            experts=LayerExperts(keras.layers.Dense(8), 3), statistics=None
        )
        layer.build((None, 6, 8))
        result = plan(layer, {"expert": 2}, 4, sequence_length=6)
        self.assertEqual(result.parameters, 8 * 3 + 3 * (8 * 8 + 8))
        self.assertEqual(result.weights, 4 * result.parameters)
        self.assertEqual(result.all_to_all, 0)
        self.assertEqual(result.flops_per_token, 2 * (8 * 3 + 2 * 8 * 8))

    def test_slots_are_not_sent(self):
        layer = SoftMoE(4, 16, slots_per_expert=2)
        layer.build((None, 6, 8))
        result = plan(layer, {"expert": 2}, 4, sequence_length=6)
        self.assertEqual(result.weights, 4 * numbers(layer.variables))
        self.assertEqual(result.all_to_all, 0)
        # Six tokens are scored for eight slots, which the experts compute.
        of_example = 6 * 8 * 8 + 8 * 3 * 8 * 16
        self.assertEqual(result.flops_per_token, 2 * of_example // 6)

    def test_experts_that_choose(self):
        layer = MoE(router=ExpertChoiceRouter(4, 1.5), intermediate_dim=16)
        layer.build((None, 8, 8))
        result = plan(layer, {"expert": 2}, 4, sequence_length=8)
        # Four experts, three of eight tokens each; two examples a device.
        self.assertEqual(result.layers[0].rows, 2 * 12)


class ErrorsTest(TestCase):
    @parameterized.parameters(
        (dict(mesh={"expert": 3}), r"number of experts of 'moe', 8\..*2 and 4"),
        (dict(mesh={"expert": 16}), r"The nearest that do are 8\. Rec"),
        (dict(mesh={"model": 3}), r"hidden width .* 4\. .* are 2 and 4"),
        (dict(mesh={"data": 8}, batch=12), r"8\. The nearest are 8 and 16\. R"),
        (dict(mesh={"data": 8}, batch=4), r"The nearest are 8\. Received"),
        (dict(mesh={"tensor": 2}), r"`mesh` must be a dict with sizes of the"),
        (dict(mesh=8), r"`mesh` must be a dict"),
        (dict(mesh={"data": 0}), r"`mesh\['data'\]` must be an int of at le"),
        (dict(batch=0), r"`batch` must be an int of at least 1"),
        (dict(sequence_length=None), r"`sequence_length` is needed for a conf"),
        (dict(sequence_length=0), r"`sequence_length` must be an int"),
        (dict(model=3), r"`model` must be a Keras model, a function"),
        (dict(model=lambda: 3), r"`model` must return a model"),
        (
            dict(model=keras.layers.Dense(3)),
            r"`input_shape` is needed for a model that is not built",
        ),
        (dict(model={"hidden_size": 8}), r"entries num_hidden_layers, num_at"),
        (
            dict(model={**configs.SMALL, "num_attention_heads": 3}),
            r"`hidden_size` must be a multiple of `num_attention_heads`",
        ),
        (
            dict(model={**configs.SMALL, "num_attention_heads": 4}),
            None,
        ),
        (
            dict(model={**configs.SMALL, "num_key_value_heads": 3}),
            r"`num_attention_heads` must be a multiple of `num_key_value_heads",
        ),
        (dict(dtype="float5"), r"`dtype` must be something that Keras knows"),
        (dict(optimizer="best"), r"`optimizer` must be something that Keras"),
        (dict(expert_loads=[1.0]), r"`expert_loads` must be one number"),
        (dict(recompute=1), r"`recompute` must be True or False"),
        (dict(shard_dense="all"), r"`shard_dense` must be True or False"),
    )
    def test_errors(self, wrong, message):
        arguments = dict(
            model=configs.SMALL, mesh={}, batch=16, sequence_length=4
        )
        arguments.update(wrong)
        if message is None:  # allowed, so that the others mean something
            self.assertGreater(plan(**arguments).memory, 0)
            return
        with self.assertRaisesRegex(ValueError, message):
            plan(**arguments)
