"""The same numbers as torch's: open_clip's models and `transformers`' CLIPModel on random weights.

`-s` prints the largest differences; docs/results.md keeps them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import import_open_clip
from torch_clip import (
    SMALL_RESNET,
    SMALL_VIT,
    random_batch,
    random_variables,
    torch_clip,
    torch_features,
    torch_images,
)

from benchmarks.anchor import torch_optimizer
from clip_jax.config import OptimConfig, RunConfig
from clip_jax.data.images import normalize, preprocess_of
from clip_jax.errors import UserError
from clip_jax.interop.hugging_face import config_to_hugging_face
from clip_jax.interop.names import from_torch, to_torch
from clip_jax.interop.open_clip import config_from_open_clip
from clip_jax.interop.weights import Weights
from clip_jax.models.clip import CLIP, count_parameters, forward, forward_train, init_variables
from clip_jax.models.flops import image_flops, text_flops
from clip_jax.models.variants import VARIANTS, ViTConfig, model_config
from clip_jax.partition import make_mesh, place_rows
from clip_jax.pretrained import Pretrained
from clip_jax.training.losses import softmax_loss
from clip_jax.training.optim import learning_rate, make_optimizer
from clip_jax.training.state import TrainState
from clip_jax.training.step import make_train_step

SMALL = {"ViT": SMALL_VIT, "RN": SMALL_RESNET}
VITS = [name for name in VARIANTS if isinstance(model_config(name).vision, ViTConfig)]

# Compiling these programs takes longer than running them; the sums are the same.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def f64(config):
    return dataclasses.replace(config, dtype="float64")


def without_key_biases(named, config):
    """Splits torch's tensors: (all but the key biases, the key biases).

    A key bias adds one number to all logits of a query, so its gradient is 0, and what is there is rounding.
    """
    kept, keys = {}, {}
    for name, tensor in named.items():
        if name.endswith("k_proj.bias"):
            keys[name] = tensor
        elif name.endswith("in_proj_bias"):
            query, keys[name], value = np.split(tensor, 3)
            kept[name] = np.concatenate([query, value])
        else:
            kept[name] = tensor
    return kept, keys


def worst(ours, theirs):
    """The largest error of any tensor, relative to the tensor's largest value."""
    assert ours.keys() == theirs.keys()
    return np.max([np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max() for name in ours])


@pytest.mark.parametrize("name", SMALL)
def test_gradients_equal_torchs_in_f64(x64, name):
    """Every parameter's gradient of the CLIP loss, with BatchNorm in training mode."""
    open_clip = import_open_clip()
    import torch

    config = f64(SMALL[name])
    variables, (images, tokens) = random_variables(config), random_batch(config, 6)
    model = torch_clip(config, variables).train()
    features = model(torch_images(images), torch.tensor(tokens))
    their_loss = open_clip.ClipLoss()(*features)
    their_loss.backward()
    theirs = {key: p.grad.numpy() for key, p in model.named_parameters()}

    def loss(params, images, tokens):
        output, _ = forward_train(CLIP(config), variables | {"params": params}, images, tokens)
        return softmax_loss(*output[:3], jnp.ones(6)).loss

    value, gradients = jit(jax.value_and_grad(loss))(variables["params"], images, tokens)
    ours, our_keys = without_key_biases(to_torch(gradients, "openai"), config)
    theirs, _ = without_key_biases(theirs, config)
    error = worst(ours, theirs)
    print(f"{name}, f64: loss {abs(value - their_loss.item()):.1e}, gradients {error:.1e}")
    assert abs(value - their_loss.item()) <= 1e-12
    assert error <= 1e-9
    norm = math.sqrt(sum((gradient**2).sum() for gradient in ours.values()))
    assert all(np.abs(gradient).max() <= 1e-6 * norm for gradient in our_keys.values())
    assert our_keys


