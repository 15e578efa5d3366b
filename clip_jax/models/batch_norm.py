"""BatchNorm over groups of samples, each pass of which reads its argument once for sums and once for the result.

It is our own, because its statistics may be over groups of samples: over the whole batch they cost a collective in
every layer, and "per device" would make the model depend on the mesh.

E[x²]-E[x]² loses digits where the mean is large, and E[(x-E[x])²] reads x a second time. Here each sample's deviations
are from one of its own values, the one in its middle, so that both sums are of one reading; the samples' means and
variances are then put together (Chan, Golub & LeVeque, 1983). JAX's derivative of any of these would read x and the
gradient a third time, and write what ReLU lets through of the gradient, to read it again.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clip_jax.array_types import Array, Bool, Float, Int
from clip_jax.errors import UserError
from clip_jax.models.fences import fence
from clip_jax.models.layers import Initializer
from clip_jax.models.precision import wide_dtype, widen

EPSILON = 1e-5


class BatchNorm(nn.Module):
    """Batch normalisation over groups of samples; statistics in float32 or wider, epsilon 1e-5, momentum 0.9.

    In training, consecutive groups of `group` samples are normalised each with its own mean and biased variance. The
    result does not depend on how the batch is sharded. The running statistics take a tenth of the batch's, which are
    the means over its groups of the mean and of the *unbiased* variance, as in torch (momentum 0.1 there); Flax's own
    BatchNorm keeps the biased one.

    Samples that are not kept are in no statistic: those of the others, and all that follows from them, are as if the
    batch were without them. Their own values become the channel's mean, so that they stay finite. A group that has
    fewer than two values left leaves its share of the running statistics as it was.

    Variables: parameters `scale`, `bias`, and `mean`, `var` in `batch_stats`, all float32 [c]. An update keeps the
    dtype that the running statistics came with.

    Attributes:
      train: use and update from the batch's statistics; else use the running ones. It has no forward-mode derivative.
      group: samples in a group, a divisor of the batch; 0 means one group of all.
      dtype: dtype of the result.
      relu: apply ReLU to it.
      scale_init: initializer of `scale`.
    """

    train: bool
    group: int
    dtype: DTypeLike
    relu: bool = False
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(
        self, x: Float[Array, "b rows columns c"], kept: Bool[Array, " b"] | None = None
    ) -> Float[Array, "b rows columns c"]:
        """Normalises every channel.

        Args:
          x: of any float dtype.
          kept: which samples count, in training; None means all.

        Raises:
          UserError: `train`, and `group` does not divide the batch or leaves one value a channel.
        """
        features, wide = x.shape[-1], wide_dtype(x.dtype)
        scale = self.param("scale", self.scale_init, (features,), jnp.float32).astype(wide)
        bias = self.param("bias", nn.initializers.zeros, (features,), jnp.float32).astype(wide)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (features,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (features,), jnp.float32)
        if not self.train:
            centred = widen(x) - running_mean.value
            result = (centred * (scale * jax.lax.rsqrt(running_var.value + EPSILON)) + bias).astype(self.dtype)
            return nn.relu(result) if self.relu else result

        group, area = self.group or x.shape[0], x.shape[1] * x.shape[2]
        _check_group(self.group, batch=x.shape[0], values=group * area)
        kept = jnp.ones(x.shape[0], bool) if kept is None else kept
        mean, var = group_statistics(x, kept, group)
        if not self.is_initializing():
            values = area * _kept_samples(kept, group).astype(wide)
            _move(running_mean, mean, values)
            _move(running_var, var * values / jnp.maximum(values - 1, 1), values)
        return normalize_groups(x, scale, bias, kept, mean, var, group, self.relu, self.dtype)


def group_statistics(
    x: Float[Array, "b rows columns c"], kept: Bool[Array, " b"], group: int
) -> tuple[Float[Array, "groups c"], Float[Array, "groups c"]]:
    """Returns mean and biased variance of each group's kept samples, 0 where there is none. They have no derivative.

    Only [b, c] is regrouped, so that no activation leaves its device.
    """
    x = jax.lax.stop_gradient(x)
    middle = widen(x[:, x.shape[1] // 2, x.shape[2] // 2])
    deviations = widen(x) - middle[:, None, None]
    mean, square = deviations.mean(axis=(1, 2)), jnp.square(deviations).mean(axis=(1, 2))
    mean, var = middle + mean, jnp.maximum(square - jnp.square(mean), 0)
    group_mean = _group_means(mean, kept, group)
    between = jnp.square(mean - jnp.repeat(group_mean, group, axis=0))
    return group_mean, _group_means(var + between, kept, group)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def normalize_groups(
    x: Float[Array, "b rows columns c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    kept: Bool[Array, " b"],
    mean: Float[Array, "groups c"],
    var: Float[Array, "groups c"],
    group: int,
    relu: bool,
    dtype: DTypeLike,
) -> Float[Array, "b rows columns c"]:
    """Returns each channel less its mean, over its deviation, times `scale`, plus `bias` (Ioffe & Szegedy, 2015).

    Its derivative is that through mean and variance too, which must be `group_statistics` of `x`.

    Args:
      x: of any float dtype.
      scale: gains, float32 or wider.
      bias: as wide as the gains.
      kept: samples that are in the statistics; others become the mean.
      mean: of each group.
      var: likewise.
      group: samples in a group.
      relu: apply ReLU to the result.
      dtype: of the result.
    """
    return _forward(x, scale, bias, kept, mean, var, group, relu, dtype)[0]


def _forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    kept: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    group: int,
    relu: bool,
    dtype: DTypeLike,
) -> tuple[jax.Array, tuple]:
    inverse = jax.lax.rsqrt(var + EPSILON)
    result = _result(_centred(x, kept, mean, group), scale, bias, inverse, group, dtype)
    return nn.relu(result) if relu else result, (x, scale, bias, kept, mean, inverse)


def _backward(group: int, relu: bool, dtype: DTypeLike, residuals: tuple, gradient: jax.Array) -> tuple:
    x, scale, bias, kept, mean, inverse = residuals

    def behind_relu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns deviations, and the gradient of what ReLU was given."""
        centred, let_through = _centred(x, kept, mean, group), gradient.astype(mean.dtype)
        if relu:
            passes = _result(centred, scale, bias, inverse, group, dtype) > 0
            let_through = jnp.where(passes, let_through, 0)
        return centred, let_through

    centred, let_through = behind_relu(x)
    sums = let_through.sum(axis=(1, 2)), (let_through * centred).sum(axis=(1, 2))
    x, (sums, slopes) = fence((x, sums), "cuda")  # the sums' kernel would leave what it computes for the next to read
    area = x.shape[1] * x.shape[2]
    offset, slope = (_group_means(each, kept, group) / area for each in (sums, slopes))
    centred, let_through = behind_relu(x)
    of_x = let_through - _to_samples(offset, group) - centred * _to_samples(jnp.square(inverse) * slope, group)
    of_x = jnp.where(_of_samples(kept), of_x * _to_samples(scale * inverse, group), 0)
    of_scale = (slopes * jnp.repeat(inverse, group, axis=0)).sum(axis=0)
    return of_x.astype(x.dtype), of_scale, sums.sum(axis=0), None, None, None


