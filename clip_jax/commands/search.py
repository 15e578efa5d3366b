"""Commands that use a trained model: labels for pictures, embeddings, an index, answers."""

import argparse
from pathlib import Path
from typing import Any

from clip_jax.commands.flags import MODEL, add_path, check_positive, extra, make_folder_of
from clip_jax.errors import UserError

_DEFAULT_MODEL = f"{MODEL} (default: the one that the index was made with)"


def add(commands: Any) -> None:
    """Adds `classify`, `embed`, `index`, `search` and `serve`."""
    for add_command in (_add_classify, _add_embed, _add_index, _add_search, _add_serve):
        add_command(commands)


def _add_classify(commands: Any) -> None:
    classify = commands.add_parser("classify", help="say which of some labels fits a picture")
    classify.add_argument("images", nargs="+", metavar="image", help="files")
    classify.add_argument("--labels", nargs="+", required=True, help='texts, such as "a cat" "a dog"')
    classify.add_argument("--model", required=True, help=MODEL)
    classify.add_argument("--prompts", help="template set that the labels are put into (default: labels as written)")
    add_path(classify, "--plot", help="PNG to draw")
    classify.set_defaults(run=_classify)


def _classify(arguments: argparse.Namespace) -> None:
    from clip_jax.classify import AS_WRITTEN, classify_images
    from clip_jax.console import print_table
    from clip_jax.data.images import decode
    from clip_jax.evals.prompts import templates
    from clip_jax.pretrained import load

    make_folder_of(arguments.plot)
    prompts = AS_WRITTEN if arguments.prompts is None else templates(arguments.prompts, where="--prompts")
    shares = classify_images(load(arguments.model), arguments.images, arguments.labels, templates=prompts)
    orders = [sorted(range(len(row)), key=lambda i, row=row: -row[i]) for row in shares]
    rows = [
        [image if place == 0 else "", arguments.labels[i], f"{row[i]:.4f}"]
        for image, row, order in zip(arguments.images, shares, orders, strict=True)
        for place, i in enumerate(order)
    ]
    print_table("Probabilities", ["image", "label", "probability"], rows)
    if arguments.plot is not None:
        from clip_jax.search.sheet import draw_bars

        pixels = [decode(Path(image).read_bytes()) for image in arguments.images]
        labels = [[arguments.labels[i] for i in order] for order in orders]
        values = [[float(row[i]) for i in order] for row, order in zip(shares, orders, strict=True)]
        draw_bars(pixels, arguments.images, labels, values, arguments.plot, axis="probability")
        print(arguments.plot)


def _add_embed(commands: Any) -> None:
    embed = commands.add_parser("embed", help="embed images and captions into Parquet; go on where it was stopped")
    embed.add_argument("data", help="a folder, a table, tar shards such as '/data/{000..999}.tar', or source=…,key=…")
    embed.add_argument("folder", help="where to; may be remote")
    embed.add_argument("--model", required=True, help=MODEL)
    embed.add_argument("--kinds", default="images", help="images, texts, or images,texts (default: images)")
    embed.add_argument("--dtype", default="float16", choices=("float16", "float32"), help="of what is stored")
    embed.add_argument("--shard", type=int, help="records of a Parquet file (default: 8192)")
    embed.add_argument("--batch", type=int, help="rows a step, over all devices of a process (default: 256)")
    embed.add_argument("--threads", type=int, help="that read and decode (default: the number of cores)")
    embed.add_argument("--thumbnail", type=int, help="longer side of stored thumbnails; 0 for none (default: 192)")
    embed.add_argument("--compute", default="float32", choices=("float32", "bfloat16"), help="dtype of activations")
    embed.add_argument("--slice", help="I/N: make every N-th shard from the I-th on (default: as JAX's processes are)")
    embed.set_defaults(run=_embed)


def _embed(arguments: argparse.Namespace) -> None:
    from clip_jax.config import DistributedConfig
    from clip_jax.processes.distributed import processes

    slices = None if arguments.slice is None else _parse_slice(arguments.slice)
    kinds = tuple(arguments.kinds.split(","))
    if not set(kinds) <= {"images", "texts"} or len(set(kinds)) < len(kinds):
        raise UserError(f"--kinds={arguments.kinds}: it must be images, texts, or images,texts")
    with processes(DistributedConfig(mode="auto" if slices is None else "off")):
        import jax

        from clip_jax.pretrained import load
        from clip_jax.search.embed import EmbedOptions, embed, open_images

        index, count = slices or (jax.process_index(), jax.process_count())
        given = {name: getattr(arguments, name) for name in ("shard", "batch", "threads", "thumbnail")}
        options = EmbedOptions(
            kinds=kinds,
            dtype=arguments.dtype,
            **{name: value for name, value in given.items() if value is not None},
        )
        model = load(arguments.model, dtype=arguments.compute)
        found = embed(
            open_images(arguments.data, model),
            arguments.folder,
            model=model,
            model_source=arguments.model,
            options=options,
            process_index=index,
            process_count=count,
            report=lambda line: print(line, flush=True),
        )
        if found.manifest is None:
            print(f"{arguments.folder}: this slice is done; other slices are not yet")
            return
        rows = ", ".join(f"{rows:,} {kind}" for kind, rows in found.manifest["rows"].items())
        rejected = ", ".join(f"{reason} {count:,}" for reason, count in found.manifest["rejected"].items())
        print(f"{arguments.folder}: {rows}; rejected: {rejected or 'none'}")


