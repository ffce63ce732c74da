import math

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import losses
from keras_moe import routers
from keras_moe.conversion import set_eval_top_k
from keras_moe.models import VMoEBackbone
from tests.test_case import TestCase
from tests.vision.models.tiny import IMAGES
from tests.vision.models.tiny import dtype_of
from tests.vision.models.tiny import randomize
from tests.vision.models.tiny import soft_moe
from tests.vision.models.tiny import v_moe


def moe_of(backbone, block=1):
    return backbone.block(block).feed_forward


class PlacementTest(TestCase):
    @parameterized.parameters(
        (v_moe, "every_2", 6, [1, 3, 5]),
        (v_moe, "last_2", 8, [5, 7]),
        (v_moe, "last_2", 5, [1, 3]),
        (v_moe, [4, 0], 5, [0, 4]),
        (v_moe, [], 2, []),
        (soft_moe, None, 5, [2, 3, 4]),
        (soft_moe, "last_3", 6, [3, 4, 5]),
        (soft_moe, "every_2", 4, [1, 3]),
    )
    def test_blocks(self, make, moe_layers, num_layers, wanted):
        backbone = make(moe_layers=moe_layers, num_layers=num_layers)
        self.assertEqual(backbone.moe_blocks, wanted)

    def test_lists(self):
        backbone = v_moe(
            num_layers=4,
            num_experts=[2, 6],
            top_k=[1, 3],
            capacity_factor=[1.5, None],
            eval_capacity_factor=[math.inf, 3.0],
            router=["v_moe", "top_k"],
            router_noise=[2.0, None],
        )
        first, second = moe_of(backbone), moe_of(backbone, 3)
        self.assertEqual((first.num_experts, second.num_experts), (2, 6))
        self.assertEqual((first.router.top_k, second.router.top_k), (1, 3))
        self.assertEqual(first.router.noise_stddev, 1.0)
        self.assertIsInstance(second.router, routers.TopKRouter)
        self.assertEqual(first.capacity.capacity_factor, 1.5)
        self.assertFalse(first.capacity.limits(training=False))
        self.assertFalse(second.capacity.limits(training=True))
        self.assertEqual(second.capacity.eval_capacity_factor, 3.0)
        soft = soft_moe(moe_layers=[0, 1], num_experts=[2, 3])
        self.assertEqual(moe_of(soft, 0).num_experts, 2)
        self.assertEqual(moe_of(soft, 1).num_experts, 3)

    def test_router_object(self):
        """Each block has its own copy, and they stay apart after loading."""
        router = routers.TopKRouter(4, top_k=1, jitter=0.1)
        backbone = v_moe(router=router, moe_layers=[0, 1])
        found = [moe_of(backbone, i).router for i in (0, 1)]
        self.assertLen({id(r) for r in (router, *found)}, 3)
        for own in found:
            self.assertEqual((own.top_k, own.jitter), (1, 0.1))
        again = VMoEBackbone.from_config(backbone.get_config())
        self.assertEqual(moe_of(again, 0).router.jitter, 0.1)
        backbone = v_moe(
            router=[router, routers.ExpertChoiceRouter(4)],
            losses=[losses.RouterZLoss(0.1)],
            moe_layers=[0, 1],
        )
        again = VMoEBackbone.from_config(
            keras.saving.serialize_keras_object(backbone)["config"]
        )
        self.assertIsInstance(moe_of(again).router, routers.ExpertChoiceRouter)
        self.assertEqual(moe_of(again).routing_losses[0].weight, 0.1)

    def test_losses(self):
        def kinds(**kwargs):
            return [
                (type(loss).__name__, loss.weight, loss.per)
                for loss in moe_of(v_moe(**kwargs)).routing_losses
            ]

        both = [
            ("ImportanceLoss", 5e-3, "batch"),
            ("LoadLoss", 5e-3, "batch"),
        ]
        self.assertEqual(kinds(), both)
        # A router without a load has none to balance.
        self.assertEqual(kinds(router="top_k"), both[:1])
        self.assertEqual(kinds(router="expert_choice"), [])
        self.assertEqual(
            kinds(
                importance_loss_weight=0,
                load_loss_weight=0,
                load_balancing_loss_weight=0.1,
                group_size="image",
                losses=losses.LoadBalancingLoss(0.2),
            ),
            [
                ("LoadBalancingLoss", 0.1, "sequence"),
                ("LoadBalancingLoss", 0.2, "batch"),
            ],
        )