normalize_groups.defvjp(_forward, _backward)


def _centred(
    x: Float[Array, "b rows columns c"], kept: Bool[Array, " b"], mean: Float[Array, "groups c"], group: int
) -> Float[Array, "b rows columns c"]:
    return jnp.where(_of_samples(kept), widen(x) - _to_samples(mean, group), 0)


def _result(
    centred: jax.Array, scale: jax.Array, bias: jax.Array, inverse: jax.Array, group: int, dtype: DTypeLike
) -> jax.Array:
    return (centred * _to_samples(scale * inverse, group) + bias).astype(dtype)


def _group_means(each: Float[Array, "b c"], kept: Bool[Array, " b"], group: int) -> Float[Array, "groups c"]:
    """Averages over the kept samples of each group; 0 where there is none."""
    each = jnp.where(kept[:, None], each, 0)
    return each.reshape(-1, group, each.shape[-1]).sum(axis=1) / jnp.maximum(_kept_samples(kept, group), 1)


def _kept_samples(kept: Bool[Array, " b"], group: int) -> Int[Array, "groups 1"]:
    return kept.reshape(-1, group).sum(axis=1, keepdims=True)


def _of_samples(kept: Bool[Array, " b"]) -> Bool[Array, "b 1 1 1"]:
    return kept[:, None, None, None]


def _to_samples(statistic: Float[Array, "groups c"], group: int) -> Float[Array, "b 1 1 c"]:
    return jnp.repeat(statistic, group, axis=0)[:, None, None]


def _move(running: nn.Variable, batch: Float[Array, "groups c"], values: Float[Array, "groups 1"]) -> None:
    """Moves a running statistic by that of each group which has two values or more.

    The mean is over all groups, of what each would make of it: then it is also the mean over micro-batches.
    """
    moved = jnp.where(values > 1, 0.9 * running.value + 0.1 * batch, running.value)
    running.value = moved.mean(axis=0).astype(running.value.dtype)


def _check_group(group: int, *, batch: int, values: int) -> None:
    if group < 0 or (group and batch % group):
        divisors = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        raise UserError(f"bn group is {group}, and the batch has {batch} samples; use 0 (all of them) or {divisors}")
    if values < 2:
        raise UserError(
            f"bn group {group} of a batch of {batch} leaves one value a channel, whose variance is 0; "
            "use a larger group or batch"
        )
