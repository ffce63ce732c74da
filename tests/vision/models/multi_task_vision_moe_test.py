import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.models import MultiTaskModel
from keras_moe.models import MultiTaskVisionMoE
from keras_moe.models import TaskSpec
from keras_moe.models import VMoEBackbone
from keras_moe.routers import TaskRouter
from tests.test_case import TestCase
from tests.vision.models.image_classifier_test import counted
from tests.vision.models.tiny import IMAGES
from tests.vision.models.tiny import SIZES
from tests.vision.models.tiny import dtype_of
from tests.vision.models.tiny import randomize

LABELS = {
    "kind": np.array([0, 1, 2, 0, 1]),
    "size": np.array([0.1, 0.5, 0.2, 0.9, 0.3], "float32"),
}


def multi_task(tasks=None, **kwargs):
    tasks = tasks or {"kind": 3, "size": 1}
    return MultiTaskVisionMoE(tasks, **{**SIZES, "top_k": 2, **kwargs})


def numpy_of(outputs):
    return {name: ops.convert_to_numpy(y) for name, y in outputs.items()}


class MultiTaskVisionMoETest(TestCase):
    @parameterized.parameters(2, 3)
    def test_each_task_is_a_transformer(self, num_layers):
        """As one whose router is told the task, which computes all blocks."""
        router = TaskRouter(
            4, num_tasks=3, normalize_weights=False, name="router"
        )
        backbone = VMoEBackbone(
            **{**SIZES, "num_layers": num_layers},
            moe_layers="every_2",
            router=router,
            activation="gelu",
        )
        model = multi_task(
            {"a": 3, "b": keras.layers.Dense(2, "softmax"), "c": 1},
            num_layers=num_layers,
            pooling="gap",
            expert_dim=SIZES["mlp_dim"],
        )
        randomize(model)
        weights = {
            w.path: ops.convert_to_numpy(w) for w in model.trainable_variables
        }
        for variable in backbone.trainable_variables:
            variable.assign(weights.pop(variable.path))
        found = numpy_of(model(IMAGES))
        kernels = list(weights.values())  # of the heads
        self.assertLen(kernels, 6)
        for task, name in enumerate("abc"):
            ids = np.full(5, task, "int32")
            tokens = ops.convert_to_numpy(backbone([IMAGES, ids]))
            kernel, bias = kernels[2 * task : 2 * task + 2]
            wanted = tokens[:, 1:].mean(1) @ kernel + bias
            if name == "b":
                wanted = ops.convert_to_numpy(ops.softmax(wanted))
            self.assert_relative(found[name], wanted)

    def test_blocks_before_the_experts_run_once(self):
        model = multi_task(num_layers=4, moe_layers=[2])
        calls = []
        for number in range(4):
            block = model.block(number)
            block.call = self.counting(block.call, calls, number)
        model(IMAGES)
        self.assertEqual(calls, [(0, 5), (1, 5), (2, 10), (3, 10)])

    def counting(self, call, calls, number):
        def counted(x, *args, **kwargs):
            calls.append((number, len(x)))
            return call(x, *args, **kwargs)

        return counted

    @parameterized.named_parameters(
        ("per_task", {}),
        ("vector", {"router": "task_vector", "task_dim": 5}),
        ("tokens", {"pooling": None, "final_norm": False}),
        ("gap", {"pooling": "gap", "num_experts": [4], "qk_norm": True}),
    )
    def test_saved(self, options):
        head = keras.layers.Dense(2, "tanh", name="last")
        model = randomize(multi_task({"kind": 3, "size": head}, **options))
        wanted = numpy_of(model(IMAGES))
        pooled = options.get("pooling", "token") is not None
        tokens = () if pooled else (5,)
        self.assertEqual(wanted["size"].shape, (5, *tokens, 2))
        path = self.get_temp_dir() + "/model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        found = numpy_of(loaded(IMAGES))
        for task in wanted:
            self.assert_relative(found[task], wanted[task])
        # Each task and each image goes its own way.
        again = MultiTaskVisionMoE.from_config(model.get_config())
        again.set_weights(model.get_weights())
        found = numpy_of(again(IMAGES[:2]))
        for task in wanted:
            self.assert_relative(found[task], wanted[task][:2])

    @parameterized.parameters("per_task", "task_vector")
    def test_tasks_are_routed_apart(self, router):
        """The same head on the tokens of both tasks."""
        model = multi_task(
            {name: keras.layers.Identity() for name in "ab"}, router=router
        )
        found = numpy_of(randomize(model)(IMAGES))
        self.assertGreater(np.abs(found["a"] - found["b"]).max(), 1e-3)

    def test_fit(self):
        model = multi_task(num_layers=4, router_noise=1.0, drop_path=0.1)
        model.compile(
            keras.optimizers.Adam(0.01),
            loss={
                "kind": keras.losses.SparseCategoricalCrossentropy(
                    from_logits=True
                ),
                "size": "mse",
            },
            # XLA on TensorFlow takes a minute to compile it.
            jit_compile=keras.config.backend() == "jax",
        )
        history = model.fit(IMAGES, LABELS, epochs=6, verbose=0).history
        self.assertLess(history["loss"][-1], history["loss"][0])
        self.assertIn("routing_max_violation", history)
        model(IMAGES, training=True)
        self.assertLen(model.losses, 2)  # one of each block

    def test_with_tasks_of_which_labels_are_missing(self):
        tasks = [
            TaskSpec("kind", "multiclass", num_classes=3),
            TaskSpec("size", "regression"),
        ]
        heads = {
            task.name: keras.layers.Dense(task.output_dim, task.activation)
            for task in tasks
        }
        net = multi_task(heads)
        model = MultiTaskModel(net.input, net.output, tasks)
        model.compile(
            "adam",
            task_weighting="uncertainty",
            jit_compile=keras.config.backend() == "jax",
        )
        labels = {
            "kind": np.array([0, np.nan, 2, np.nan, 1]),
            "size": np.full(5, np.nan),
        }
        labels["size"][3] = 0.5
        history = model.fit(IMAGES, labels, verbose=0, epochs=2).history
        for name in ("loss", "kind_loss", "size_loss"):
            self.assertTrue(np.isfinite(history[name]).all(), name)
        path = self.get_temp_dir() + "/model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        wanted = numpy_of(model(IMAGES))
        for task, y in numpy_of(loaded(IMAGES)).items():
            self.assert_relative(y, wanted[task])

    def test_channels_first(self):
        model = randomize(multi_task())
        other = multi_task(image_shape=(3, 8, 8), data_format="channels_first")
        other.set_weights(model.get_weights())
        wanted = numpy_of(model(IMAGES))
        found = numpy_of(other(IMAGES.transpose(0, 3, 1, 2)))
        for task in wanted:
            self.assert_relative(found[task], wanted[task])

    @parameterized.parameters("per_task", "task_vector")
    def test_half_precision(self, router):
        model = multi_task(dtype="mixed_bfloat16", router=router)
        outputs = model(IMAGES)
        self.assertEqual(dtype_of(outputs["kind"]), "bfloat16")
        values = ops.convert_to_numpy(ops.cast(outputs["kind"], "float32"))
        self.assertTrue(np.isfinite(values).all())

    def test_preset(self):
        """DeiT-S with 16 experts of width 384 in six of its blocks."""

        def make(name):
            return MultiTaskVisionMoE.from_preset(name, tasks={"a": 1, "b": 2})

        dim, experts = 384, 16
        dense = 2 * dim * 1536 + 1536 + dim
        moe = experts * (2 * dim * dim + 2 * dim) + 2 * dim * experts
        every = 4 * (dim + 1) * dim + 4 * dim
        ends = (16 * 16 * 3 + 1 + 1 + 197 + 2) * dim + (dim + 1) * 3
        self.assertEqual(
            counted(make, "m3vit_s16_e16"),
            12 * every + 6 * (dense + moe) + ends,
        )

    @parameterized.named_parameters(
        ("none", {"tasks": {}}, "`tasks` must be a dict"),
        ("list", {"tasks": ["a"]}, "`tasks` must be a dict"),
        ("name", {"tasks": {"a/b": 1}}, "`tasks` must be a string"),
        ("width", {"tasks": {"a": 0}}, r"`tasks\['a'\]` must be an int"),
        ("router", {"router": "top_k"}, "`router` must be one of"),
        ("pooling", {"pooling": "map"}, "`pooling` must be one of"),
        ("norm", {"final_norm": 1}, "`final_norm` must be True or False"),
        ("vector", {"task_dim": 0}, "`task_dim` must be an int"),
        ("noise", {"router_noise": -1}, "`router_noise` must be a finite"),
        ("experts", {"num_experts": [4, 4]}, "each of the 1 blocks"),
        ("expert_dim", {"expert_dim": 0}, "`expert_dim` must be an int"),
        ("top_k", {"top_k": 5}, "`top_k` must be an int between 1 and"),
        ("loss", {"importance_loss_weight": -1}, "`weight` must be"),
        ("heads", {"num_heads": 3}, "`num_heads` must divide"),
    )
    def test_errors(self, arguments, words):
        arguments = {"tasks": {"a": 1}, "top_k": 2, **SIZES, **arguments}
        with self.assertRaisesRegex(ValueError, words):
            MultiTaskVisionMoE(**arguments)

    def test_one_head_for_two_tasks(self):
        head = keras.layers.Dense(1)
        with self.assertRaisesRegex(ValueError, "a layer of its own"):
            multi_task({"a": head, "b": head})
