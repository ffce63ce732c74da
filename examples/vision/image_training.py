"""Trains, tests and reports a classifier of images for the examples here."""

import csv
import json
import math
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time

import image_data
import keras
import numpy as np
from image_options import settings_of
from image_report import draw_routing

import keras_moe

CLASSES = 10
NUM_EXPERTS = 8
TOP_K = 2


def make_model(args, image_shape, moe_layers):
    """A V-MoE, a Soft MoE or their dense twin.

    A patch goes through `TOP_K` experts that are together as wide as the dense
    feed-forward; the experts of the Soft MoE are each as wide, and compute
    together about as many slots as there are patches.
    """
    width = 4 * args.hidden_dim
    sizes = {
        "image_shape": image_shape,
        "patch_size": args.patch_size,
        "num_layers": args.num_layers,
        "num_heads": args.hidden_dim // 32,
        "hidden_dim": args.hidden_dim,
        "use_class_token": False,
        "qk_norm": False,
        "data_format": "channels_last",
        "dtype": "mixed_bfloat16" if args.mixed_precision else "float32",
    }
    if args.model == "vmoe":
        backbone = keras_moe.models.VMoEBackbone(
            **sizes,
            mlp_dim=width // TOP_K,
            num_experts=NUM_EXPERTS,
            top_k=TOP_K,
            moe_layers=moe_layers,
        )
    elif args.model == "soft_moe":
        patches = math.prod(size // args.patch_size for size in image_shape[:2])
        slots = max(round(patches / NUM_EXPERTS), 1)
        backbone = keras_moe.models.SoftMoEBackbone(
            **sizes,
            mlp_dim=width,
            num_experts=NUM_EXPERTS,
            slots_per_expert=slots,
            moe_layers=moe_layers,
        )
    else:
        backbone = keras_moe.models.VMoEBackbone(
            **sizes, mlp_dim=width, moe_layers=[]
        )
    return keras_moe.models.MoEImageClassifier(
        backbone, CLASSES, head_dtype="float32"
    )


def multiplications(model):
    """How many of them a forward pass of one image takes.

    Those of matrix products, the router's and the mixing of slots included.
    """
    config = model.backbone.get_config()
    dim, width = config["hidden_dim"], config["mlp_dim"]
    embedding = model.backbone.get_layer("patch_embedding")
    tokens = embedding.num_tokens
    total = tokens * math.prod(embedding.projection.kernel.shape)
    for i in range(config["num_layers"]):
        total += tokens * dim * (4 * dim + 2 * tokens)  # attention
        layer = model.backbone.block(i).feed_forward
        if isinstance(layer, keras_moe.layers.SoftMoE):
            slots = layer.router.num_experts * layer.router.slots_per_expert
            total += slots * dim * (3 * tokens + 2 * width)
        elif isinstance(layer, keras_moe.layers.MoE):
            router = layer.router
            total += tokens * dim * router.num_experts
            total += tokens * router.top_k * dim * 2 * width
        else:
            total += tokens * dim * 2 * width
    return total + dim * CLASSES


class Images(keras.utils.PyDataset):
    """Batches in a new order each epoch, augmented.

    What an epoch has depends on the seed and its number only, so a run that
    goes on after a kill sees what it would have seen.
    """

    def __init__(self, images, labels, args, scaled):
        super().__init__()
        self.images, self.labels, self.scaled = images, labels, scaled
        self.size, self.shift = args.batch_size, args.shift
        self.seed = args.seed
        self.start_epoch(0)

    def start_epoch(self, epoch):
        self.epoch = epoch
        rng = np.random.default_rng((self.seed, epoch))
        self.order = rng.permutation(len(self.images))

    def __len__(self):
        # Of one size: a smaller batch would be compiled again.
        return len(self.images) // self.size

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, self.epoch, index))
        chosen = self.order[index * self.size : (index + 1) * self.size]
        images = image_data.augmented(self.images[chosen], self.shift, rng)
        return self.scaled(images), one_hot(self.labels[chosen])


def one_hot(labels):
    return keras.utils.to_categorical(labels, CLASSES)