def torch_losses(model, run, batches):
    """Losses of training open_clip's model: its loss, torch's AdamW, our schedule, the clamp after the update."""
    open_clip = import_open_clip()
    import torch

    optimizer, rate = torch_optimizer(model, run), jax.jit(learning_rate(run.optim, steps=run.steps))
    found = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(jnp.int32(step)))
        images = np.asarray(normalize(batch["image"], preprocess_of(run.model), "float64"))
        loss = open_clip.ClipLoss()(*model(torch_images(images), torch.tensor(batch["tokens"])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(run.optim.max_scale))
        found.append(loss.item())
    return np.array(found)


def our_losses(variables, run, batches):
    """Losses of the real train step, from these variables."""
    model, optimizer = CLIP(run.model), make_optimizer(run.optim, steps=run.steps)
    mesh = make_mesh(run.mesh, devices=jax.devices()[:1])
    state = TrainState(step=jnp.zeros((), jnp.int32), opt_state=optimizer.init(variables["params"]), **variables)
    state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    step = make_train_step(model, optimizer, run, mesh=mesh, state=state)
    found = []
    for batch in batches:
        state, metrics = step(state, place_rows(batch, mesh))
        found.append(float(metrics["loss"]))
    return np.array(found), state


@pytest.mark.parametrize("name", SMALL)
def test_five_steps_of_adamw_equal_torchs_in_f64(x64, name):
    """Clamp, decay mask, schedule, BatchNorm in training mode: losses and what the weights become."""
    config = f64(SMALL[name])
    optim = OptimConfig(lr=3e-3, warmup_steps=2, eps=1e-8, max_scale=19.0)  # the first update is clamped: 20 before
    run = RunConfig(config, optim=optim, batch=8, samples=8 * 6)
    variables = random_variables(config)
    rng = np.random.default_rng(3)
    batches = [
        {
            "image": rng.integers(0, 256, (8, *random_batch(config, 1)[0].shape[1:]), np.uint8),
            "tokens": random_batch(config, 8, seed=seed)[1],
            "weight": np.ones(8, np.float32),
        }
        for seed in range(5)
    ]
    model = torch_clip(config, variables).train()
    theirs = torch_losses(model, run, batches)
    ours, state = our_losses(variables, run, batches)
    difference = np.abs(ours / theirs - 1).max()
    kept, _ = without_key_biases(to_torch(jax.device_get(state.variables), "openai"), config)
    after, _ = without_key_biases({key: tensor.numpy() for key, tensor in model.state_dict().items()}, config)
    counters = [key for key in kept if key.endswith("num_batches_tracked")]
    assert all(after.pop(key) == 5 and kept.pop(key) == 0 for key in counters)
    print(f"{name}, f64, 5 steps: losses {difference:.1e}, weights afterwards {worst(kept, after):.1e}; {ours}")
    assert difference <= 1e-8
    assert worst(kept, after) <= 1e-9
    assert np.ptp(ours) > 0.1


@pytest.mark.parametrize("name", ["ViT", pytest.param("RN", marks=pytest.mark.slow)])
def test_perturbing_any_tensor_moves_the_output_as_torchs(x64, name):
    """No tensor is ignored: each, moved alone, moves the logits, and as it moves torch's."""
    import_open_clip()
    import torch

    config = f64(SMALL[name])
    variables, (images, tokens) = random_variables(config), random_batch(config, 3)
    model = torch_clip(config, variables)
    ours_of = jax.jit(lambda v, *batch: logits(*forward(CLIP(config), v, *batch)[:3]))

    def theirs_of():
        return logits(*torch_features(model, images, tokens), math.exp(model.logit_scale.item()))

    leaves, structure = jax.tree.flatten(variables)
    before, their_before = ours_of(variables, images, tokens), theirs_of()
    np.testing.assert_allclose(before, their_before, rtol=0, atol=1e-11)
    rng = np.random.default_rng(4)
    largest = 0.0
    for i, leaf in enumerate(leaves):
        moved = jax.tree.unflatten(
            structure, [*leaves[:i], leaf * rng.uniform(1.02, 1.1, leaf.shape), *leaves[i + 1 :]]
        )
        with torch.no_grad():
            model.load_state_dict({key: torch.tensor(tensor) for key, tensor in to_torch(moved, "openai").items()})
        ours, theirs = ours_of(moved, images, tokens) - before, theirs_of() - their_before
        path = jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(variables)[i][0], simple=True, separator="/")
        assert np.abs(theirs).max() > (0 if path.endswith("key/bias") else 1e-4), path
        assert np.abs(ours - theirs).max() <= 1e-10, path
        largest = max(largest, np.abs(ours - theirs).max())
    print(f"{name}, f64: {len(leaves)} tensors perturbed, moves differ by {largest:.1e}")


def logits(image, text, scale):
    return scale * image @ text.T


def compare_in_f32(name, theirs, variables, images, tokens):
    """Bounds unit features and logits at scale 100, and prints a row of the table."""
    config = model_config(name)
    with jax.default_matmul_precision("highest"):
        output = jit(functools.partial(forward, CLIP(config)))(variables, images, tokens)
    image, text = np.asarray(output.image), np.asarray(output.text)
    features = max(np.abs(image - theirs[0]).max(), np.abs(text - theirs[1]).max())
    difference = np.abs(logits(image, text, 100) - logits(*theirs, 100)).max()
    print(f"{name}, f32: unit features {features:.1e}, logits at scale 100 {difference:.1e}")
    assert features <= 2e-5
    assert difference <= 5e-3


