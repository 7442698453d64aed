"""Architectures of plugins: registered when a checkpoint needs them, once, and refused where they are wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    conversion_mapping,
)

from dernkit.api import CheckpointError, PluginError, hookimpl
from dernkit.components import Component
from dernkit.models.architecture import register, register_architectures, use_architecture
from dernkit.models.source import open_source
from dernkit.models.universal import Universal
from dernkit.registry import Registry
from dernkit.stages.calibrate import check_vocabulary
from dernkit.testing.checkpoints import save_tiny
from tests.unit.workbench import edit_config


class OwnConfig(MixtralConfig):
    """Mixtral under another name."""

    model_type = "own_moe"


class OwnForCausalLM(MixtralForCausalLM):
    """Mixtral under another name."""

    config_class = OwnConfig


class OtherConfig(LlamaConfig):
    """Another class for the same model type."""

    model_type = "own_moe"


class OtherForCausalLM(LlamaForCausalLM):
    """Another class for the same model type."""

    config_class = OtherConfig


@dataclass(frozen=True)
class Own:
    """A mixture of experts of our own."""

    name: ClassVar[str] = "own_moe"

    def config_class(self) -> Any:
        return OwnConfig

    def model_class(self) -> Any:
        return OwnForCausalLM

    def conversions(self) -> Any:
        return conversion_mapping.get_checkpoint_conversion_mapping("mixtral")


@dataclass(frozen=True)
class Other(Own):
    name: ClassVar[str] = "own_moe"

    def config_class(self) -> Any:
        return OtherConfig

    def model_class(self) -> Any:
        return OtherForCausalLM


@dataclass(frozen=True)
class Taken(Own):
    name: ClassVar[str] = "mixtral"

    def config_class(self) -> Any:
        return type("NewConfig", (LlamaConfig,), {"model_type": "mixtral"})

    def model_class(self) -> Any:
        return LlamaForCausalLM


@dataclass(frozen=True)
class WrongConfig(Own):
    name: ClassVar[str] = "own_moe"

    def config_class(self) -> Any:
        return LlamaConfig


@dataclass(frozen=True)
class WrongModel(Own):
    name: ClassVar[str] = "own_moe"

    def model_class(self) -> Any:
        return LlamaForCausalLM


@dataclass(frozen=True)
class WrongConversions(Own):
    name: ClassVar[str] = "own_moe"

    def conversions(self) -> Any:
        return None


@dataclass(frozen=True)
class WrongName(Own):
    name: ClassVar[str] = "own moe"


def registry_of(*classes: type, distribution: str = "own", into: Registry | None = None) -> Registry:
    registry = into or Registry()
    module = ModuleType(distribution)
    module.dernkit_architectures = hookimpl(lambda: list(classes), specname="dernkit_architectures")  # type: ignore[attr-defined]
    registry.register(module, distribution, distribution=distribution, version="1.0")
    return registry


def component(cls: type) -> Component:
    return next(registry_of(cls).components("architecture"))


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What a test registers with transformers is gone after it."""
    yield
    AutoModelForCausalLM._model_mapping._extra_content.pop(OwnConfig, None)
    CONFIG_MAPPING._extra_content.pop("own_moe", None)
    (conversion_mapping._checkpoint_conversion_mapping_cache or {}).pop("own_moe", None)
    conversion_mapping.USER_REGISTERED_MAPPINGS.discard("own_moe")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model", "mixtral")
    edit_config(
        tmp_path / "model",
        model_type="own_moe",
        architectures=["MixtralForCausalLM"],  # a name that transformers has as well
        auto_map={"AutoConfig": "nowhere.OwnConfig", "AutoModelForCausalLM": "nowhere.OwnForCausalLM"},
    )
    return tmp_path / "model"


def test_a_checkpoint_with_its_own_code_is_read_by_the_plugins_class(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Got 'own_moe', whose code .* Install a plugin"):
        open_source(checkpoint, [Universal()])
    used = use_architecture(checkpoint, registry_of(Own).components("architecture"))
    assert used is not None and used.provenance.origin == "plugin 'own' (own 1.0)"
    for trust in (False, True):
        assert open_source(checkpoint, [Universal()], trust_remote_code=trust).model_class is OwnForCausalLM
    assert type(AutoModelForCausalLM.from_pretrained(checkpoint)) is OwnForCausalLM


def test_other_checkpoints_touch_no_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    assert use_architecture(tmp_path, registry_of(WrongConversions).components("architecture")) is None
    assert "own_moe" not in CONFIG_MAPPING


def test_to_register_twice_changes_nothing() -> None:
    for _ in range(2):
        register_architectures(registry_of(Own))
    assert AutoConfig.for_model("own_moe").__class__ is OwnConfig


def test_two_plugins_with_the_same_model_type_are_refused() -> None:
    with pytest.raises(PluginError) as caught:
        registry_of(Other, distribution="other", into=registry_of(Own))
    assert str(caught.value).endswith(
        ": architecture 'own_moe' must have one provider. Got plugin 'other' (other 1.0) and, before it, "
        "plugin 'own' (own 1.0) instead. Uninstall or rename one."
    )


def test_a_model_type_that_something_else_has_is_refused() -> None:
    register(component(Own))
    with pytest.raises(PluginError) as caught:
        register(component(Other))
    assert str(caught.value).endswith(
        f"architecture 'own_moe' must have a model type that nothing else has. Got one that {__name__}.OwnConfig has "
        "instead. Uninstall own."
    )


def test_a_model_type_that_transformers_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(PluginError, match=r"Got one that transformers.*\.MixtralConfig has instead\. Uninstall own\."):
        use_architecture(tmp_path, registry_of(Taken).components("architecture"))


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (WrongConfig, "must have a config_class() that is a PreTrainedConfig with model_type 'own_moe'. Got <class"),
        (WrongModel, "must have a model_class() that is a PreTrainedModel with that config_class. Got <class"),
        (WrongConversions, "must give its classes. Got 'conversions() is not a list' instead."),
    ],
)
def test_what_is_no_architecture_is_refused_and_leaves_nothing(cls: type, said: str) -> None:
    with pytest.raises(PluginError) as caught:
        register(component(cls))
    assert said in str(caught.value)
    assert "own_moe" not in CONFIG_MAPPING and "own_moe" not in conversion_mapping.USER_REGISTERED_MAPPINGS


def test_a_name_is_a_model_type() -> None:
    with pytest.raises(PluginError, match=r"as config\.json has it as `model_type`\. Got 'own moe' instead\."):
        registry_of(WrongName)


def test_a_config_that_does_not_say_how_many_tokens_are_known_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "mixtral")
    source = replace(open_source(tmp_path, [Universal()]), config=PreTrainedConfig())
    with pytest.raises(CheckpointError, match=r"config\.json: must have 'vocab_size', .* Got none instead\."):
        check_vocabulary(source, torch.zeros(1, 4, dtype=torch.int64))
