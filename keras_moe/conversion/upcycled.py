"""Layers and models whose class does not know of the experts in them."""

import inspect
import sys

import keras

from keras_moe.conversion.dense_network import TakenBlock
from keras_moe.conversion.feed_forwards import held_feed_forwards
from keras_moe.conversion.sublayers import name_scope_of
from keras_moe.conversion.sublayers import replace
from keras_moe.conversion.sublayers import with_sublayers
from keras_moe.moe.model_config import freeze
from keras_moe.moe.part_arguments import serialize_part
from keras_moe.vision.layers.encoder_block import EncoderBlock
from keras_moe.vision.models.soft_moe_backbone import SoftMoEBackbone
from keras_moe.vision.models.vmoe_backbone import VMoEBackbone

# What can be loaded upcycled in a process that has upcycled nothing.
_OWN = (VMoEBackbone, SoftMoEBackbone)
_OF_KERAS_HUB = (
    *("ViTBackbone", "DeiTBackbone", "DINOV2Backbone", "DINOV3Backbone"),
    *("SigLIPVisionEncoder", "CLIPVisionEncoder", "MetaCLIP2VisionEncoder"),
    *("SigLIPBackbone", "CLIPBackbone", "TransformerEncoder"),
    *("ViTImageClassifier", "DeiTImageClassifier"),
)
_KEYS = ("module", "class_name", "registered_name")
_MADE = {}


class Upcycled:
    """Mixin of classes whose dense feed-forwards gave way to experts.

    The configuration is that of the class itself, and, under `"upcycled"`, the
    class and the experts. A model is made as its class makes it, then the
    experts are put in, as `upcycle` did.
    """

    def get_config(self):
        config = {**data_format_of(self), **super().get_config()}
        return {**config, "upcycled": self._upcycled_config()}

    def _upcycled_config(self):
        original, build, experts = self._upcycled()
        return {
            "original": original,
            "build": build,
            "experts": {
                str(i): serialize_part(layer) for i, layer in experts.items()
            },
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        upcycled = config.pop("upcycled")
        frozen = {
            key: config.pop(key)
            for key in ("frozen_layers", "frozen_weights")
            if key in config
        }
        layer = keras.saving.deserialize_keras_object(
            {**upcycled["original"], "config": config}, custom_objects
        )
        if not layer.built:
            layer.build_from_config(upcycled["build"])
        experts = {
            int(i): keras.saving.deserialize_keras_object(part, custom_objects)
            for i, part in upcycled["experts"].items()
        }
        put_experts(layer, experts)
        freeze(layer, frozen)
        return layer


def upcycled_class(original):
    """The class of upcycled models, or layers, of a class.

    It is a subclass, and registered with Keras, so that what it made can be
    loaded. For the backbones of this library, and for the vision encoders of
    keras-hub, importing this library does that, with one exception: before
    `from_preset` of a keras-hub class, import keras-hub first, or call this.

    Args:
        original: A class of models or layers.

    Returns:
        A class `Upcycled...`.

    Example:

    >>> cls = keras_moe.conversion.upcycled_class(keras_moe.models.VMoEBackbone)
    >>> cls.__name__
    'UpcycledVMoEBackbone'
    """
    if not isinstance(original, type) or not issubclass(
        original, keras.layers.Layer
    ):
        raise ValueError(
            "`original` must be a class of layers or models. "
            f"Received: original={original!r}"
        )
    if issubclass(original, Upcycled):
        return original
    if original not in _MADE:
        name = f"Upcycled{original.__name__}"
        members = {"__module__": __name__, "__doc__": original.__doc__}
        # A classifier of keras-hub is found by the class of its backbone.
        backbone = getattr(original, "backbone_cls", None)
        if backbone is not None:
            members["backbone_cls"] = upcycled_class(backbone)
        made = type(name, (Upcycled, original), members)
        _MADE[original] = _register(name, made)
    return _MADE[original]


def put_experts(layer, experts):
    """Puts layers in the place of the feed-forwards in a layer.

    The class becomes the upcycled one.

    Args:
        layer: A built layer or model that is no plain graph.
        experts: dict of numbers of feed-forwards to layers, built or not.
    """
    found, _ = held_feed_forwards(layer)
    for number, part in experts.items():
        place = found[number]
        if isinstance(place, TakenBlock):
            continue  # its own configuration has brought the experts
        with name_scope_of(place.owner):
            if not part.built:
                part.build((None, None, place.input_dim))
        replace(layer, place.owner, place.attribute, part)
        for owner, attribute in place.removed:
            nothing = keras.layers.Identity(name=getattr(owner, attribute).name)
            nothing.build((None, None, place.input_dim))
            replace(layer, owner, attribute, nothing)
    if isinstance(layer, EncoderBlock):
        return  # its configuration has the layer
    if isinstance(layer, Upcycled):
        original, build, before = layer._upcycled()
    else:
        config = keras.saving.serialize_keras_object(layer)
        original = {key: config[key] for key in _KEYS}
        build, before = _lists(layer.get_build_config()), {}
    object.__setattr__(layer, "__class__", upcycled_class(type(layer)))
    experts = {**before, **experts}
    # A function, since Keras would track the layers once more.
    layer._upcycled = lambda: (original, build, dict(experts))


def data_format_of(layer):
    """The data format, which models of keras-hub take but do not save."""
    if "data_format" in inspect.signature(type(layer)).parameters:
        for part in with_sublayers(layer):
            if getattr(part, "data_format", None) is not None:
                return {"data_format": part.data_format}
    return {}


def _lists(value):
    """Tuples as lists, which a file keeps as they are."""
    if isinstance(value, dict):
        return {key: _lists(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_lists(part) for part in value]
    return value


def _register(name, made):
    return keras.saving.register_keras_serializable("keras_moe", name)(made)


def _register_known():
    for kind in _OWN:
        upcycled_class(kind)
    # keras-hub is not imported for this: it takes ten seconds.
    hub = sys.modules.get("keras_hub")
    for name in _OF_KERAS_HUB:
        for place in ("models", "layers"):
            kind = getattr(getattr(hub, place, None), name, None)
            if kind is not None:
                upcycled_class(kind)
                break
        else:
            _register(f"Upcycled{name}", Upcycled)


_register_known()
