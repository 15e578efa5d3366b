"""What training the nine models costs, by arithmetic: `python -m benchmarks.costs`.

Prints the rows of the table in docs/pretraining.md, from the configs, operations of a pair and the chips' data sheets.
"""

from pathlib import Path

from benchmarks.plans import CONFIGS, table_row
from clip_jax.chips import CHIPS
from clip_jax.command_line import load_config
from clip_jax.models.variants import variant_name
from clip_jax.planning.utilization import StepFlops

MFU = 0.4
DOLLARS_AN_H100_HOUR = 2.0
ROOT = Path(__file__).parent.parent


def rows() -> list[str]:
    """Returns the table's rows, in Markdown."""
    return [_row(name) for name in CONFIGS]


def _row(name: str) -> str:
    config = load_config(str(ROOT / "configs" / f"{name}.py"), [], without_data=True)
    of_a_pair = StepFlops.of(config, devices=1).paper / config.batch
    hours = {chip: config.samples * of_a_pair / (MFU * CHIPS[chip].peak) / 3600 for chip in ("h100", "v5p")}
    return table_row(
        variant_name(config.model),
        f"`{name}.py`",
        f"{config.samples / 1e9:.1f} G",
        f"{config.optim.lr:g}",
        f"{of_a_pair / 1e9:,.0f}",
        f"{hours['h100']:,.0f}",
        f"{hours['h100'] / 64 / 24:.1f}",
        f"{hours['v5p']:,.0f}",
        f"{hours['v5p'] / 256 / 24:.1f}",
        f"{hours['h100'] * DOLLARS_AN_H100_HOUR:,.0f} $",
    )


if __name__ == "__main__":
    print("\n".join(rows()))
