"""The run's config: frozen dataclasses, checked, and the one door from ml_collections and the command line into them.

A config file returns a ConfigDict made by `to_config_dict`. Nothing here imports JAX.
"""

from clip_jax.config.sections import (
    HELD_OUT_METRICS,
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    EvalConfig,
    HealthConfig,
    LogConfig,
    LossConfig,
    MeshConfig,
    OptimConfig,
    RunConfig,
)
from clip_jax.config.sources import data_sources, held_out_source, kind_named, pairs_named, parse_source
from clip_jax.config.values import (
    NOT_SIZES,
    apply_argument,
    as_json,
    describe_diff,
    diff,
    from_config_dict,
    from_saved,
    model_diff,
    override,
    override_all,
    to_config_dict,
)

__all__ = [
    "HELD_OUT_METRICS",
    "NOT_SIZES",
    "CheckpointConfig",
    "DataConfig",
    "DistributedConfig",
    "EvalConfig",
    "HealthConfig",
    "LogConfig",
    "LossConfig",
    "MeshConfig",
    "OptimConfig",
    "RunConfig",
    "apply_argument",
    "as_json",
    "data_sources",
    "describe_diff",
    "diff",
    "from_config_dict",
    "from_saved",
    "held_out_source",
    "kind_named",
    "model_diff",
    "override",
    "override_all",
    "pairs_named",
    "parse_source",
    "to_config_dict",
]
