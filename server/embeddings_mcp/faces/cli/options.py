"""Command-line options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from embeddings_mcp.models import InputType, Mode, Precision, Truncate

Transport = Literal["stdio", "http"]

TextsArgument = Annotated[
    list[str], typer.Argument(help="Texts; `-` reads one per line from stdin, without empty lines.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="ID[=PATH]", help="Model to use: at the endpoint, or run locally, optionally from a folder."
    ),
]
ServedModelsOption = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="ID[=PATH]", help="Model to serve, optionally from a folder; can be repeated."),
]
ServedEndpointsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--endpoint",
        metavar="URL|JSON",
        help="Endpoint whose models are served too, as a URL or a JSON object; can be repeated.",
    ),
]
ModelEndpointOption = Annotated[
    list[str] | None,
    typer.Option("--endpoint", metavar="URL|JSON", help="Endpoint that serves the model, instead of this machine."),
]
InputTypeOption = Annotated[
    InputType | None, typer.Option(help="What the texts are used for; required by asymmetric models.")
]
TruncateOption = Annotated[Truncate, typer.Option(help="Which end of a text to cut off if it is too long.")]
DimensionsOption = Annotated[int | None, typer.Option(help="Length of the vectors, for Matryoshka models.")]
ModeOption = Annotated[Mode, typer.Option(help="What to compare; modes other than dense require BGE-M3.")]
DefaultModelOption = Annotated[str | None, typer.Option(metavar="ID", help="Model that `default` refers to.")]
DeviceOption = Annotated[str | None, typer.Option(help="Device for local models: auto, cpu, cuda, cuda:1, mps.")]
PrecisionOption = Annotated[
    Precision | None, typer.Option(help="Number format of local models; int8 is faster, but only approximate.")
]
CacheOption = Annotated[
    str | None,
    typer.Option("--cache", metavar="DIR|memory|off", help="Where to cache vectors; in memory by default."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the response as JSON.")]
