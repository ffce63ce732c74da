"""Folders to which each process writes what it has (torch's checkpoints)."""

import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard

from keras_moe.backend.torch import collectives


def write(folder, variables, is_divided, num_shards):
    """Writes variables, each part of them once.

    Args:
        folder: str.
        variables: dict of Keras variables by name.
        is_divided: dict of bools by name: whether the first axis is divided
            among `num_shards` processes.
        num_shards: int.
    """
    state = _state(variables, is_divided, num_shards)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what is deprecated inside
        dcp.save(state, checkpoint_id=folder, no_dist=_is_alone())


@torch.no_grad()
def read(folder, variables, is_divided, num_shards):
    """Assigns what a folder holds, of any number of processes."""
    state = _state(variables, is_divided, num_shards)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder, no_dist=_is_alone())
    for name, variable in variables.items():
        value = state[name]
        if isinstance(value, DTensor):
            value = value.to_local()
        variable.assign(value)


def _is_alone():
    return not collectives.is_started()


def _state(variables, is_divided, num_shards):
    """Copies, which know which part of the whole they are."""
    mesh = None
    if num_shards > 1:
        mesh = init_device_mesh(
            "cpu", (collectives.num_processes() // num_shards, num_shards)
        )
    state = {}
    for name, variable in variables.items():
        value = variable.value.detach().to("cpu", copy=True)
        if is_divided[name] and mesh is not None:
            value = DTensor.from_local(value, mesh, [Replicate(), Shard(0)])
        state[name] = value
    return state
