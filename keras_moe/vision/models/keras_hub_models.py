"""The vision models as models of keras-hub."""

import functools

import keras

from keras_moe.moe.part_arguments import default_name
from keras_moe.vision.models.image_backbone import ImageBackbone
from keras_moe.vision.models.image_backbone import subclasses_of
from keras_moe.vision.models.image_classifier import MoEImageClassifier


@functools.cache
def register_with_keras_hub():
    """Makes keras-hub load our vision presets as models of its own.

    After the call, `keras_hub.models.Backbone.from_preset` and
    `keras_hub.models.ImageClassifier.from_preset` take the folders that
    `save_to_preset` of our backbones and classifiers wrote, and Keras loads
    the models of all files as the classes that are returned. These are
    subclasses of ours and of keras-hub's, with the same weights, arguments and
    files. A classifier among them preprocesses as keras-hub's do, outside of
    the graph, where its `preprocessor` is one of keras-hub.

    It imports keras-hub, which takes seconds. A second call does nothing more.

    Returns:
        dict of names, such as `"VMoEBackbone"` and `"VMoEImageClassifier"`, to
        classes. Each backbone has a classifier here, and
        `"MoEImageClassifier"` takes any of them.

    Raises:
        ImportError: If keras-hub is not installed.

    Example:

    ```python
    keras_moe.models.register_with_keras_hub()
    model = keras_hub.models.ImageClassifier.from_preset(
        "folder", num_classes=10
    )
    ```
    """
    try:
        import keras_hub
    except ImportError as error:
        raise ImportError(
            "`register_with_keras_hub` needs keras-hub: "
            "`pip install keras-hub`."
        ) from error
    task = _task(keras_hub)
    plain = {x.__name__: x for x in subclasses_of(MoEImageClassifier)}
    found, classifiers = {}, []

    def save_to_preset(self, folder, max_shard_size=10):
        keras_hub.models.Backbone.save_to_preset(
            self, str(folder), max_shard_size
        )

    for ours in subclasses_of(ImageBackbone):
        if not keras.saving.get_registered_name(ours).startswith("keras_moe>"):
            continue  # a base class
        if hasattr(ours, "of_class"):
            continue  # an upcycled one, made below
        backbone = _registered(
            ours.__name__,
            (ours, keras_hub.models.Backbone),
            {"save_to_preset": save_to_preset},
        )
        name = f"{ours.__name__.removesuffix('Backbone')}ImageClassifier"
        bases = [task]
        # A classifier on an upcycled backbone is saved as one on a plain one.
        for other in ours.__subclasses__():
            if hasattr(other, "of_class"):
                upcycled = other.of_class(backbone)
                bases = [_classifier(f"Upcycled{name}", bases, upcycled)]
        if name in plain:
            bases.append(plain[name])
        classifier = _classifier(name, bases, backbone)
        found[ours.__name__], found[name] = backbone, classifier
        classifiers.append(classifier)
    # keras-hub looks for a class for a backbone, and then whether the saved one
    # is a subclass of it.
    found["MoEImageClassifier"] = _registered(
        "MoEImageClassifier",
        tuple(classifiers),
        {
            "backbone_cls": None,
            "backbone_class": ImageBackbone,
            "presets": MoEImageClassifier.presets,
        },
    )
    return found


def _classifier(name, bases, backbone):
    classes = {"backbone_cls": backbone, "backbone_class": backbone}
    return _registered(
        name, tuple(bases), {**classes, "presets": backbone.presets}
    )


def _registered(name, bases, attributes):
    """A class that Keras loads under our saved name."""
    made = type(bases[0])(
        name,
        bases,
        {"__module__": __name__, "__doc__": bases[0].__doc__, **attributes},
    )
    return keras.saving.register_keras_serializable("keras_moe")(made)


def _task(keras_hub):
    """The base of our classifiers as tasks of keras-hub."""

    class Graph(keras_hub.models.ImageClassifier):
        """The place of its constructor, which would make another graph."""

        def __init__(self, *args, **kwargs):
            super(keras_hub.models.ImageClassifier, self).__init__(
                *args, compile=False, **kwargs
            )

    class Task(MoEImageClassifier, Graph):
        def __init__(self, *args, compile=True, name=None, **kwargs):
            name = name or default_name(type(self).__name__)
            super().__init__(*args, name=name, **kwargs)
            if compile:
                self.compile()

        @classmethod
        def is_in_graph(cls, preprocessor):
            return not isinstance(preprocessor, keras_hub.models.Preprocessor)

        def preprocess_samples(self, x, y=None, sample_weight=None):
            if self.preprocessor is None or self.is_in_graph(self.preprocessor):
                return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
            return super().preprocess_samples(x, y, sample_weight)

        def save_to_preset(self, folder, max_shard_size=10):
            keras_hub.models.Task.save_to_preset(
                self, str(folder), max_shard_size
            )

    return Task
