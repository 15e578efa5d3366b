"""A part of a run in float64 on some devices: from the newest checkpoint, or the beginning, to a step.

    PYTHONPATH=.:tests python tests/topology_leg.py PROCESS PROCESSES COORDINATOR WORKDIR MODEL MESH UNTIL

is such a part in one of several processes; process 0 prints the losses as JSON.
"""

import dataclasses
import json
import sys
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
from tiny import TINY

from clip_jax.checkpoints.checkpoint import Checkpoints
from clip_jax.config import CheckpointConfig, DataConfig, DistributedConfig, MeshConfig
from clip_jax.data.loader import open_training_data
from clip_jax.models.clip import CLIP
from clip_jax.models.variants import ResNetConfig, TextConfig
from clip_jax.partition import make_mesh
from clip_jax.processes.distributed import processes
from clip_jax.training.optim import make_optimizer
from clip_jax.training.state import TrainState, abstract_state, create_state
from clip_jax.training.step import make_train_step, place_batch

_TEXT = TextConfig(width=32, heads=2, layers=1, context=16)
_RESNET = ResNetConfig(image_size=32, width=16, heads=4, layers=(1, 1, 1, 1))
MODELS = {
    "vit": dataclasses.replace(TINY.model, text=_TEXT, dtype="float64"),
    "resnet": dataclasses.replace(TINY.model, text=_TEXT, vision=_RESNET, bn_group=8, dtype="float64"),
}


def leg(workdir: Path, model: str, mesh_config: MeshConfig, *, until: int):
    """Trains to a step and saves; returns the losses, the state that was restored or made, and the last one."""
    run = dataclasses.replace(
        TINY,
        model=MODELS[model],
        mesh=mesh_config,
        data=DataConfig(source="synthetic", mixture=("source=synthetic",)),
        optim=dataclasses.replace(TINY.optim, ema_decay=0.5),
        checkpoint=CheckpointConfig(keep=9, minutes=60.0),  # by process 0's clock, which the others must hear
    )
    module, optimizer = CLIP(run.model), make_optimizer(run.optim, steps=run.steps)
    count = mesh_config.data * mesh_config.fsdp
    mesh = make_mesh(mesh_config, devices=jax.devices()[:count])
    layout = {"mesh": mesh, "zero1": mesh_config.zero1, "ema": True}
    target = jax.tree.map(_wide_shape, abstract_state(module, optimizer, **layout))
    step_function = make_train_step(module, optimizer, run, mesh=mesh, state=target)
    data = open_training_data(run)
    losses = {}
    with Checkpoints(workdir, run.checkpoint) as checkpoints:
        found = checkpoints.restore_latest(target)
        if found is None:
            first, begun, position = 0, _wide(create_state(module, optimizer, seed=0, **layout), target), 0
        else:
            first, (begun, position, _) = found
        state = jax.tree.map(jnp.copy, begun)
        with closing(data.batches(position)) as batches:
            for step in range(first + 1, until + 1):
                batch = next(batches)
                state, metrics = step_function(state, place_batch(batch, mesh))
                position += run.batch
                losses[step] = float(metrics["loss"])
                last = step == until
                checkpoints.save(step, state, position=position, config=run, data=data.fingerprint, now=last)
    return losses, begun, state


def _wide_shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    dtype = jnp.float64 if leaf.dtype == jnp.float32 else leaf.dtype
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)


def _wide(state: TrainState, target: TrainState) -> TrainState:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    cast = jax.jit(lambda tree: jax.tree.map(lambda x, t: x.astype(t.dtype), tree, target), out_shardings=shardings)
    return cast(state)


def main(process: str, count: str, coordinator: str, workdir: str, model: str, mesh: str, until: str) -> None:
    """One process of several; `mesh` is data x fsdp, such as `2x4`."""
    jax.config.update("jax_enable_x64", True)
    data, fsdp = map(int, mesh.split("x"))
    distributed = DistributedConfig(
        mode="explicit", coordinator=coordinator, bind=coordinator, processes=int(count), process_id=int(process)
    )
    with processes(distributed if int(count) > 1 else DistributedConfig(mode="off")):
        losses, _, _ = leg(Path(workdir), model, MeshConfig(data, fsdp), until=int(until))
        if jax.process_index() == 0:
            print(json.dumps(losses), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
