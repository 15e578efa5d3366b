"""A web page and a JSON API over an index: search by text or image, classify with labels of one's own.

  GET  /                      the page
  POST /api/search            JSON {text, top, of}, or a form with an image
  POST /api/classify          a form with an image and labels
  GET  /api/image/{number}    the thumbnail of an item; ?original=1, or without one, the picture itself if it is a file
  GET  /api/info              what is served

Everything that can be read lies in the index, but for originals: these must be regular files below the folder that was
embedded, after links are followed. Queries of many clients are computed in batches. Needs no other host.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from clip_jax.classify import probabilities
from clip_jax.data.images import ImageError, ImageTooLargeError
from clip_jax.data.records import MAX_FILE_BYTES
from clip_jax.errors import UserError, did_you_mean
from clip_jax.search.batching import Batcher, BusyError
from clip_jax.search.guard import AddHeaders, LimitBody, LimitRate
from clip_jax.search.index import SearchIndex
from clip_jax.search.query import Hit, Searcher, open_searcher

MOST_TEXT, MOST_LABELS, MOST_TOP = 1_000, 100, 200
BATCH_SIZES = (1, 4, 16, 32)
_BODY_SECONDS = 30
_WEB = Path(__file__).with_name("web")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OWN_HOSTS = ("127.0.0.1", "localhost", "[::1]", "[")
"""What browsers call them; the last is what older versions of Starlette read of the one before."""
_MEDIA_TYPES = ((b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG\r\n\x1a\n", "image/png"), (b"GIF8", "image/gif"))


@dataclass(frozen=True)
class ServeOptions:
    """How a page is served.

    Attributes:
      host: address to listen on.
      port: to listen on; 0 for any that is free.
      rate: queries that a client may send in a second.
      max_upload: bytes of a request.
      proxy: address of a proxy whose X-Forwarded-For is believed; None for none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    rate: float = 20.0
    max_upload: int = 16 << 20
    proxy: str | None = None

    def __post_init__(self) -> None:
        if not self.rate > 0 or self.max_upload < 1 << 10:
            raise UserError("--rate must be positive, and --max-upload at least a thousandth")
        if not 0 <= self.port < 1 << 16:
            raise UserError(f"--port is {self.port}; it must be from 0 to 65535")


