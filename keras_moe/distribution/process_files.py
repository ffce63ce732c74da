"""Files of a model that several processes hold together."""

import os
import shutil

from keras import ops

from keras_moe.backend.torch import collectives
from keras_moe.distribution.process_state import mark_state
from keras_moe.distribution.process_state import replace_methods
from keras_moe.stacked import expert_shards


class ProcessFiles:
    """Lets the first process write what all have, as one process would.

    Args:
        model: The model, whose methods are replaced.
        engine: A `ProcessEngine`.
        trainer: The `ProcessModel`.
    """

    def __init__(self, model, engine, trainer):
        self._model, self._engine, self._trainer = model, engine, trainer
        replace_methods(
            model, self, "save", "save_weights", "load_weights", "export"
        )

    def save(self, of_model, filepath, overwrite=True, **kwargs):
        self._write(of_model, filepath, overwrite, ".keras", kwargs)

    def save_weights(self, of_model, filepath, overwrite=True, **kwargs):
        self._write(of_model, filepath, overwrite, ".weights.h5", kwargs)

    def load_weights(self, of_model, filepath, *args, **kwargs):
        optimizer = self._trainer.optimizer and self._model.optimizer
        if optimizer and not optimizer.built:
            optimizer.build(self._model.trainable_variables)
        of_model(filepath, *args, **kwargs)

    def export(self, of_model, *args, **kwargs):
        if self._engine.num_expert_shards == 1:
            return of_model(*args, **kwargs)
        raise NotImplementedError(
            "A model whose experts are divided among processes cannot be "
            "exported: save it, load it in one process, and export that one."
        )

    def _write(self, of_model, filepath, overwrite, ending, kwargs):
        """Lets the first process write what all have."""
        filepath = os.fspath(filepath)
        if not filepath.endswith(ending) or any(
            kwargs.get(name) not in (None, True) for name in kwargs
        ):
            raise ValueError(
                f"A distributed model is saved in one file `*{ending}`. "
                f"Received: filepath={filepath}, {kwargs}"
            )
        self._trainer.average_state()
        shard, error = self._engine.shard, None
        values = self._full_values()
        if self._engine.process_index == 0:
            shard.full_values = values
            try:
                _write_whole(of_model, filepath, overwrite)
            except Exception as caught:  # the others wait for the outcome
                error = caught
            finally:
                shard.full_values = None
        messages = collectives.gather_objects(error and repr(error))
        if error is not None:
            raise error
        if messages[0]:
            raise RuntimeError(
                f"The first process could not save the model: {messages[0]}"
            )

    def _full_values(self):
        """Whole banks by variable, in the first process.

        Only the first expert group sends, and only the first process keeps.
        """
        engine, variables = self._engine, list(self._model.variables)
        if self._trainer.optimizer is not None:
            optimizer = self._model.optimizer
            mark_state(optimizer, self._model)
            variables += optimizer.variables
        values = {}
        if engine.process_index < engine.num_expert_shards:
            for variable in variables:
                if expert_shards.mark_of(variable) is not None:
                    value = collectives.gather_to_first(
                        variable.value,
                        engine.num_expert_shards,
                        engine.expert_group,
                    )
                    if value is not None:
                        values[id(variable)] = ops.convert_to_numpy(value)
        return values


def _write_whole(write, filepath, overwrite):
    """Writes beside the file and then replaces it, so that one is whole."""
    if "://" in filepath:
        write(filepath, overwrite=overwrite)
        return
    if not overwrite and os.path.exists(filepath):
        raise FileExistsError(
            f"The file exists. Received: filepath={filepath}, overwrite=False"
        )
    folder, name = os.path.split(filepath)
    beside = os.path.join(folder, f".{os.getpid()}-{name}")
    try:
        write(beside)
        os.replace(beside, filepath)
    finally:
        if os.path.exists(beside):
            os.remove(beside)


def write_sharded(model, folder, num_shards):
    """Lets each process write what it has; see `ProcessEngine.save_sharded`."""
    # Here, since it takes a second to import.
    from keras_moe.backend.torch import sharded_files

    folder = os.fspath(folder).rstrip(os.sep)
    beside = f"{folder}.new"
    variables, is_divided = _by_name(model)
    sharded_files.write(beside, variables, is_divided, num_shards)
    collectives.wait()
    if collectives.process_index() == 0:
        # Never without a whole one: the old one goes last.
        old = f"{folder}.old"
        shutil.rmtree(old, ignore_errors=True)
        if os.path.exists(folder):
            os.rename(folder, old)
        os.rename(beside, folder)
        shutil.rmtree(old, ignore_errors=True)
    collectives.wait()


def read_sharded(model, folder, num_shards):
    """Reads such a folder; see `ProcessEngine.load_sharded`."""
    from keras_moe.backend.torch import sharded_files

    variables, is_divided = _by_name(model)
    sharded_files.read(os.fspath(folder), variables, is_divided, num_shards)


def _by_name(model):
    """The variables of a model and of its optimizer, and which are divided."""
    named = {
        f"model/{number}": variable
        for number, variable in enumerate(model.weights)
    }
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        mark_state(optimizer, model)
        for number, variable in enumerate(optimizer.variables):
            named[f"optimizer/{number}"] = variable
    is_divided = {
        name: expert_shards.mark_of(variable) is not None
        for name, variable in named.items()
    }
    return named, is_divided
