"""Copies of models, with experts in the place of feed-forward networks."""

import keras

from keras_moe.conversion import graphs
from keras_moe.conversion.feed_forwards import held_feed_forwards
from keras_moe.conversion.sublayers import attributes_of
from keras_moe.conversion.sublayers import with_sublayers
from keras_moe.conversion.upcycled import data_format_of
from keras_moe.conversion.upcycled import put_experts
from keras_moe.vision.layers.encoder_block import EncoderBlock


def feed_forwards_of(layer):
    """`(feed-forwards in order, lines about what else was looked at)`."""
    inner = _backbone(layer)
    if inner is not None:
        return feed_forwards_of(inner)
    if not graphs.is_graph(layer):
        return held_feed_forwards(layer)
    pairs, looked_at = graphs.pairs_of(layer)
    found = []
    for part in layer.layers:
        if part.name in pairs:
            found.append(pairs[part.name])
            continue
        held, seen = feed_forwards_of(part)
        found += held
        if part.weights and type(part) is not keras.layers.Dense:
            looked_at += seen
    return found, looked_at


def _backbone(model):
    """The backbone that a model is made from, or `None`."""
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, keras.Model) or graphs.is_graph(model):
        return None
    return backbone if "backbone" in model.get_config() else None


def with_experts(layer, experts):
    """A copy of a layer or model with experts in the places of numbers."""
    inner = _backbone(layer)
    if inner is not None:
        config = layer.get_config()
        for name in ("frozen_layers", "frozen_weights"):
            config.pop(name, None)
        config["backbone"] = with_experts(inner, experts)
        if getattr(layer, "preprocessor", None) is not None:
            config["preprocessor"] = layer.preprocessor
        new = type(layer).from_config(config)
        for old, part in zip(layer.layers, new.layers, strict=True):
            if old is not inner:
                _copy(old, part)
        if hasattr(type(layer), "backbone_cls"):
            put_experts(new, {})  # keras-hub asks for the class
        return new
    if graphs.is_graph(layer):
        return _graph_with_experts(layer, experts)
    new = _again(layer)
    put_experts(new, experts)
    return new


def _graph_with_experts(model, experts):
    pairs, _ = graphs.pairs_of(model)
    replaced, start, gone = {}, 0, set()
    for part in model.layers:
        if part.name in pairs:
            if start in experts:
                replaced[part.name] = experts[start]
                gone |= {*pairs[part.name].between, pairs[part.name].down.name}
            start += 1
            continue
        number = len(feed_forwards_of(part)[0])
        inside = {
            i - start: moe
            for i, moe in experts.items()
            if start <= i < start + number
        }
        if inside:
            replaced[part.name] = with_experts(part, inside)
        start += number
    new = graphs.with_layers(model, replaced, pairs)
    for old in model.layers:
        if old.name not in gone:
            source = replaced.get(old.name, old)
            _copy(source, new.get_layer(source.name))
    return new


def _again(layer):
    """A copy of a layer or model, not compiled."""
    config = keras.saving.serialize_keras_object(layer)
    config.pop("compile_config", None)
    config["config"] = {**data_format_of(layer), **config["config"]}
    new = keras.saving.deserialize_keras_object(config)
    _copy(layer, new)
    return new


def _copy(old, new):
    """The weights of a layer, and what of it is frozen."""
    if isinstance(old, EncoderBlock):
        # Where a layer was replaced, its weights come last.
        for name, part in attributes_of(old):
            _copy(part, getattr(new, name))
        return
    new.set_weights(old.get_weights())
    parts = with_sublayers(old), with_sublayers(new)
    if len(parts[0]) == len(parts[1]):
        for before, after in zip(*parts, strict=True):
            if after.trainable != before.trainable:
                after.trainable = before.trainable
    for before, after in zip(old.weights, new.weights, strict=True):
        if after.trainable != before.trainable:
            after.trainable = before.trainable
