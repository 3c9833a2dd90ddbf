"""JSON Schema of wire types, in the style of the published OpenAPI document."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue
from pydantic_core import CoreSchema, core_schema


class _SchemaGenerator(GenerateJsonSchema):
    """Follows the OpenAPI document: ``oneOf`` for unions, no titles, no null for optional fields."""

    def generate(self, schema: CoreSchema, mode: JsonSchemaMode = "validation") -> JsonSchemaValue:
        generated = super().generate(schema, mode)
        definitions = generated.pop("$defs", {})
        generated.pop("description", None)  # the docstring is meant for readers of the code
        inlined = _inline(generated, definitions)
        assert isinstance(inlined, dict)
        return inlined

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ANN401, ARG002 - the base class's signature
        return False

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        generated = super().default_schema(schema)
        if generated.get("default", ...) is None:
            del generated["default"]
        return generated

    def union_schema(self, schema: core_schema.UnionSchema) -> JsonSchemaValue:
        generated = super().union_schema(schema)
        generated["oneOf"] = generated.pop("anyOf")
        return generated


def _inline(node: object, definitions: dict[str, object]) -> object:
    """Replace references with their definitions, and drop what the published schema does not contain."""
    if isinstance(node, list):
        return [_inline(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inline(definitions[node["$ref"].removeprefix("#/$defs/")], definitions)
    dropped = {"title", "additionalProperties"} if node.get("type") == "object" else set()
    return {key: _inline(value, definitions) for key, value in node.items() if key not in dropped}


def json_schema(wire_type: type) -> dict[str, Any]:
    """Return the JSON Schema of a wire type, without references, for use in tools and as an OpenAPI component."""
    return TypeAdapter(wire_type).json_schema(schema_generator=_SchemaGenerator)
