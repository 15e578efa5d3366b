"""Trains a CLIP model: python train.py --config=configs/demo.py --workdir=runs/demo

Any value of the config can be set: --config=configs/vit_b32.py:batch=4096,fsdp=8 --config.optim.lr=1e-3
A workdir that holds checkpoints is resumed.
"""

import signal
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from clip_jax.command_line import Overrides, build_config, one_line_errors, parse_flags, take_overrides
from clip_jax.errors import UserError
from clip_jax.files import local_path

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, such as configs/demo.py[:key=value,...].")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and the report.")


def main(argv: Sequence[str], *, overrides: Overrides) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks for a profile; before the first step it would end the process
    if argv[1:]:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
    file = config_flags.get_config_filename(flags.FLAGS["config"]) if flags.FLAGS["config"].present else None
    config = build_config(_CONFIG.value, overrides, file=file)
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; name a folder for this run, such as --workdir=runs/first")
    workdir = local_path("--workdir", _WORKDIR.value)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax speaks at every save
    from clip_jax.processes.distributed import processes  # after all that can be refused without waiting for JAX

    with processes(config.distributed):
        from clip_jax.run.startup import Startup, keep_programs, process_age
        from clip_jax.run.trainer import train

        keep_programs(config.compilation_cache)
        train(config, workdir, startup=Startup(age=process_age()))


if __name__ == "__main__":
    with one_line_errors():
        sys.argv, given = take_overrides(sys.argv)
        app.run(lambda argv: main(argv, overrides=given), flags_parser=parse_flags)
