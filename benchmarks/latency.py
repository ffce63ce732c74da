"""How long one example takes: a model, and the files it is exported to.

    python -m benchmarks.latency --backend tensorflow

Models for a table of 40 columns, 2 tasks: see `benchmarks/census.py`. Timed are
`predict_on_batch`, the SavedModel (PyTorch: `.pt2`), and, where the backend
writes one with the packages at hand, the ONNX file under onnxruntime. Ratios
are to the shared bottom, served in the same way.
"""

import contextlib
import pathlib
import tempfile
import warnings

from benchmarks import measure

BASELINE = "SharedBottom"
EXPERTS = {
    "SharedBottom": {},
    "MMoE": {"num_experts": 8, "expert_units": (16,)},
    "PLE": {"expert_units": (16,)},
}


def main():
    parser = measure.parser(__doc__.splitlines()[0])
    arguments = parser.parse_args()
    measure.choose(arguments)
    figures = compare(arguments)
    measure.write(arguments, figures)
    report(figures)


def compare(arguments):
    from benchmarks import census

    x, _ = census.batch(2)
    x = {name: column[:1] for name, column in x.items()}
    calls = {}
    for name, options in EXPERTS.items():
        model = _model(name, options)
        for way, call in ways(model, x, arguments.backend).items():
            calls.setdefault(way, {})[name] = call
    return {
        way: measure.summary(
            measure.alternate(functions, arguments.seconds), BASELINE
        )
        for way, functions in calls.items()
    }


def _model(name, options):
    from benchmarks import census
    from keras_moe import models

    model = getattr(models, name)(census.tasks(2), census.features(), **options)
    model.compile("adam", metrics=None)
    return model


def ways(model, x, backend):
    """Functions that predict `x`, by what does it."""
    result = {"predict_on_batch": lambda: model.predict_on_batch(x)}
    model(x)  # Keras' ONNX export needs a model that was called.
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converters
        folder = pathlib.Path(folder)
        if backend == "torch":
            result[".pt2"] = _torch_program(model, x, folder / "model.pt2")
        else:
            result["SavedModel"] = _saved_model(model, x, folder / "saved")
        with contextlib.suppress(ImportError):
            result["ONNX"] = _onnx(model, x, folder / "model.onnx", backend)
    return result


def _saved_model(model, x, path):
    import tensorflow as tf

    model.export(str(path), format="tf_saved_model", verbose=False)
    loaded = tf.saved_model.load(str(path))
    x = {name: tf.constant(column) for name, column in x.items()}
    return lambda: loaded.serve(x)


def _torch_program(model, x, path):
    import torch

    shapes = {name: {0: torch.export.Dim("batch")} for name in model.input}
    model.export(
        str(path), format="torch", verbose=False, dynamic_shapes=[(shapes,)]
    )
    program = torch.export.load(str(path)).module()
    x = {name: torch.from_numpy(column) for name, column in x.items()}
    return torch.no_grad()(lambda: program(x))


def _onnx(model, x, path, backend):
    converter = {"jax": "jax2onnx", "tensorflow": "tf2onnx", "torch": "onnx"}
    __import__(converter[backend])
    import onnxruntime

    model.export(str(path), format="onnx", verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
    return lambda: session.run(None, x)


def report(figures):
    measure.print_table(
        ["one example, ms", *EXPERTS, *(f"{n}, ratio" for n in EXPERTS)],
        [
            [
                way,
                *(f"{1e3 * f['median_s']:.2f}" for f in models.values()),
                *(f"{f['ratio']:.2f}" for f in models.values()),
            ]
            for way, models in figures.items()
        ],
    )


if __name__ == "__main__":
    main()