def _parse_slice(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--slice={text}: it must be I/N with I from 0 to N - 1, such as 0/4")
    return int(index), int(count)


def _add_index(commands: Any) -> None:
    index = commands.add_parser("index", help="build an index of embeddings, and measure what it finds")
    index.add_argument("vectors", help="folder of clip-jax embed")
    add_path(index, "folder", help="where to; must not exist")
    index.add_argument("--kind", default="images", choices=("images", "texts"), help="what is found")
    index.add_argument("--recall", type=float, default=0.95, help="share of the 10 nearest to be found (default: 0.95)")
    index.add_argument("--exact-limit", type=int, default=100_000, help="more vectors than this get IVF,SQ8")
    index.set_defaults(run=_index)


@extra("search", "faiss")
def _index(arguments: argparse.Namespace) -> None:
    from clip_jax.search.index import build_index

    about = build_index(
        arguments.vectors,
        arguments.folder,
        kind=arguments.kind,
        target=arguments.recall,
        exact_limit=arguments.exact_limit,
        report=lambda line: print(line, flush=True),
    )
    probes = f", nprobe {about['nprobe']}" if "nprobe" in about else ""
    print(
        f"{arguments.folder}: {about['count']:,} {about['of']}, {about['kind']}{probes}, "
        f"{about['bytes'] / 2**20:,.1f} MiB, built in {about['build_seconds']:.1f} s"
    )


def _add_search(commands: Any) -> None:
    search = commands.add_parser("search", help="find images or captions by a text or an image")
    add_path(search, "index", help="folder of clip-jax index")
    search.add_argument("text", nargs="?", help='such as "red car at night"')
    add_path(search, "--image", help="ask with this image instead")
    search.add_argument("--model", help=_DEFAULT_MODEL)
    search.add_argument("--top", type=int, default=12, help="how many (default: 12)")
    search.add_argument("--nprobe", type=int, help="cells that are searched (default: what the index was tuned to)")
    add_path(search, "--sheet", help="PNG of what was found")
    search.set_defaults(run=_search)


@extra("search", "faiss")
def _search(arguments: argparse.Namespace) -> None:
    from clip_jax.console import print_table
    from clip_jax.data.images import decode
    from clip_jax.search.query import open_searcher

    if (arguments.text is None) == (arguments.image is None):
        raise UserError('ask with a text or with --image: clip-jax search INDEX "red car at night"')
    check_positive(arguments, "top", "nprobe")
    make_folder_of(arguments.sheet)
    searcher = open_searcher(arguments.index, arguments.model, nprobe=arguments.nprobe)
    if arguments.image is None:
        [hits] = searcher.by_text([arguments.text], top=arguments.top)
    else:
        [hits] = searcher.by_image([arguments.image], top=arguments.top)
    of = searcher.index.about["of"]
    asked = repr(arguments.text) if arguments.image is None else str(arguments.image)
    rows = [[str(i), f"{hit.score:.4f}", hit.item.key, hit.item.caption or ""] for i, hit in enumerate(hits, 1)]
    print_table(f"{of} nearest to {asked}, of {len(searcher.index):,}", ["", "cosine", "key", "caption"], rows)
    if arguments.sheet is not None:
        from clip_jax.search.sheet import draw_bars, draw_sheet

        query = None if arguments.image is None else decode(arguments.image.read_bytes())
        if of == "texts" and query is not None:
            captions, scores = [hit.item.caption or "" for hit in hits], [hit.score for hit in hits]
            draw_bars([query], [str(arguments.image)], [captions], [scores], arguments.sheet, axis="cosine")
        else:
            draw_sheet(hits, arguments.sheet, title=asked, query=query)
        print(arguments.sheet)


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser("serve", help="a web page to search and classify, and a JSON API")
    add_path(serve, "index", help="folder of clip-jax index, of images")
    add_path(serve, "--texts", help="an index of captions beside it: dropped images then find captions")
    serve.add_argument("--model", help=_DEFAULT_MODEL)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000); 0 for any")
    serve.add_argument("--rate", type=float, default=20.0, help="queries a client may send in a second (default: 20)")
    serve.add_argument("--max-upload", type=float, default=16.0, help="MiB of a request (default: 16)")
    serve.add_argument("--proxy", help="address of a proxy whose X-Forwarded-For is believed")
    serve.set_defaults(run=_serve)


@extra("serve", "starlette", "uvicorn", "jinja2", "python_multipart")
@extra("search", "faiss")
def _serve(arguments: argparse.Namespace) -> None:
    from clip_jax.search.serve import ServeOptions, serve

    check_positive(arguments, "max_upload")
    options = ServeOptions(
        host=arguments.host,
        port=arguments.port,
        rate=arguments.rate,
        max_upload=int(arguments.max_upload * 2**20),
        proxy=arguments.proxy,
    )
    serve(arguments.index, texts=arguments.texts, model=arguments.model, options=options)