def randomise_constants(model):
    """Gives every tensor that starts constant (norms, biases, running statistics) random values, near where it was."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.numel() > 1 and tensor.std() == 0:
                near_one = name.endswith(("weight", "running_var"))
                low, high = (0.5, 1.5) if near_one else (-0.1, 0.1)
                tensor.uniform_(low, high, generator=generator)


@pytest.mark.parametrize("name", ["ViT-g-14", "ViT-bigG-14", "ViT-e-14"])
@pytest.mark.parametrize("layers", [1, pytest.param(None, marks=pytest.mark.slow, id="all")])
def test_the_largest_models_have_open_clips_parameters_and_operations(name, layers):
    """Of shapes alone: their MLPs are not four times as wide as their image towers."""
    open_clip = import_open_clip()
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    described = open_clip.get_model_config(name)
    for tower in ("vision_cfg", "text_cfg"):
        described[tower]["layers"] = layers or described[tower]["layers"]
    config, _ = config_from_open_clip({"model_cfg": described}, where=name)
    shapes = jax.eval_shape(lambda: init_variables(CLIP(config), jax.random.key(0)))
    with torch.device("meta"):
        theirs = open_clip.model.CLIP(**described)
        with FlopCounterMode(display=False) as image:
            theirs.encode_image(torch.zeros(1, 3, 224, 224))
        with FlopCounterMode(display=False) as text:
            theirs.encode_text(torch.zeros(1, 77, dtype=torch.int32))
    assert count_parameters(shapes["params"]) == sum(parameter.numel() for parameter in theirs.parameters())
    assert (image_flops(config), text_flops(config)) == (image.get_total_flops(), text.get_total_flops())


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_full_size_equals_open_clip_in_f32(name):
    open_clip = import_open_clip()
    config = model_config(name)
    model = open_clip.create_model(f"{name.replace('/', '-').replace('@', '-')}-quickgelu", pretrained=None).eval()
    randomise_constants(model)
    images, tokens = random_batch(config, 2, dtype=np.float32)
    theirs = torch_features(model, images, tokens)
    named = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    compare_in_f32(name, theirs, from_torch(named, config, "openai", where=name), images, tokens)


def test_the_states_that_generators_take_are_those_of_transformers():
    import_open_clip()  # makes torchvision importable
    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    theirs = CLIPModel(CLIPConfig.from_dict(config_to_hugging_face(SMALL_VIT))).eval()
    randomise_constants(theirs)
    images, tokens = random_batch(SMALL_VIT, 2, dtype=np.float32)
    with torch.no_grad():
        text = theirs.text_model(torch.tensor(tokens), output_hidden_states=True)
        image = theirs.vision_model(torch_images(images), output_hidden_states=True)
    named = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
    variables = from_torch(named, SMALL_VIT, "hugging_face", where="theirs")
    ours = Pretrained(Weights(SMALL_VIT, variables, preprocess_of(SMALL_VIT)))
    for found, expected in (
        (ours.text_states(tokens), text.hidden_states[-2]),
        (ours.text_states(tokens, layer=-1), text.hidden_states[-1]),
        (ours.text_states(tokens, layer=0), text.hidden_states[1]),
        (ours.text_states(tokens, layer=-1, norm=True), text.last_hidden_state),
        (ours.image_states(images), image.hidden_states[-2]),
        (ours.image_states(images, layer=-1), image.last_hidden_state),
    ):
        assert found.shape == tuple(expected.shape)
        np.testing.assert_allclose(found, expected, atol=2e-5 * float(expected.abs().max()))
    for layer in (2, -3):
        with pytest.raises(UserError, match=rf"layer={layer}: the tower has 2 blocks, 0 to 1, or -1 to -2"):
            ours.text_states(tokens, layer=layer)
    resnet = random_variables(SMALL_RESNET, dtype=np.float32)
    with pytest.raises(UserError, match="a ResNet has no tokens"):
        Pretrained(Weights(SMALL_RESNET, resnet, preprocess_of(SMALL_RESNET))).image_states(images)


@pytest.mark.slow
@pytest.mark.parametrize("name", VITS)
def test_full_size_equals_transformers_in_f32(name):
    import_open_clip()  # makes torchvision importable
    import torch
    from transformers import CLIPConfig, CLIPModel

    config = model_config(name)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig.from_dict(config_to_hugging_face(config))).eval()
    randomise_constants(model)
    images, tokens = random_batch(config, 2, dtype=np.float32)
    with torch.no_grad():
        output = model(input_ids=torch.tensor(tokens), pixel_values=torch_images(images))
    theirs = output.image_embeds.numpy(), output.text_embeds.numpy()
    named = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    compare_in_f32(name, theirs, from_torch(named, config, "hugging_face", where=name), images, tokens)
