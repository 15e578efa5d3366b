"""Weights from elsewhere, downloaded once: OpenAI's, which are checked, the Hugging Face Hub's, and those of any store.

Addresses and checksums of OpenAI's files: openai/CLIP `clip/clip.py`, whose file names they are.
"""

import fnmatch
import http.client
import itertools
import os
import re
import shutil
import urllib.request
from collections.abc import Callable, Collection
from pathlib import Path

from clip_jax.data.storage import Storage, bring, file_system, find
from clip_jax.errors import UserError, one_line
from clip_jax.files import RECORD, appearing, digest, folder_appearing, take_lock
from clip_jax.interop.weights import file_sha256

HUB_PREFIX = "hf-hub:"

# Config and weights, of which a folder may hold several with the same numbers: the first are taken.
_LAYOUTS = (
    ("open_clip_config.json", "open_clip_model.safetensors"),
    ("open_clip_config.json", "open_clip_pytorch_model.bin"),
    ("config.json", "model.safetensors"),
    ("config.json", "model.safetensors.index.json", "model-*.safetensors"),
    ("config.json", "pytorch_model.bin"),
)

_PIXELS = "*processor_config.json"

# fmt: off
_SHA256 = {
    "RN50":         ("RN50.pt",           "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    "RN101":        ("RN101.pt",          "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    "RN50x4":       ("RN50x4.pt",         "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    "RN50x16":      ("RN50x16.pt",        "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"),
    "RN50x64":      ("RN50x64.pt",        "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"),
    "ViT-B/32":     ("ViT-B-32.pt",       "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16":     ("ViT-B-16.pt",       "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14":     ("ViT-L-14.pt",       "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336": ("ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
}
# fmt: on
_SERVER = "https://openaipublic.azureedge.net/clip/models"
_CHUNK = 1 << 20
_RETRY_S = 30.0


def download_openai(name: str, *, server: str | None = None, cache: Path | None = None) -> Path:
    """Returns the path of OpenAI's `.pt` file of a model, downloading it where the cache lacks it.

    Args:
      name: the paper's name, such as `ViT-B/32`.
      server: where `<sha256>/<file>` lies; by default OpenAI's.
      cache: folder of downloaded files; by default `$CLIP_JAX_CACHE`, or `clip_jax` in the user's cache folder.

    Raises:
      UserError: the server cannot be reached, or sent something else.
    """
    file, sha256 = _SHA256[name]
    url, target = f"{server or _SERVER}/{sha256}/{file}", (cache or _cache()) / file
    try:
        _make_once(
            target,
            lambda: target.exists() and file_sha256(target) == sha256,
            lambda: _download(url, target, sha256),
        )
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{url} cannot be downloaded to {target}: {one_line(error)}; or fetch it otherwise and load the file"
        ) from None
    return target


def download_hub(repository: str) -> Path:
    """Returns a local copy of a Hub repository's weights, config and preprocessor.

    Args:
      repository: such as `openai/clip-vit-base-patch32` or `laion/CLIP-ViT-B-32-laion2B-s34B-b79K`.

    Raises:
      UserError: no such repository, or the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    folder = Path()
    try:
        for files in _LAYOUTS:
            folder = Path(snapshot_download(repository, allow_patterns=[*files, _PIXELS]))
            if all(any(folder.glob(name)) for name in files):
                break
    except Exception as error:  # the Hub's client raises a dozen kinds, of three libraries
        raise UserError(f"{HUB_PREFIX}{repository} cannot be downloaded: {one_line(error)}") from None
    return folder


def download_url(url: str, *, cache: Path | None = None) -> Path:
    """Returns a local copy of weights in a store, which is made anew where the store's have changed.

    Args:
      url: a `.pt` file, by any protocol that fsspec knows; or, by one that lists folders, a folder in open_clip's or
        Hugging Face's layout, or a run (`config.checkpoint.mirror`, or a workdir in a bucket), of which the newest
        checkpoint is taken, or one of its checkpoints.
      cache: as of `download_openai`.

    Raises:
      UserError: an unknown protocol, nothing there, or a store that cannot be read.
    """
    system, root = file_system(url)
    name = Path(root.partition("?")[0]).name  # the Hub's links end in ?download=true, and names tell layouts apart
    try:
        found = {"": Storage(_RETRY_S).stat(url)} if url.startswith("http") else find(system, root)
        files = [""] if "" in found else _of_weights(found)
        if not files:
            raise UserError(f"{url}: {'no weights are' if found else 'nothing is'} there")
        folder = (cache or _cache()) / "urls" / digest(url, *((file, *found[file]) for file in sorted(files)))

        def make() -> None:
            print(f"downloading {url} to {folder / name}")
            with folder_appearing(folder) as whole:
                bring(system, {f"{root}/{file}".rstrip("/"): whole / name / file for file in files})

        _make_once(folder, folder.exists, make)
    except UserError:
        raise
    except Exception as error:  # of any kind: it went through a store's package
        raise UserError(f"{url} cannot be downloaded: {one_line(error)}") from None
    return folder / name


def _of_weights(names: Collection[str]) -> list[str]:
    """Returns which files of a folder are read for the weights in it: one layout's, or a checkpoint, a run's newest."""
    above = [name for name in names if "/" not in name]
    for patterns in _LAYOUTS:
        matches = [fnmatch.filter(above, pattern) for pattern in patterns]
        if all(matches):
            return [*itertools.chain(*matches), *fnmatch.filter(above, _PIXELS)]
    if RECORD in names:
        return [*names]
    if not (below := {name for name in names if re.match(r"checkpoints/\d+/", name)}):
        return []
    from clip_jax.checkpoints.mirror import LIST  # Orbax takes a second to import, and only runs need it

    steps = {name.split("/")[1] for name in below}
    whole = {step for step in steps if f"checkpoints/{step}/{LIST}" in below}
    newest = max(whole or steps, key=int)
    return [name for name in below if name.split("/")[1] == newest and not name.endswith(f"/{LIST}")]


def _make_once(target: Path, is_there: Callable[[], bool], make: Callable[[], None]) -> None:
    """Makes what is not there in one process, for which others that want it wait."""
    if is_there():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as file:
        take_lock(file, "every process downloads by itself", wait=True)
        try:
            if not is_there():
                make()
        except OSError:  # where there are no locks, another process may have been faster
            if not is_there():
                raise


def _download(url: str, target: Path, sha256: str) -> None:
    print(f"downloading {url} to {target}")
    with appearing(target) as partial:
        with partial.open("wb") as file, urllib.request.urlopen(url, timeout=60) as response:
            shutil.copyfileobj(response, file, _CHUNK)
        found = file_sha256(partial)
        if found != sha256:
            raise UserError(f"{url} sent {partial.stat().st_size:,} bytes of another SHA-256 ({found}); try again")


def _cache() -> Path:
    folder = os.environ.get("CLIP_JAX_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "clip_jax")
    return Path(folder).expanduser()