def run(args, load_data, moe_layers, class_names):
    """All that an example does.

    Args:
        args: What `image_options.parse` gave.
        load_data: Function from `"train"` or `"test"` to images and labels.
        moe_layers: As for the backbones.
        class_names: list of str.
    """
    start = time.perf_counter()
    try:
        images, labels = load_data("train")
    except (OSError, ValueError) as error:
        sys.exit(f"--data: {error}")
    if args.validation + args.batch_size > len(images):
        sys.exit(
            f"--validation {args.validation} leaves no batch of "
            f"{args.batch_size} of the {len(images)} training images."
        )
    order = np.random.default_rng(0).permutation(len(images))
    held_out, kept = np.split(order, [args.validation])
    pixels = images[kept].reshape(-1, images.shape[-1]) / np.float32(255)
    mean, deviation = pixels.mean(0), pixels.std(0)
    del pixels

    def scaled(x):
        return (x / np.float32(255) - mean) / deviation

    keras.utils.set_random_seed(args.seed)
    model = make_model(args, images.shape[1:], moe_layers)
    cost = multiplications(model)
    print(
        f"{args.model} on {args.backend}: {model.count_params():,} parameters, "
        f"{cost / 1e6:.2f} million multiplications an image; {len(kept):,} "
        f"images to train, {len(held_out):,} to validate",
        flush=True,
    )
    train = Images(images[kept], labels[kept], args, scaled)
    valid = scaled(images[held_out]), one_hot(labels[held_out])
    rows = fit(args, model, train, valid)
    model = keras.models.load_model(args.output / "model.keras")

    def accuracy(x, labels):
        predicted = model.predict(x, args.batch_size, verbose=0)
        return float((predicted.argmax(-1) == labels).mean())

    best = max(rows, key=lambda row: row["val_accuracy"])
    summary = {
        "command": shlex.join(["python", *sys.argv]),
        **vars(args),
        "moe_layers": model.backbone.moe_blocks,
        "train_images": len(kept),
        "parameters": model.count_params(),
        "multiplications": cost,
        "mean": mean.tolist(),
        "deviation": deviation.tolist(),
        "epochs_trained": len(rows),
        "best_epoch": best["epoch"] + 1,
        "validation_accuracy": accuracy(valid[0], labels[held_out]),
        "test_accuracy": None,
        "training_seconds": round(sum(row["seconds"] for row in rows), 1),
        "processor_seconds": round(sum(row["processor"] for row in rows), 1),
        "history": rows,
        "versions": {
            "python": platform.python_version(),
            args.backend: sys.modules[args.backend].__version__,
            **{x.__name__: x.__version__ for x in (keras, keras_moe, np)},
        },
    }
    if not args.no_test:
        test_images, test_labels = load_data("test")
        summary["test_images"] = len(test_images)
        summary["test_accuracy"] = accuracy(scaled(test_images), test_labels)
    files = ["model.keras", "log.csv", "summary.json"]
    with tempfile.TemporaryDirectory(dir=args.output) as folder:
        path = os.path.join(folder, "summary.json")
        with open(path, "w") as file:
            json.dump(summary, file, indent=2, default=str)
        os.replace(path, args.output / "summary.json")
        if model.backbone.moe_blocks:
            # The images are those held out: they were not trained on.
            path = os.path.join(folder, "routing.png")
            shown = held_out[:1000]
            bits = draw_routing(
                path, model, images[shown], scaled, labels[shown], class_names
            )
            os.replace(path, args.output / "routing.png")
            files.append("routing.png")
            for block, (place, label) in bits.items():
                print(
                    f"block {block}: a patch's place tells {place:.2f} bits of "
                    f"its expert, its image's class {label:.2f}"
                )
    print(
        f"validation accuracy {summary['validation_accuracy']:.2%} "
        f"(epoch {summary['best_epoch']} of {len(rows)})"
    )
    if not args.no_test:
        print(f"test accuracy {summary['test_accuracy']:.2%}")
    print(
        f"{summary['training_seconds']:.0f} s of training, "
        f"{summary['processor_seconds']:.0f} s of a processor core, "
        f"{time.perf_counter() - start:.0f} s in all"
    )
    print(f"Written to {args.output}: {', '.join(files)}")


