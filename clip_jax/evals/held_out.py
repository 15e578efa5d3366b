"""The contrastive loss on held-out pairs: the loss of training, on the same mesh, with the model as in evaluation.

The loss depends on how many pairs it is over, so all of them are one batch, whose features are made in parts. Nothing
is random: the image as in evaluation, the first caption, no dropped patches; a ResNet uses its running statistics.
"""

import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clip_jax.config import HELD_OUT_METRICS, RunConfig
from clip_jax.data.held_out import Batch, HeldOutPairs, open_held_out
from clip_jax.data.images import normalize, preprocess_of
from clip_jax.errors import UserError
from clip_jax.evals.embedding import InStep
from clip_jax.models.clip import CLIP, CLIPOutput, Variables, forward, scale_and_bias
from clip_jax.partition import check_batch, join_rows, place_rows, replicated, row_sharding
from clip_jax.training.step import JudgedFeatures, judge

_LOG = logging.getLogger(__name__)


class HeldOut:
    """The loss on a run's held-out pairs, which are read once and then kept in the hosts' memory.

    Args:
      config: the run's, with `config.eval.held_out` set.
      model: the towers.
      mesh: the devices.

    Raises:
      UserError: the pairs are not there, or the batch does not fit the mesh.
    """

    def __init__(self, config: RunConfig, model: CLIP, *, mesh: Mesh) -> None:
        check_batch("eval.batch", config.eval.batch, mesh)
        self._config, self._model, self._mesh = config, model, mesh
        self._pairs: HeldOutPairs = open_held_out(config)
        self._kept: list[Batch] = []
        self._embed = jax.jit(self._features, out_shardings=row_sharding(mesh))
        self._judge = jax.jit(self._judged, out_shardings=replicated(mesh))

    @classmethod
    def open(cls, config: RunConfig, model: CLIP, *, mesh: Mesh) -> "HeldOut | None":
        """Returns what the config asks for, or None."""
        return cls(config, model, mesh=mesh) if config.eval.held_out else None

    @property
    def description(self) -> str:
        """A few words for the log."""
        return self._pairs.description

    def run(self, variables: Variables, *, progress: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Returns the numbers that belong into the metrics, `held_out/loss` and its fellows; collective over processes.

        Pairs that cannot be read raise an exception in all processes, at the same place.

        Args:
          variables: of the model, on the mesh.
          progress: called before every part.
        """
        source = iter(self._kept) if self._kept else self._pairs.batches()
        reading = InStep(source, self._blank(), count=self._pairs.count)
        batches, features = [], []
        for batch in reading.batches(progress):
            batches.append({name: batch[name] for name in ("image", "tokens", "weight")})
            features.append(self._embed(variables, place_rows(batches[-1], self._mesh)))
        reading.check()
        if not self._kept:
            self._name_unused(batches)
            self._kept = batches
        judged, kept = jax.device_get(self._judge(variables, features))
        if not kept:
            raise UserError(f"config.eval.held_out: none of {self.description} can be used")
        return dict(zip(HELD_OUT_METRICS, (float(judged.loss), float(judged.accuracy)), strict=True))

    def _name_unused(self, batches: Sequence[Batch]) -> None:
        """Says how many of this process's pairs cannot be used."""
        used, rows = sum(int(batch["weight"].sum()) for batch in batches), self._rows_of_this_process()
        if used < rows:
            _LOG.warning("%d of this process's %d held-out pairs cannot be used and are left out", rows - used, rows)

    def _rows_of_this_process(self) -> int:
        batch, share = self._config.eval.batch, self._config.eval.batch // jax.process_count()
        first = share * jax.process_index()
        starts = range(first, self._pairs.count * batch, batch)
        return sum(max(0, min(share, self._pairs.pairs - start)) for start in starts)

    def _blank(self) -> Batch:
        rows, model = self._config.eval.batch // jax.process_count(), self._model.config
        size = model.vision.image_size
        return {
            "image": np.zeros((rows, size, size, 3), np.uint8),
            "tokens": np.zeros((rows, model.text.context), np.int32),
            "weight": np.zeros(rows, np.float32),
        }

    def _features(self, variables: Variables, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns a part's images and texts, and which pairs count."""
        config = self._config
        images = normalize(batch["image"], preprocess_of(config.model, config.data), config.model.dtype)
        with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
            output = forward(self._model, variables, images, batch["tokens"])
        return output.image, output.text, batch["weight"]

    def _judged(
        self, variables: Variables, parts: Sequence[tuple[jax.Array, jax.Array, jax.Array]]
    ) -> tuple[JudgedFeatures, jax.Array]:
        """Returns what is said of all parts together, and how many pairs count; the order of pairs plays no part."""
        image, text, weight = (join_rows(jnp.stack(rows), self._mesh) for rows in zip(*parts, strict=True))
        features = CLIPOutput(image, text, *scale_and_bias(self._model, variables))
        return judge(self._config.loss, features, weight, mesh=self._mesh), weight.sum()
