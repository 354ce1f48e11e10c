"""Values that a JSON schema allows, and near misses, as hypothesis draws them: for the schemas that msgspec writes."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

# What clients send in the place of a string, and what breaks careless code.
TEXTS = st.sampled_from(
    [
        "",
        "a",
        "user",
        "assistant",
        "tool",
        "system",
        "text",
        "function",
        "m",
        "json",
        "\x00",
        "🙂",
        "<think>",
        "1e999",
        "{",
    ]
) | st.text(max_size=6)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)


class Drawn:
    """Strategies for one document's schemas; ``components`` are those that others refer to."""

    def __init__(self, components: dict[str, Any]) -> None:
        self._components = components

    def values(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        """What the schema allows; one in ten is anything at all."""
        fits = self._fitting(schema)
        return st.integers(0, 9).flatmap(lambda n: ANYTHING if n == 0 else fits)

    def objects(self, schema: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
        """Objects with the schema's required fields and a few of the others."""
        properties: dict[str, Any] = schema.get("properties", {})
        needed = {name: properties[name] for name in schema.get("required", ())}
        others = sorted(properties.keys() - needed.keys())
        some = st.lists(st.sampled_from(others), max_size=4, unique=True) if others else st.just(list[str]())
        return some.flatmap(lambda names: self._record(needed | {name: properties[name] for name in names}))

    def _record(self, properties: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries({name: self.values(schema) for name, schema in properties.items()})

    def _fitting(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        if "$ref" in schema:
            return st.deferred(lambda: self._fitting(self._components[schema["$ref"].rpartition("/")[2]]))
        if "anyOf" in schema:
            return st.one_of([self._fitting(part) for part in schema["anyOf"]])
        if "enum" in schema:
            return st.sampled_from(schema["enum"])
        match schema.get("type"):
            case "object" if "properties" in schema:
                return self.objects(schema)
            case "object":
                return st.dictionaries(TEXTS, ANYTHING, max_size=2)
            case "array":
                return st.lists(self.values(schema.get("items", {})), max_size=3)
            case "string":
                return TEXTS
            case "integer":
                return st.integers(-3, 9) | st.sampled_from([2**31, -(2**31), 2**63, 2**64, 10**6])
            case "number":
                return st.sampled_from([0, 1, 0.5, -1.0, 2.0, 1e300]) | st.floats(0, 1)
            case "boolean":
                return st.booleans()
            case "null":
                return st.none()
        return ANYTHING
