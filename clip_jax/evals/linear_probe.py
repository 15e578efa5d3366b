"""Logistic regression on a frozen model's features, full-batch by L-BFGS (paper, §3.2 and appendix A.3).

The minimum of scikit-learn's objective, C · Σ cross-entropy + ‖W‖² / 2 with free biases, found on a mesh's devices,
over which the images' features are split. C is chosen on a validation split by the paper's search: seven values over
10^-6 … 10^6 first, then around the best of them in halved steps, down to an eighth of a decade.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from clip_jax.partition import place_whole, replicated, row_sharding

ITERATIONS = 1_000
PATIENCE = 5
"""Steps without a smaller loss, after which there is none to be had in the features' precision."""
DECADES, STEPS_A_DECADE = 6, 8


class Probe(NamedTuple):
    """A linear classifier.

    Attributes:
      weights: float [d, c].
      biases: float [c].
      iterations: that L-BFGS took.
    """

    weights: np.ndarray
    biases: np.ndarray
    iterations: int

    def with_biases(self) -> np.ndarray:
        """Returns the classifier for features with a column of ones behind them, [c, d + 1]."""
        return np.concatenate([self.weights, self.biases[None]]).T


class Chosen(NamedTuple):
    """What the search found.

    Attributes:
      c: with the best accuracy on the validation split; of equals, the smallest.
      tried: C to accuracy, of all that were fitted.
    """

    c: float
    tried: dict[float, float]


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    c: float,
    mesh: Mesh,
    iterations: int = ITERATIONS,
    tolerance: float = 1e-6,
) -> Probe:
    """Fits a classifier.

    Args:
      features: float [n, d]; all of them in every process.
      labels: int [n].
      classes: their number.
      c: inverse strength of the regularisation, as scikit-learn has it.
      mesh: the devices.
      iterations: at most.
      tolerance: end where no part of the gradient of the mean loss is larger, or where the loss no longer falls.
    """
    # Biases are free, so what all features have in common changes no minimum, only how well float32 finds it.
    common = features.mean(axis=0, dtype=np.float64).astype(features.dtype)
    rows = -(-len(features) // mesh.size) * mesh.size
    padding = rows - len(features)
    sharding = row_sharding(mesh)
    placed = [
        place_whole(np.concatenate([column, np.zeros((padding, *column.shape[1:]), column.dtype)]), sharding)
        for column in (features - common, labels.astype(np.int32), np.ones(len(features), features.dtype))
    ]
    penalty = (
        1 / (c * len(features)) * (2 if classes == 2 else 1)
    )  # scikit-learn has one row of weights for two classes
    scale = place_whole(np.asarray(penalty, features.dtype), replicated(mesh))
    (weights, biases), count = _minimise(
        *placed, scale, classes=classes, iterations=iterations, tolerance=tolerance, mesh=mesh
    )
    found = np.asarray(weights)
    return Probe(found, np.asarray(biases) - common @ found, int(count))


def accuracy(probe: Probe, features: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of images whose class is the highest."""
    return float(np.mean((features @ probe.weights + probe.biases).argmax(axis=1) == labels))


def choose_c(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    *,
    classes: int,
    mesh: Mesh,
) -> Chosen:
    """Searches C.

    Args:
      train: features [n, d] and labels [n] to fit on.
      validation: the same, to choose on.
      classes: their number.
      mesh: the devices.
    """
    last = 2 * DECADES * STEPS_A_DECADE
    grid = np.logspace(-DECADES, DECADES, last + 1).tolist()
    tried: dict[int, float] = {}

    def best_of(places: list[int]) -> int:
        for place in places:
            if place not in tried:
                probe = fit(*train, classes=classes, c=grid[place], mesh=mesh)
                tried[place] = accuracy(probe, *validation)
        return max(sorted(tried), key=tried.__getitem__)

    best = best_of(list(range(0, last + 1, 2 * STEPS_A_DECADE)))
    step = STEPS_A_DECADE
    while step:
        best = best_of([max(best - step, 0), min(best + step, last)])
        step //= 2
    return Chosen(grid[best], {grid[place]: tried[place] for place in sorted(tried)})


def split_off(labels: np.ndarray, *, every: int = 5) -> np.ndarray:
    """Returns which images are for validation, bool [n]: of each class every fifth, in the images' order.

    Of a class with fewer it is the last one; an only image is not taken away.
    """
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        images = np.flatnonzero(labels == label)
        chosen[images[every - 1 :: every] if len(images) >= every else images[1:][-1:]] = True
    return chosen


@functools.partial(jax.jit, static_argnames=("classes", "iterations", "tolerance", "mesh"))
def _minimise(
    features: jax.Array,
    labels: jax.Array,
    kept: jax.Array,
    scale: jax.Array,
    *,
    classes: int,
    iterations: int,
    tolerance: float,
    mesh: Mesh,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Returns weights and biases at the minimum of the mean loss, and the number of steps."""

    def loss(parameters: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, biases = parameters
        logits = jnp.matmul(features, weights, precision=jax.lax.Precision.HIGHEST) + biases
        each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (each * kept).sum() / kept.sum() + scale / 2 * (weights**2).sum()

    optimizer = optax.lbfgs(memory_size=10)
    value_and_gradient = optax.value_and_grad_from_state(loss)

    def unfinished(carry: tuple) -> jax.Array:
        _, _, largest, _, stale, count = carry
        return (count < iterations) & (largest > tolerance) & (stale < PATIENCE)

    def step(carry: tuple) -> tuple:
        parameters, state, _, least, stale, count = carry
        value, gradient = value_and_gradient(parameters, state=state)
        updates, state = optimizer.update(gradient, state, parameters, value=value, grad=gradient, value_fn=loss)
        largest = functools.reduce(jnp.maximum, [jnp.abs(part).max() for part in jax.tree.leaves(gradient)])
        stale = jnp.where(value < least, 0, stale + 1)
        return optax.apply_updates(parameters, updates), state, largest, jnp.minimum(least, value), stale, count + 1

    start = jnp.zeros((features.shape[1], classes), features.dtype), jnp.zeros(classes, features.dtype)
    infinity = jnp.array(jnp.inf, features.dtype)
    first = start, optimizer.init(start), infinity, infinity, jnp.array(0), jnp.array(0)
    parameters, *_, count = jax.lax.while_loop(unfinished, step, first)
    return jax.lax.with_sharding_constraint((parameters, count), replicated(mesh))
