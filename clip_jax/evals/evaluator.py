"""A trained model over all devices of all processes, for evaluations that follow each other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import jax
import numpy as np

from clip_jax.config import MeshConfig
from clip_jax.console import WorkProgress
from clip_jax.data.labelled import LabelledSource
from clip_jax.data.loader import check_same
from clip_jax.data.records import Records
from clip_jax.errors import UserError
from clip_jax.evals.embedding import Embedder, ImageFeatures
from clip_jax.evals.feature_cache import FeatureCache
from clip_jax.interop.read import released_name
from clip_jax.models.variants import ModelConfig, variant_name
from clip_jax.partition import make_mesh, place_whole, replicated
from clip_jax.pretrained import Pretrained


class Evaluator:
    """Embeds images and texts; every process gets all features.

    Args:
      model: its towers are copied to every device.
      source: where `clip_jax.load` found it.
      batch: rows a step, over all devices; rounded up to a multiple of them.
      threads: that read and decode, in every process.
      cache: folder in which images' features are kept; empty for none.
      devices: to compute on; None means all.

    Attributes:
      mesh: the devices.
      own_mesh: those of this process.
      config: the model's sizes.
      variant: the paper's name of the model, or `custom`.
      names: what results call it: architecture, and where its weights came from.
      fingerprint: of the model.
    """

    def __init__(
        self,
        model: Pretrained,
        source: str,
        *,
        batch: int = 256,
        threads: int = 4,
        cache: str = "",
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        for name, value in (("batch", batch), ("threads", threads)):
            if value < 1:
                raise UserError(f"--{name} is {value}; it must be positive")
        self.mesh = make_mesh(MeshConfig(), devices=devices)
        self.own_mesh = make_mesh(MeshConfig(), devices=self.mesh.local_devices)
        self.config, self.preprocess = model.config, model.preprocess
        self.variant, self.names = variant_name(model.config), model_names(model.config, source)
        self.fingerprint = model.fingerprint
        self._model, self._threads, self._cache = model, threads, cache
        self._batch = -(-batch // self.mesh.size) * self.mesh.size
        # Every process has all weights, and gives its devices theirs.
        self._variables = jax.tree.map(
            lambda leaf: place_whole(np.asarray(leaf), replicated(self.mesh)), model.variables
        )
        self._embedders: dict[str, Embedder] = {}

    def images(self, source: LabelledSource, *, kind: Literal["unit", "probe"] = "unit") -> ImageFeatures:
        """Embeds a source's images, or reads their features from the cache.

        Args:
          source: the same in every process.
          kind: see `Embedder`.

        Raises:
          RecordError: names an image that cannot be read.
          UserError: the processes do not see the same records.
        """
        check_same(str(source), [source])
        if not self._cache:
            return self._embed(source, kind)
        cache = FeatureCache(
            self._cache,
            model=self.fingerprint,
            dtype=self.config.dtype,
            kind=kind,
            preprocess=self.preprocess,
        )
        return cache.images(source, lambda part: self._embed(part, kind))

    def embed(self, source: Records) -> ImageFeatures:
        """Embeds a source's images whatever is in the cache; as `images`."""
        check_same(str(source), [source])
        return self._embed(source, "unit")

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts: float [n, e], unit length."""
        return self._embedder("unit").texts(self._variables, texts)

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Returns texts as the text tower reads them: int32 [n, context]."""
        return self._embedder("unit").tokenize(texts)

    def tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Embeds rows of token ids, int32 [n, context]: float [n, e], unit length."""
        return self._embedder("unit").tokens(self._variables, tokens)

    def _embed(self, source: Records, kind: Literal["unit", "probe"]) -> ImageFeatures:
        with self._progress(len(source)) as progress:
            return self._embedder(kind).source(self._variables, source, progress=progress)

    def _embedder(self, kind: Literal["unit", "probe"]) -> Embedder:
        if kind not in self._embedders:
            self._embedders[kind] = Embedder(
                self._model.model,
                self._model.tokenize,
                mesh=self.mesh,
                batch=self._batch,
                preprocess=self.preprocess,
                kind=kind,
                threads=self._threads,
            )
        return self._embedders[kind]

    @contextmanager
    def _progress(self, records: int) -> Iterator[Callable[[], None]]:
        """Shows batches, by the first process alone."""
        if jax.process_index() != 0:
            yield lambda: None
            return
        with WorkProgress("batches", -(-records // self._batch)) as shown:
            yield lambda: shown.advance(f"of {self._batch} images")


def model_names(config: ModelConfig, source: str) -> tuple[str, str]:
    """Returns what CLIP_benchmark calls a model: open_clip's name of the architecture, and of its weights.

    Args:
      config: the model's sizes.
      source: as for `clip_jax.load`; one of the paper's names means OpenAI's weights.
    """
    name = variant_name(config).replace("/", "-").replace("@", "-")
    if released_name(source) is not None:
        return name, "openai"
    quick = name != "custom" and config.activation == "quick_gelu"
    return name + "-quickgelu" * quick, source.rstrip("/")