def fit(args, model, train, valid):
    """Trains, and leaves the best epoch in `model.keras`.

    Returns:
        What `log.csv` has: a dict for each epoch.
    """
    steps = args.epochs * len(train)
    warmup = min(len(train) // 4, steps // 2) + 1
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        max(steps - warmup, 1),
        warmup_target=args.learning_rate,
        warmup_steps=warmup,
    )
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=0.05),
        keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    checkpoints = Checkpoints(args, train)
    initial_epoch = checkpoints.resume(model) if args.resume else 0
    if not initial_epoch:
        checkpoints.clear()
    model.fit(
        train,
        epochs=args.epochs,
        initial_epoch=initial_epoch,
        validation_data=valid,
        validation_batch_size=args.batch_size,
        callbacks=[checkpoints],
        shuffle=False,  # `train` does
        # A bar that moves is a mess in a file: one line an epoch.
        verbose=1 if sys.stdout.isatty() else 2,
    )
    checkpoints.finish()
    return checkpoints.rows


class Checkpoints(keras.callbacks.Callback):
    """Keeps after each epoch what a run needs that goes on from there.

    Like `ModelCheckpoint`, `EarlyStopping`, `CSVLogger` and `BackupAndRestore`
    together, but no file is ever half written, and the patience and the best
    epoch so far outlive a kill.
    """

    def __init__(self, args, train):
        super().__init__()
        self.args, self.train, self.rows = args, train, []
        self.folder = args.output
        self.backup = args.output / "backup"
        self.log = args.output / "log.csv"

    def clear(self):
        """Removes what an earlier run left."""
        shutil.rmtree(self.backup, ignore_errors=True)
        for name in ("log.csv", "model.keras", "summary.json", "routing.png"):
            (self.folder / name).unlink(missing_ok=True)
        self.backup.mkdir()
        self._write(
            self.backup / "settings.json",
            lambda path: path.write_text(json.dumps(settings_of(self.args))),
        )

    def resume(self, model):
        """Makes the model what it was; returns how many epochs it has had."""
        latest = self.backup / "latest.weights.h5"
        if not latest.exists():
            return 0
        model.optimizer.build(model.trainable_variables)
        model.load_weights(latest)
        epochs = int(model.optimizer.iterations) // len(self.train)
        with self.log.open() as file:
            rows = list(csv.DictReader(file))[:epochs]
        for row in rows:
            values = {key: float(value) for key, value in row.items()}
            self.rows.append({**values, "epoch": int(row["epoch"])})
        print(f"Going on after epoch {epochs}.", flush=True)
        return epochs

    def finish(self):
        os.replace(self._model_of(self._best()), self.folder / "model.keras")
        shutil.rmtree(self.backup)

    def on_epoch_begin(self, epoch, logs=None):
        self.train.start_epoch(epoch)
        self.start = time.perf_counter(), time.process_time()

    def on_epoch_end(self, epoch, logs=None):
        now = time.perf_counter(), time.process_time()
        kept = ("loss", "accuracy", "val_loss", "val_accuracy")
        before = self._best() if self.rows else None
        self.rows.append(
            {
                "epoch": epoch,
                **{key: float(logs[key]) for key in kept},
                "seconds": now[0] - self.start[0],
                "processor": now[1] - self.start[1],
            }
        )
        best = self._best()
        if best == epoch:
            self._write(self._model_of(epoch), self.model.save)
        self._write(self.log, self._save_log)
        self._write(self.backup / "latest.weights.h5", self.model.save_weights)
        # From here on a run would go on after this epoch.
        if before not in (None, best):
            self._model_of(before).unlink()
        patience = self.args.patience
        self.model.stop_training = bool(patience and epoch - best >= patience)

    def _best(self):
        return max(self.rows, key=lambda row: row["val_accuracy"])["epoch"]

    def _model_of(self, epoch):
        return self.backup / f"{epoch}.keras"

    def _write(self, path, save):
        """Saves beside the path and then renames."""
        unfinished = path.with_name(f"unfinished-{path.name}")
        save(unfinished)
        os.replace(unfinished, path)

    def _save_log(self, path):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
