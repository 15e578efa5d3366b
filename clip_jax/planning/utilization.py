"""How much of the chips' peak a training step uses (MFU), from its time.

Two counts of operations, neither with anything that is recomputed. `computed` is what the step's layout asks for:
captions in the lengths of their groups, and of each last block what is read. `paper` is the paper's arithmetic, as
published figures count: every caption with all its 77 tokens, and every block whole; what is saved then shows as more
than is possible. Backward passes count twice the forward ones, frozen parameters included.
"""

from dataclasses import dataclass

from clip_jax.config import RunConfig
from clip_jax.models.flops import grouped_text_flops, image_flops, pair_flops, text_flops
from clip_jax.models.text_groups import groups_of


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of a training step, over all devices."""

    computed: float
    paper: float

    @classmethod
    def of(cls, config: RunConfig, *, devices: int) -> "StepFlops":
        """Counts a run's."""
        model, rows = config.model, (config.micro_batch or config.batch) // devices
        pair = pair_flops(model, config.batch, tiled=config.loss.form != "reference")
        saved = 0.0
        if model.dead_tokens == "skip":
            groups = groups_of(config.text_groups, rows=rows, context=model.text.context)
            saved = image_flops(model, train=True) - image_flops(model, train=True, read=True)
            saved += text_flops(model) - grouped_text_flops(model, groups)
        return cls(config.batch * (pair - 3.0 * saved), float(config.batch * pair))

    def rates(self, seconds: float, *, devices: int, peak: float) -> dict[str, float]:
        """Returns what a step of that time means, as metrics.

        Args:
          seconds: of a step.
          devices: that take part.
          peak: operations a second of one of them; 0 means unknown.

        Returns:
          `tflops`, computed by a device in a second; and where the peak is known `mfu`, the share of it, and
          `mfu_effective`, the share by the paper's arithmetic.
        """
        rates = {"tflops": self.computed / seconds / devices / 1e12}
        if peak:
            whole = seconds * devices * peak
            rates |= {"mfu": self.computed / whole, "mfu_effective": self.paper / whole}
        return rates