class Service:
    """What the requests of all clients share: models, indexes, and the batches in which they are asked.

    Args:
      images: of an index of images.
      texts: of an index of captions, made with the same model; None for none.
      sizes: of batches; queries are padded to the next of these, so that few shapes are ever compiled.
    """

    def __init__(self, images: Searcher, texts: Searcher | None = None, *, sizes: Sequence[int] = BATCH_SIZES) -> None:
        if images.index.about["of"] != "images" or (texts is not None and texts.index.about["of"] != "texts"):
            raise UserError("clip-jax serve needs an index of images, and after --texts one of texts")
        self.searchers = {"images": images} | ({} if texts is None else {"texts": texts})
        self.model, self._sizes = images.model, tuple(sizes)
        self._device = ThreadPoolExecutor(1, "device")
        self._decoders = ThreadPoolExecutor(os.cpu_count() or 1, "decode")
        most = self._sizes[-1]
        self.text_features = Batcher(self._embed_texts, self._device, most=most)
        self.image_features = Batcher(self._embed_images, self._device, most=most)
        self.neighbours = {name: Batcher(self._search_in(name), self._device, most=most) for name in self.searchers}

    @contextlib.asynccontextmanager
    async def running(self, _app: Starlette) -> AsyncIterator[None]:
        """Computes batches meanwhile; all shapes are compiled before the first request."""
        await asyncio.get_running_loop().run_in_executor(self._device, self.warm_up)
        batchers = (self.text_features, self.image_features, *self.neighbours.values())
        tasks = [asyncio.create_task(batcher.run()) for batcher in batchers]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for pool in (self._device, self._decoders):
                pool.shutdown()

    def warm_up(self) -> None:
        """Compiles the towers for every size of batch."""
        side = self.model.preprocess.size
        for size in self._sizes:
            self._embed_texts([[""] * size])
            self._embed_images([np.zeros((side, side, 3), np.float32)] * size)

    async def features_of_upload(self, content: bytes) -> np.ndarray:
        """Returns the unit features of an encoded image, [e].

        Raises:
          ImageError: it is none.
        """
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(self._decoders, self.model.preprocess, content)
        return await self.image_features(pixels)

    def _embed_texts(self, asked: list[list[str]]) -> list[np.ndarray]:
        """Returns the unit features of each request's texts, [n, e]."""
        tokens = self.model.tokenize([text for texts in asked for text in texts])
        features = self._in_few_shapes(lambda rows: self.model.encode_text(rows, normalize=True), tokens)
        return np.split(features, np.cumsum([len(texts) for texts in asked])[:-1])

    def _embed_images(self, images: list[np.ndarray]) -> list[np.ndarray]:
        pixels = np.stack(images)
        return list(self._in_few_shapes(lambda rows: self.model.encode_image(rows, normalize=True), pixels))

    def _in_few_shapes(self, encode: Callable[[np.ndarray], Any], rows: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(rows), self._sizes[-1]):
            part = rows[start : start + self._sizes[-1]]
            size = next(size for size in self._sizes if size >= len(part))
            padding = np.zeros((size - len(part), *part.shape[1:]), part.dtype)
            parts.append(np.asarray(encode(np.concatenate([part, padding])))[: len(part)])
        return np.concatenate(parts)

    def _search_in(self, name: str) -> Any:
        def search(asked: list[tuple[np.ndarray, int]]) -> list[list[Hit]]:
            vectors = np.stack([vector for vector, _ in asked])
            found = self.searchers[name].nearest(vectors, top=max(top for _, top in asked))
            return [hits[:top] for hits, (_, top) in zip(found, asked, strict=True)]

        return search


def make_app(service: Service, options: ServeOptions) -> Starlette:
    """Returns the web application.

    Args:
      service: what answers.
      options: limits.
    """
    templates = Jinja2Templates(directory=_WEB)
    api = _Api(service)

    def page(request: Request) -> Response:
        limit = f"{options.max_upload / 2**20:g} MiB"
        return templates.TemplateResponse(request, "index.html", {**api.facts(), "limit": limit})

    outermost_first = [Middleware(AddHeaders)]
    if options.host in _LOOPBACK:  # or a page elsewhere could name this one as its own host (DNS rebinding)
        outermost_first += [Middleware(TrustedHostMiddleware, allowed_hosts=_OWN_HOSTS)]
    outermost_first += [
        Middleware(LimitRate, rate=options.rate),
        Middleware(LimitBody, limit=options.max_upload),
    ]
    return Starlette(
        routes=[
            Route("/", page),
            Route("/api/info", api.info),
            Route("/api/search", api.search, methods=["POST"]),
            Route("/api/classify", api.classify, methods=["POST"]),
            Route("/api/image/{number}", api.image),
            Mount("/static", StaticFiles(directory=_WEB / "static")),
        ],
        middleware=outermost_first,
        lifespan=service.running,
        exception_handlers=_HANDLERS,
    )


