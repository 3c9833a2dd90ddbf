"""The options of the command line that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from embeddings_mcp.models import InputType, Mode, Precision, Truncate

Transport = Literal["stdio", "http"]

TextsArgument = Annotated[list[str], typer.Argument(help="Texts; `-` stands for the lines of stdin.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="ID[=PATH]", help="The model: of an endpoint, or run here, with its folder."),
]
ServedOption = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="ID[=PATH]", help="A model to serve, and its folder; may be given several times."),
]
EndpointOption = Annotated[
    list[str] | None,
    typer.Option(
        "--endpoint",
        metavar="URL|JSON",
        help="An endpoint whose models are served too, by its address or as a JSON object; may be given several times.",
    ),
]
AskedEndpointOption = Annotated[
    list[str] | None,
    typer.Option("--endpoint", metavar="URL|JSON", help="The endpoint that has the model, in place of this machine."),
]
InputTypeOption = Annotated[InputType | None, typer.Option(help="What the texts are for; asymmetric models need it.")]
TruncateOption = Annotated[Truncate, typer.Option(help="What to drop of a text that is too long.")]
DimensionsOption = Annotated[int | None, typer.Option(help="Length of the vectors, on Matryoshka models.")]
ModeOption = Annotated[Mode, typer.Option(help="What is compared; all but dense on BGE-M3 only.")]
DefaultModelOption = Annotated[str | None, typer.Option(metavar="ID", help="The model that `default` means.")]
DeviceOption = Annotated[str | None, typer.Option(help="Where the model runs: auto, cpu, cuda, cuda:1, mps.")]
PrecisionOption = Annotated[
    Precision | None, typer.Option(help="Numbers of the model that runs here; int8 is faster, and near but not equal.")
]
CacheOption = Annotated[
    str | None,
    typer.Option("--cache", metavar="DIR|memory|off", help="Where vectors are remembered; memory if not set."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the response as JSON.")]
