"""``mmscale data tokenizer`` and ``fertility``: train a tokenizer, and compare tokenizers by language."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from data_pipeline.prepare.choices import ModelType
from mmscale.cli.console import console, emit, printable, progress

app = typer.Typer()

_JSON = typer.Option(False, "--json", help="Print one JSON object instead of lines.")


@app.command(epilog="Example: mmscale data tokenizer shards/train.manifest --output tokenizer.model --vocab-size 8000")
def tokenizer(
    manifests: list[Path] = typer.Argument(help="Manifests of the data sets whose text to read."),
    output: Path = typer.Option(..., "--output", help="SentencePiece model file to write."),
    vocab_size: int = typer.Option(
        32_000, "--vocab-size", min=262, help="Number of pieces, including 5 special ones and 256 bytes."
    ),
    model_type: ModelType = typer.Option("bpe", "--model-type", help="Algorithm."),
    character_coverage: float = typer.Option(
        0.9995,
        "--character-coverage",
        min=0.98,
        max=1.0,
        help="Share of characters that get a piece of their own; the others are encoded as bytes.",
    ),
    max_samples: int = typer.Option(
        1_000_000, "--max-samples", min=1, help="With more samples than this, only every n-th is used."
    ),
    special: list[str] = typer.Option([], "--special", help="A further special piece, such as '<tile_1>'; repeatable."),
    json: bool = _JSON,
) -> None:
    """Train a SentencePiece model on the text of shards."""
    from data_pipeline.prepare.tokenizer_training import train_sentencepiece
    from data_pipeline.shards.manifest import Manifest

    total = sum(Manifest.open(path).num_samples for path in manifests)
    with progress("tokenizer", total) as meter:
        trained = train_sentencepiece(
            manifests,
            output,
            vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            max_samples=max_samples,
            special_tokens=special,
            progress=lambda done, of: meter.advance(1),
        )
    results = {"tokenizer": str(output), "vocab_size": trained.vocab_size, "fingerprint": trained.fingerprint}
    emit(results, json=json)


@app.command(epilog="Example: mmscale data fertility a.model b/tokenizer.json shards/train.manifest --field names")
def fertility(
    paths: list[Path] = typer.Argument(
        help="Tokenizers (.model or tokenizer.json), then manifests of the data sets whose text to count.",
        metavar="TOKENIZER... [MANIFEST]...",
    ),
    texts: list[Path] = typer.Option(
        [],
        "--texts",
        help='Also count this file: one text per line, or a .jsonl of {"text": ..., "lang": ...}; repeatable.',
    ),
    field: str = typer.Option(
        "",
        "--field",
        help="Field of a sample with its texts, or with an object of texts by language; by default captions.",
    ),
    language_field: str = typer.Option(
        "", "--language-field", help="Field of a sample with its language; by default the language is detected."
    ),
    max_texts: int = typer.Option(1_000_000, "--max-texts", min=1, help="Stop after this many texts."),
    json: bool = _JSON,
) -> None:
    """Compare tokenizers by language.

    Prints tokens per word and per character, bytes per token, and the share of tokens that are single bytes.
    """
    from itertools import islice

    from data_pipeline.errors import DataConfigError
    from data_pipeline.prepare.stats import fertility as counting
    from data_pipeline.prepare.stats.languages import has_identifier

    files = [path for path in paths if path.suffix != ".manifest"]
    manifests = [path for path in paths if path.suffix == ".manifest"]
    if not files or not (manifests or texts):
        raise DataConfigError("give at least one tokenizer, and a manifest or --texts FILE to count")
    stems = [path.stem for path in files]
    compared = [
        counting.TextTokenizer.open(path, path.stem if stems.count(path.stem) == 1 else str(path)) for path in files
    ]

    def pairs() -> Iterator[tuple[str, str]]:
        yield from counting.texts_of_manifests(manifests, field, language_field)
        for path in texts:
            yield from counting.texts_of_file(path)

    with progress("fertility") as meter:
        rows = counting.fertility(islice(pairs(), max_texts), compared, meter.advance)
    if json:
        emit({"languages": rows, "identifier": has_identifier()}, json=True)
        return
    for line in fertility_table(rows):
        print(line)
    if not has_identifier() and any(language.startswith("und-") for language in rows):
        console.print(
            "languages of one script are not distinguished; for that: pip install 'mmscale[stats]'", markup=False
        )


def fertility_table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Format the result of ``fertility`` (at least one language): one line per language, four columns per tokenizer."""
    names = list(next(iter(rows.values()))["tokenizers"])
    columns = (
        ("tok/word", "per_word", "{:.2f}"),
        ("tok/char", "per_character", "{:.3f}"),
        ("byte/tok", "bytes_per_token", "{:.2f}"),
        ("bytes %", "byte_share", "{:.1%}"),
    )
    widest = max(len("language"), *(len(language) for language in rows))
    group = max(9 * len(columns) - 1, *(len(name) for name in names))
    lines = [f"{'':<{widest}} {'':>10} {'':>12}" + "".join(f" | {name:<{group}}" for name in names)]
    head = " ".join(f"{title:>8}" for title, _, _ in columns)
    lines.append(f"{'language':<{widest}} {'texts':>10} {'characters':>12}" + f" | {head:<{group}}" * len(names))
    for code, row in rows.items():
        language = printable(code)
        line = f"{language:<{widest}} {row['texts']:>10,} {row['characters']:>12,}"
        for name in names:
            held = row["tokenizers"][name]
            cells = " ".join(f"{'-' if held[key] is None else text.format(held[key]):>8}" for _, key, text in columns)
            line += f" | {cells:<{group}}"
        lines.append(line)
    return [line.rstrip() for line in lines]
