"""Which transformers classes a config.json asks for, and what must hold of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dernkit.errors import CheckpointError
from dernkit.sentences import did_you_mean, reason


def check_model_type(path: Path, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Say what transformers would say in a page, or ask at a prompt."""
    name = config.get("model_type")
    if not isinstance(name, str) or name in CONFIG_MAPPING or (config.get("auto_map") and trust_remote_code):
        return
    if config.get("auto_map"):
        raise CheckpointError(
            f"{path}: must be of a model type that transformers has. Got '{name}', whose code comes with the model, "
            f"instead. Install a plugin that has this architecture, or read that code, then let it run with "
            f"--trust-remote-code."
        )
    raise CheckpointError(
        f"{path / 'config.json'}: must have a 'model_type' that transformers {transformers.__version__} knows. "
        f"Got '{name}' instead. A newer transformers or a plugin may know it. "
        f"{did_you_mean(name, CONFIG_MAPPING.keys())}".rstrip()
    )


def not_understood(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path / 'config.json'}: must describe a model that transformers {transformers.__version__} can build. "
        f"Got '{reason(error)}' instead."
    )


def check_rotary(path: Path, config: Any) -> None:
    """DBRX keeps ``rope_theta`` in ``attn_config``, where transformers 5 does not look."""
    written = getattr(getattr(config, "attn_config", None), "rope_theta", None)
    used = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if written is not None and written != used:
        raise CheckpointError(
            f"{path / 'config.json'}: attention must turn as the model was trained, with a rope_theta of {written}. "
            f"Got {used} from transformers {transformers.__version__} instead. "
            f'Write "rope_theta": {written} at its top, too.'
        )


def model_class(config: Any, trust_remote_code: bool) -> type[nn.Module]:
    names = config.architectures or []
    from_plugin = not type(config).__module__.startswith("transformers.")  # then a name in transformers is another's
    if names and hasattr(transformers, names[0]) and not from_plugin:
        return getattr(transformers, names[0])
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM._model_mapping[type(config)]
    if trust_remote_code and names and "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        try:
            return get_class_from_dynamic_module(config.auto_map["AutoModelForCausalLM"], config._name_or_path)
        except Exception as error:  # code of strangers
            raise CheckpointError(
                f"{config._name_or_path}: the code that comes with the model must run. Got '{reason(error)}' instead."
            ) from error
    raise CheckpointError(
        f"config.json: 'architectures' must name a model class of transformers. Got {names or 'none'} instead. "
        f"A model with its own code needs --trust-remote-code."
    )
