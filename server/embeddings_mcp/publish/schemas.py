"""A wire type as JSON Schema, written the way the published OpenAPI document writes it."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue
from pydantic_core import CoreSchema, core_schema


class _Published(GenerateJsonSchema):
    """Writes a type as the OpenAPI document does: oneOf for unions, no titles, no null for what may be left out."""

    def generate(self, schema: CoreSchema, mode: JsonSchemaMode = "validation") -> JsonSchemaValue:
        published = super().generate(schema, mode)
        definitions = published.pop("$defs", {})
        published.pop("description", None)  # the docstring is for readers of the code
        inlined = _inline(published, definitions)
        assert isinstance(inlined, dict)
        return inlined

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ANN401, ARG002 - the base class's signature
        return False

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        published = super().default_schema(schema)
        if published.get("default", ...) is None:
            del published["default"]
        return published

    def union_schema(self, schema: core_schema.UnionSchema) -> JsonSchemaValue:
        published = super().union_schema(schema)
        published["oneOf"] = published.pop("anyOf")
        return published


def _inline(node: object, definitions: dict[str, object]) -> object:
    """Put definitions in the place of references, and leave out what the published schema does not say."""
    if isinstance(node, list):
        return [_inline(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inline(definitions[node["$ref"].removeprefix("#/$defs/")], definitions)
    unsaid = {"title", "additionalProperties"} if node.get("type") == "object" else set()
    return {key: _inline(value, definitions) for key, value in node.items() if key not in unsaid}


def json_schema(wire_type: type) -> dict[str, Any]:
    """The JSON Schema of a wire type, without references, fit for a tool's schema and for an OpenAPI component."""
    return TypeAdapter(wire_type).json_schema(schema_generator=_Published)
