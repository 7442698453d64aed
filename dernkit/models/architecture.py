"""Architectures that plugins bring: made known to transformers' Auto classes when a checkpoint of theirs is opened."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from dernkit.components import Component
from dernkit.errors import CheckpointError, PluginError
from dernkit.registry import Registry
from dernkit.sentences import reason, shown


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a checkpoint directory.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: must hold config.json. Got none instead. Give the directory of a checkpoint.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: must be JSON. Got '{reason(error)}' instead. Download it again.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: must be a JSON object. Got {shown(config)} instead. Download it again.")
    return config


def use_architecture(path: Path, architectures: Iterable[Component]) -> Component | None:
    """Register the architecture that the checkpoint needs, if a plugin has it, and return it.

    No other one is touched: a plugin that is broken, or older than the transformers that took its model type over, is
    in nobody else's way. From then on the process knows the model type without ``trust_remote_code``.

    Raises:
        CheckpointError: the directory has no config that can be read.
        PluginError: the architecture cannot be registered.
    """
    model_type = read_config(path).get("model_type")
    for component in architectures:
        if component.name == model_type:
            register(component)
            return component
    return None


def register_architectures(registry: Registry | None = None) -> None:
    """Register all architectures of a registry (by default of the installed plugins), for use of transformers alone.

    ``AutoModelForCausalLM.from_pretrained`` then loads their checkpoints, compressed ones included.

    Raises:
        PluginError: one cannot be registered.
    """
    for component in (registry or Registry.load()).components("architecture"):
        register(component)


def register(component: Component) -> None:
    """Make one architecture known to ``AutoConfig``, ``AutoModelForCausalLM`` and the loader; again changes nothing.

    Raises:
        PluginError: its classes are not those of an architecture, or the model type has a class already.
    """
    name = component.name
    where = f"{component.provenance.file}:{component.provenance.line}: architecture '{name}'"
    config, model, conversions = _parts(component, where)
    if name in CONFIG_MAPPING:
        known = CONFIG_MAPPING[name]
        if known is config:
            return
        raise PluginError(
            f"{where} must have a model type that nothing else has. Got one that {known.__module__}.{known.__name__} "
            f"has instead. Uninstall {component.provenance.distribution}."
        )
    _check_classes(where, name, config, model)
    try:
        register_checkpoint_conversion_mapping(name, conversions)
    except ValueError as error:
        raise PluginError(f"{where} must have conversions of its own. Got '{reason(error)}' instead.") from error
    AutoConfig.register(name, config)
    AutoModelForCausalLM.register(config, model)


def _parts(component: Component, where: str) -> tuple[Any, Any, list[Any]]:
    """Config class, model class and conversions."""
    try:
        architecture = component.cls()
        conversions = architecture.conversions()
        if not isinstance(conversions, list | tuple):
            raise TypeError("conversions() is not a list")
        return architecture.config_class(), architecture.model_class(), list(conversions)
    except Exception as error:  # code of strangers
        raise PluginError(f"{where} must give its classes. Got '{reason(error)}' instead.") from error


def _check_classes(where: str, name: str, config: Any, model: Any) -> None:
    if not _is(config, PreTrainedConfig) or config.model_type != name:
        raise PluginError(
            f"{where} must have a config_class() that is a PreTrainedConfig with model_type '{name}'. "
            f"Got {config!r} instead."
        )
    if not _is(model, PreTrainedModel) or model.config_class is not config:
        raise PluginError(
            f"{where} must have a model_class() that is a PreTrainedModel with that config_class. Got {model!r} "
            f"instead. Write `config_class = {config.__name__}` in it."
        )


def _is(cls: Any, base: type) -> bool:
    return isinstance(cls, type) and issubclass(cls, base)
