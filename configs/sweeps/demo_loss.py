"""Loss × temperature × initialisation on the demo's scans: 8 arms with 3 seeds.

  clip-jax sweep run configs/sweeps/demo_loss.py
  clip-jax compare runs/demo_loss --baseline softmax,learnt,init=released --out runs/demo_loss/compare

Two CPU cores: 24 runs of about half a minute. The sigmoid loss comes with SigLIP's bias and first temperature
(Zhai et al., 2023, §3.2). A fixed temperature stays where it began. See docs/ablations.md.
"""

from clip_jax.ablations.sweep import Sweep, arm, product

LOSSES = [
    arm("softmax", {"loss.kind": "softmax"}),
    arm("sigmoid", {"loss.kind": "sigmoid", "model.logit_bias": True, "model.temperature": 0.1}),
]
TEMPERATURES = [
    arm("learnt", {"optim.freeze": ()}),
    arm("fixed", {"optim.freeze": ("^logit_scale$",)}),
]


def get_sweep() -> Sweep:
    return Sweep(
        config="configs/demo.py",
        arms=product(LOSSES, TEMPERATURES, {"model.init": ["released", "scaled"]}),
        seeds=(0, 1, 2),
        common={
            "batch": 120,
            "samples": 120 * 200,
            "optim.warmup_steps": 20,
            "eval.every": 50,
            "log.tensorboard": False,
        },
    )