class VMoEBackboneTest(TestCase):
    def test_names(self):
        for make, name in ((v_moe, "v_moe"), (soft_moe, "soft_moe")):
            self.assertRegex(make().name, rf"^{name}_backbone(_\d+)?$")
            self.assertEqual(make(name="mine").name, "mine")
        self.assertFalse(v_moe(trainable=False).trainable)

    @parameterized.named_parameters(
        ("v_moe", v_moe, {"num_shared_experts": 1, "qk_norm": True}),
        ("image_groups", v_moe, {"group_size": "image", "router": "st_moe"}),
        ("any_groups", v_moe, {"group_size": 7, "eval_capacity_factor": 1.0}),
        (
            "expert_choice",
            v_moe,
            {"router": "expert_choice", "group_size": "image"},
        ),
        ("by_image", v_moe, {"route_per": "image", "positions": "sincos"}),
        ("soft_moe", soft_moe, {"drop_path": 0.1, "router_noise": 0.1}),
        (
            "own_router",
            v_moe,
            {"router": routers.TopKRouter(4), "moe_layers": [0, 1]},
        ),
    )
    def test_saved(self, make, options):
        backbone = randomize(make(**options))
        wanted = ops.convert_to_numpy(backbone(IMAGES))
        self.assertEqual(wanted.shape, (5, *backbone.output_shape[1:]))
        path = self.get_temp_dir() + "/model.keras"
        backbone.save(path)
        loaded = keras.saving.load_model(path)
        if "own_router" not in self.id():
            self.assertEqual(loaded.get_config(), backbone.get_config())
        self.assert_relative(loaded(IMAGES), wanted)
        if options.get("eval_capacity_factor"):
            return  # tokens of several images compete
        # An image does not depend on the rest of the batch.
        others = IMAGES * np.array([2, -1, 1, 0, 3], "float32").reshape(
            5, 1, 1, 1
        )
        outputs = ops.convert_to_numpy(backbone(others))
        self.assert_relative(outputs[2], wanted[2])
        self.assertGreater(np.abs(outputs[0] - wanted[0]).max(), 1e-3)

    @parameterized.parameters(v_moe, soft_moe)
    def test_channels_first(self, make):
        backbone = randomize(make())
        first = make(image_shape=(3, 8, 8), data_format="channels_first")
        first.set_weights(backbone.get_weights())
        wanted = ops.convert_to_numpy(backbone(IMAGES))
        self.assert_relative(first(IMAGES.transpose(0, 3, 1, 2)), wanted)

    def test_half_precision(self):
        single = randomize(v_moe(router="top_k"))
        half = v_moe(router="top_k", dtype="mixed_bfloat16")
        half.set_weights(single.get_weights())
        outputs = half(IMAGES)
        self.assertEqual(dtype_of(outputs), "bfloat16")
        difference = ops.convert_to_numpy(
            ops.cast(outputs, "float32") - single(IMAGES)
        )
        self.assertLess(np.median(np.abs(difference)), 0.1)
        self.assertEqual(
            {v.dtype for v in half.trainable_variables}, {"float32"}
        )
        policies = keras.dtype_policies.DTypePolicyMap("float32")
        policies["block_1/moe"] = keras.DTypePolicy("bfloat16")
        mixed = v_moe(dtype=policies)
        self.assertEqual(moe_of(mixed).compute_dtype, "bfloat16")
        self.assertEqual(dtype_of(mixed(IMAGES)), "float32")
        again = VMoEBackbone.from_config(mixed.get_config())
        self.assertEqual(moe_of(again).compute_dtype, "bfloat16")

    def test_ids_of_tasks(self):
        router = routers.TaskRouter(4, num_tasks=2, top_k=1)
        backbone = randomize(v_moe(router=router))
        self.assertEqual(
            [i.name for i in backbone.inputs], ["images", "task_ids"]
        )
        first, second = (
            ops.convert_to_numpy(backbone([IMAGES, np.array(ids, "int32")]))
            for ids in ([0, 1, 0, 0, 0], [1, 1, 0, 0, 1])
        )
        # The images whose task is another.
        changed = np.abs(first - second).max(axis=(1, 2)) > 1e-3
        self.assertEqual(changed.tolist(), [True, False, False, False, True])

    def test_eval_top_k(self):
        backbone = randomize(v_moe(top_k=2))
        set_eval_top_k(backbone, 1)
        self.assertEqual(moe_of(backbone).router.eval_top_k, 1)

    def test_frozen_parts(self):
        backbone = v_moe()
        backbone.block(0).trainable = False
        moe_of(backbone).router.trainable = False
        again = VMoEBackbone.from_config(backbone.get_config())
        for before, after in zip(backbone.weights, again.weights, strict=True):
            self.assertEqual(before.trainable, after.trainable, before.path)

    @parameterized.named_parameters(
        ("sizes", {"image_shape": (8, 10, 3)}, r"must divide .* \(8, 10\)"),
        ("shape", {"image_shape": (8, 8)}, "`image_shape` must be three"),
        ("layers", {"num_layers": 0}, "`num_layers` must be an int"),
        ("heads", {"num_heads": 3}, "`num_heads` must divide `hidden_dim`"),
        ("beyond", {"moe_layers": [1, 2]}, "Received: moe_layers=.1, 2."),
        ("twice", {"moe_layers": [1, 1]}, "different ints from 0"),
        ("last", {"moe_layers": "last_2"}, "with n from 1 to 1"),
        ("word", {"moe_layers": "first"}, "`moe_layers` must be"),
        ("list", {"num_experts": [2, 2]}, "each of the 1 blocks"),
        ("router", {"router": "unheard"}, "`router` must be one of"),
        ("object", {"router": routers.TopKRouter(3)}, "must agree"),
        ("noise", {"router_noise": -1}, "`router_noise` must be"),
        ("capacity", {"capacity_factor": 0}, "`capacity_factor` must be"),
        ("policy", {"drop_policy": "x"}, "`drop_policy` must be one of"),
        ("group", {"group_size": 0}, "`group_size` must be an int"),
        ("shared", {"num_shared_experts": -1}, "`num_shared_experts` must be"),
        ("drop_path", {"drop_path": 1}, "`drop_path` must be a number"),
        ("positions", {"positions": "x"}, "`positions` must be one of"),
    )
    def test_errors(self, arguments, words):
        with self.assertRaisesRegex(ValueError, words):
            v_moe(**arguments)

    def test_wrong_images(self):
        with self.assertRaises(ValueError):
            v_moe()(np.zeros((1, 8, 8, 1)))
        for make in (v_moe, soft_moe):
            with self.assertRaisesRegex(TypeError, "unheard"):
                make(unheard=1)
