"""The health of a run, judged by its metrics: steps that were skipped, and alarms.

All processes see the same metrics, so they decide alike without a word to each other.
"""

import itertools
import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from clip_jax.config import HealthConfig, RunConfig
from clip_jax.run.metrics import Unwritten

_MOST_LINES = 1_000
_AT_CLAMP = 1 - 1e-5
_LEAST_SPREAD = 0.01
_COLLAPSED_STEPS = 100
_NORMAL = 1.4826 / math.sqrt(2)  # standard deviation of normal numbers over the median distance between two of them


class Rewind(Exception):  # noqa: N818, since it is a decision
    """Too many steps were skipped in a row: the run must go back and pass over them.

    Args:
      first: the first of these steps.
      begin: position at which its batch began.
      end: position after the last one's.
    """

    def __init__(self, first: int, begin: int, end: int) -> None:
        super().__init__(f"steps from {first} on were skipped")
        self.first, self.begin, self.end = first, begin, end


class _Step(NamedTuple):
    begin: int
    index: np.ndarray


class Health:
    """What a run knows of its steps, since this process began.

    Args:
      config: the run's.
      workdir: gets `skipped-<process>.jsonl`, a line for each skipped step with this process's pairs, 1,000 at most.
      where: record number to what to call it.
      say: shows a line to the user.
    """

    def __init__(
        self, config: RunConfig, workdir: Path, where: Callable[[int], str], *, say: Callable[[str], None]
    ) -> None:
        self._config, self._batch, self._where, self._say = config.health, config.batch, where, say
        self._file = workdir / f"skipped-{jax.process_index()}.jsonl"
        self._unwritten = Unwritten(self._file)
        self._alarms = Alarms(config.health, warmup=config.optim.warmup_steps, max_scale=config.optim.max_scale)
        self._on: dict[str, float] = {}
        self._unread: dict[int, _Step] = {}
        self._skipped, self._in_a_row = 0, list[tuple[int, int]]()

    def note(self, step: int, position: int, batch: Mapping[str, np.ndarray]) -> None:
        """Remembers a step's pairs until its metrics are read."""
        self._unread[step] = _Step(position, batch["index"])

    def judge(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Looks at the metrics of a step; returns them with alarms, and with how many steps were skipped so far.

        A step without a pair says nothing of the model: it neither belongs to a row of skipped steps nor ends one.

        Raises:
          Rewind: more than `max_skipped` steps in a row had no finite loss or gradient.
        """
        noted = self._unread.pop(step)
        self._skipped += bool(metrics["skipped"])
        if metrics["pairs"] == 0:
            self._say(f"step {step} is skipped: none of its pairs could be used")
        elif metrics["skipped"]:
            self._skip(step, noted, metrics)
        else:
            self._in_a_row.clear()
        alarms = self._alarms.judge(step, metrics)
        for name, (on, text) in alarms.items():
            if on and not self._on.get(name):
                self._say(f"{name} at step {step}: {text}")
            self._on[name] = float(on)
        return {**metrics, "skipped": float(self._skipped), **self._on}

    def _skip(self, step: int, noted: _Step, metrics: Mapping[str, float]) -> None:
        self._in_a_row.append((step, noted.begin))
        loss, norm = metrics["loss"], metrics["gradient_norm"]
        self._say(f"step {step} is skipped: loss {loss}, gradient norm {norm}; its pairs are in {self._file.name}")
        if self._skipped <= _MOST_LINES:
            line = {"step": step, "begin": noted.begin, "end": noted.begin + self._batch}
            line |= {"loss": str(loss), "gradient_norm": str(norm), "index": noted.index.tolist()}
            line["records"] = [self._where(int(index)) for index in noted.index]
            with self._unwritten, self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if len(self._in_a_row) > self._config.max_skipped:
            first, begin = self._in_a_row[0]
            self._in_a_row.clear()
            raise Rewind(first, begin, noted.begin + self._batch)


class Alarms:
    """Alarms on the metrics of steps.

    Args:
      config: where they go off.
      warmup: steps after which embeddings that stay together are no beginning any more.
      max_scale: the logit scale's limit.
    """

    def __init__(self, config: HealthConfig, *, warmup: int, max_scale: float) -> None:
        self._config, self._warmup, self._max_scale = config, warmup, max_scale
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._at_clamp = self._together = 0

    def judge(self, step: int, metrics: Mapping[str, float]) -> dict[str, tuple[bool, str]]:
        """Returns, for each kind of alarm, whether it is on after a step, and what there is to say.

        A step that was skipped changes nothing.
        """
        if metrics["skipped"]:
            return {}
        return {
            "alarm/loss_spike": self._loss_spike(metrics["loss"]),
            "alarm/logit_scale": self._logit_scale(metrics["logit_scale"]),
            "alarm/collapse": self._collapse(step, metrics["image_cosine"], metrics["text_cosine"]),
        }

    def _loss_spike(self, loss: float) -> tuple[bool, str]:
        """Compares with median and spread of the window before, which one spike does not move.

        The spread is of the differences between neighbours, to which a falling loss is as good as a level one.
        """
        before, deviations = list(self._losses), self._config.spike_deviations
        self._losses.append(loss)
        if not deviations or len(before) < self._config.spike_window:
            return False, ""
        median = statistics.median(before)
        spread = _NORMAL * statistics.median(abs(a - b) for a, b in itertools.pairwise(before))
        limit = median + deviations * max(spread, _LEAST_SPREAD * abs(median))
        return loss > limit, f"loss {loss:.4f}, over {limit:.4f}; the last {len(before)} steps' median is {median:.4f}"

    def _logit_scale(self, scale: float) -> tuple[bool, str]:
        self._at_clamp = self._at_clamp + 1 if scale >= self._max_scale * _AT_CLAMP else 0
        return (
            0 < self._config.clamp_steps <= self._at_clamp,
            f"the logit scale has been at its limit of {self._max_scale:g} for {self._at_clamp} steps",
        )

    def _collapse(self, step: int, image: float, text: float) -> tuple[bool, str]:
        """Asks that the embeddings lie together in each of 100 steps after the warm-up.

        A ViT's images begin with a cosine of 0.99, and captions come to it from 0.5 while the loss is near chance; a
        healthy run then leaves it by fits and starts (the demo, whose warm-up is 40 steps, between 55 and 75). A run
        that is stuck at chance does not leave, and what collapses later does not come back.
        """
        is_together = step > self._warmup and max(image, text) > self._config.collapse_cosine
        self._together = self._together + 1 if is_together else 0
        return (
            self._together >= _COLLAPSED_STEPS,
            f"for {self._together} steps the embeddings of different pairs have lain together: mean cosine "
            f"{image:.3f} of images, {text:.3f} of texts",
        )