def serve(
    index: str | Path,
    *,
    texts: str | Path | None = None,
    model: str | None = None,
    options: ServeOptions | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT; requests under way are answered first.

    Args:
      index: of images.
      texts: an index of captions beside it.
      model: see `open_searcher`.
      options: see `ServeOptions`.

    Raises:
      UserError: no index, another model, or an address that cannot be listened on.
    """
    options = options or ServeOptions()
    images = open_searcher(index, model)
    captions = None if texts is None else Searcher(SearchIndex(texts), images.model)
    with _listening(options) as listener:
        app = make_app(Service(images, captions), options)
        config = uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            proxy_headers=options.proxy is not None,
            forwarded_allow_ips=options.proxy,
            timeout_graceful_shutdown=10,
            limit_concurrency=1_024,
        )
        server = uvicorn.Server(config)
        # uvicorn hands the signal on when it has shut down in order; there is nothing left to be ended then.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        host, port = listener.getsockname()[:2]
        print(f"{len(images.index):,} images at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        server.run(sockets=[listener])


class _Api:
    """The JSON API: requests are checked here, and answered by a `Service`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def facts(self) -> dict[str, Any]:
        """Returns what is served."""
        searchers = self._service.searchers
        about = searchers["images"].index.about
        return {
            "images": len(searchers["images"].index),
            "texts": len(searchers["texts"].index) if "texts" in searchers else 0,
            "model": Path(about["model"]["source"]).name or about["model"]["source"],
            "originals": about["root"] is not None,
        }

    async def info(self, _request: Request) -> Response:
        """Says what is served."""
        return JSONResponse(self.facts())

    async def search(self, request: Request) -> Response:
        """Finds images, or captions, by a text or an image."""
        began = time.monotonic()
        async with _values(request) as values:
            _check_keys(values, ("text", "image", "top", "of"))
            of = values.get("of", "images")
            if not isinstance(of, str) or of not in self._service.searchers:
                raise HTTPException(400, f"of is {of!r:.50}; it must be {' or '.join(self._service.searchers)}")
            top = _whole_number(values, "top", default=24, most=MOST_TOP)
            if ("text" in values) == ("image" in values):
                raise HTTPException(400, "ask with text or with image, one of them")
            if "text" in values:
                [vector] = await self._service.text_features([_text(values["text"], "text")])
            else:
                vector = await self._service.features_of_upload(await _upload(values))
        hits = await self._service.neighbours[of]((vector, top))
        milliseconds = round((time.monotonic() - began) * 1_000, 2)
        return JSONResponse({"hits": [_hit(hit) for hit in hits], "milliseconds": milliseconds})

    async def classify(self, request: Request) -> Response:
        """Says how well each label fits an image."""
        async with _values(request, repeated="labels") as values:
            _check_keys(values, ("image", "labels"))
            if "image" not in values:
                raise HTTPException(400, "there is no image")
            labels = _labels(values.get("labels", []))
            feature = await self._service.features_of_upload(await _upload(values))
        weights = await self._service.text_features(labels)
        shares = probabilities(self._service.model, feature[None], weights)[0]
        order = np.argsort(-shares, kind="stable")
        return JSONResponse({"labels": [{"label": labels[i], "probability": float(shares[i])} for i in order]})

    def image(self, request: Request) -> Response:
        """Gives the picture of an item, and nothing that is not one."""
        index = self._service.searchers["images"].index
        number = request.path_params["number"]
        try:
            item = index.item(int(number) if number.isascii() and number.isdecimal() and len(number) < 20 else -1)
        except IndexError:
            raise HTTPException(404, f"there is no such item; they are 0 to {len(index) - 1}") from None
        if (request.query_params.get("original") == "1" or item.thumbnail is None) and index.root is not None:
            content = _read_below(index.root, item.key)
            media_type = None if content is None else _media_type(content)
            if media_type is not None:
                return Response(content, media_type=media_type)
        if item.thumbnail is None:
            raise HTTPException(404, "no thumbnail was kept of this item")
        return Response(item.thumbnail, media_type="image/jpeg")


@contextlib.asynccontextmanager
async def _values(request: Request, *, repeated: str = "") -> AsyncIterator[dict[str, Any]]:
    """Gives the values of a JSON object or of a form; of a key that may be repeated, a list."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise HTTPException(415, "send application/json or multipart/form-data")
    try:
        async with asyncio.timeout(_BODY_SECONDS):  # not around what is done with the values
            if kind == "application/json":
                values = _json_object(await request.body())
            else:
                form = await _form(request)
                values = {key: _one_or_all(key, form.getlist(key), repeated) for key in form}
        yield values
    except TimeoutError:
        raise HTTPException(408, f"the request did not arrive within {_BODY_SECONDS} s") from None
    finally:
        await request.close()


async def _form(request: Request) -> FormData:
    try:
        return await request.form(max_files=1, max_fields=MOST_LABELS + 8, max_part_size=16 << 10)
    except UnicodeError:  # such as for charset=undefined; what Starlette itself expects, it takes for latin-1
        raise HTTPException(400, "the form's texts are not in the charset that it names") from None


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON") from None
    if not isinstance(values, dict):
        raise HTTPException(400, "the body is not a JSON object")
    return values


def _one_or_all(key: str, found: list[Any], repeated: str) -> Any:
    if len(found) > 1 and key != repeated:
        raise HTTPException(400, f"{key!r:.50} is there {len(found)} times")
    return found if key == repeated else found[0]


def _check_keys(values: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in values:
        if key not in known:
            guess = did_you_mean(str(key)[:50], known)
            raise HTTPException(400, f"unknown key {key!r:.50}{guess} (keys: {', '.join(known)})")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise HTTPException(400, f"{what} must be a text that is not blank")
    if len(value) > MOST_TEXT:
        raise HTTPException(400, f"{what} has {len(value):,} letters; at most {MOST_TEXT:,} are read")
    return value


def _labels(values: Any) -> list[str]:
    if not isinstance(values, list) or not 1 <= len(values) <= MOST_LABELS:
        raise HTTPException(400, f"labels must be 1 to {MOST_LABELS} texts")
    labels = [_text(value, "a label").strip() for value in values]
    if len(set(labels)) < len(labels):
        raise HTTPException(400, "a label is there twice")
    return labels


def _whole_number(values: Mapping[str, Any], key: str, *, default: int, most: int) -> int:
    value = values.get(key, default)
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value[:10])
    if type(value) is not int or not 1 <= value <= most:
        raise HTTPException(400, f"{key} must be a whole number from 1 to {most}")
    return value


async def _upload(values: Mapping[str, Any]) -> bytes:
    if not isinstance(values["image"], UploadFile):
        raise HTTPException(400, "image must be a file of a form (multipart/form-data)")
    return await values["image"].read()


def _hit(hit: Hit) -> dict[str, Any]:
    return {
        "number": hit.number,
        "score": round(hit.score, 4),
        "key": hit.item.key,
        "caption": hit.item.caption,
        "record": hit.item.record,
    }


def _read_below(root: Path, key: str) -> bytes | None:
    """Returns a regular file below a folder, links followed; None for anything else."""
    try:
        folder = root.resolve(strict=True)
        path = (folder / key).resolve(strict=True)
        if not path.is_relative_to(folder) or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            return None
        return path.read_bytes()
    except (OSError, ValueError):
        return None


def _media_type(content: bytes) -> str | None:
    """Returns the type of an image that browsers show; None for any other content."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for magic, kind in _MEDIA_TYPES if content.startswith(magic)), None)


async def _refused(_request: Request, error: Any) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


async def _no_image(_request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 413 if isinstance(error, ImageTooLargeError) else 422)


async def _gone(_request: Request, _error: Exception) -> Response:
    return JSONResponse({"error": "the client went away"}, 400)  # nobody reads it


async def _busy(_request: Request, _error: Exception) -> Response:
    return JSONResponse({"error": "too many queries wait; try again"}, 503, headers={"Retry-After": "1"})


async def _failed(_request: Request, _error: Exception) -> Response:
    return JSONResponse({"error": "the server failed; its log says how"}, 500)  # the traceback is uvicorn's to log


_HANDLERS = {
    HTTPException: _refused,
    ImageError: _no_image,
    BusyError: _busy,
    ClientDisconnect: _gone,
    Exception: _failed,
}


@contextlib.contextmanager
def _listening(options: ServeOptions) -> Iterator[socket.socket]:
    """Gives a socket that listens on the address.

    Raises:
      UserError: it cannot be.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((options.host, options.port))
            listener.listen(1_024)  # who comes while the towers are compiled waits, and is not turned away
        except OSError as error:
            raise UserError(
                f"--host={options.host} --port={options.port} cannot be listened on ({error.strerror}); use another "
                "port, or --port=0 for any"
            ) from None
        yield listener
