"""The recipe language as JSON Schema, for editors and for checking recipes elsewhere."""

from __future__ import annotations

from typing import Any

from dernkit import recipe
from dernkit.components import KINDS, Component
from dernkit.options import Option
from dernkit.registry import Registry
from dernkit.shapes import Shape, plain

USED = (
    *("scorer", "budget", "selector", "assigner", "similarity", "merge", "router", "refit"),
    *("source", "evaluator", "report"),
)
"""Kinds that a recipe can name."""


def recipe_schema(registry: Registry) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the recipes that can be written with the registered components."""
    calibrate = _object(
        {
            "source": _component("source"),
            "sequences": recipe.SEQUENCES.schema(),
            "length": recipe.LENGTH.schema(),
            "batch_size": _default(recipe.BATCH_SIZE, recipe.DEFAULT_BATCH_SIZE),
            "sample": _default(recipe.SAMPLE, recipe.DEFAULT_SAMPLE),
            "holdout": _default(recipe.HOLDOUT, recipe.DEFAULT_HOLDOUT),
            "sequential": _default(recipe.SEQUENTIAL, recipe.DEFAULT_SEQUENTIAL),
        },
        required=["source", "sequences", "length"],
    )
    plan = _object(
        {
            "keep": recipe.Keep().schema(),
            "score": _component("scorer"),
            "budget": _optional(_component("budget"), {"use": recipe.DEFAULT_BUDGET}),
            "select": _optional(_component("selector"), {"use": recipe.DEFAULT_SELECTOR}),
            "assign": _optional(_component("assigner")),
            "groups": _default(recipe.GROUPS, recipe.DEFAULT_GROUPS),
        },
        required=["keep", "score"],
    )
    apply = _object(
        {
            "merge": _optional(_component("merge")),
            "router": _optional(_component("router"), {"use": recipe.DEFAULT_ROUTER}),
            "refit": _optional(_component("refit")),
            "width": _optional(recipe.WIDTH.schema()),
            "mtp": _default(recipe.MTP, recipe.DEFAULT_MTP),
            "export": _default(recipe.EXPORT, recipe.DEFAULT_EXPORT),
        },
        required=[],
    )
    top = {
        "dernkit": {"const": recipe.VERSION},
        "seed": _optional(_default(recipe.SEED, recipe.DEFAULT_SEED)),
        "calibrate": _optional(calibrate),
        "plan": plan,
        "apply": _optional(apply),
        "evaluate": _optional({"type": "array", "items": _component("evaluator")}),
        "report": _optional(_component("report"), {"use": recipe.DEFAULT_REPORT}),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"dernkit recipe, version {recipe.VERSION}",
        **_object(top, required=["dernkit", "plan"]),
        "allOf": _together(),
        "$defs": {kind: _kind(registry, kind) for kind in USED},
    }


def _together() -> list[dict[str, Any]]:
    """``plan.assign`` and ``apply.merge`` come together or not at all."""
    assigned, merged = _given("plan", "assign"), _given("apply", "merge")
    return [{"if": assigned, "then": merged}, {"if": merged, "then": assigned}]


def _given(section: str, key: str) -> dict[str, Any]:
    inner = {"type": "object", "required": [key], "properties": {key: {"not": {"type": "null"}}}}
    return {"required": [section], "properties": {section: inner}}


def _kind(registry: Registry, kind: str) -> dict[str, Any]:
    lines = (KINDS[kind].protocol.__doc__ or "").split("\n")
    components = [_one(component) for component in registry.components(kind)]
    return {"description": lines[0], "oneOf": components} if components else {"description": lines[0], "not": {}}


def _one(component: Component) -> dict[str, Any]:
    properties = {"use": {"const": component.name}} | {option.name: _option(option) for option in component.options}
    required = ["use", *(option.name for option in component.options if option.required)]
    described = {"description": component.summary} if component.summary else {}
    return described | _object(properties, required=required)


def _option(option: Option) -> dict[str, Any]:
    schema = option.shape.schema()
    if not option.required:
        schema["default"] = plain(option.default)
    if option.summary:
        schema["description"] = " ".join(option.summary.split())
    return schema


def _component(kind: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{kind}"}


def _default(shape: Shape, default: Any) -> dict[str, Any]:
    return shape.schema() | {"default": default}


def _optional(schema: dict[str, Any], default: Any = None) -> dict[str, Any]:
    """A section that may also be empty or left out."""
    either = {"anyOf": [schema, {"type": "null"}]}
    return either if default is None else either | {"default": default}


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
