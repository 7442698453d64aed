"""DeepSeek-MoE for dernkit: checkpoints whose config.json says ``"model_type": "deepseek"``.

They bring their own code, which transformers runs only with ``trust_remote_code``. Here is a model class of our own for
them. It differs from Llama in its feed-forward layers alone, so that everything else is transformers' Llama.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

from dernkit.api import hookimpl


@final
@dataclass(frozen=True, slots=True)
class DeepseekMoE:
    """DeepSeek-MoE (arXiv 2401.06066): fine-grained and shared experts in a Llama, softmax over all experts."""

    name: ClassVar[str] = "deepseek"

    def config_class(self) -> type:
        """The published fields."""
        from dernkit_deepseek_moe.configuration import DeepseekConfig

        return DeepseekConfig

    def model_class(self) -> type:
        """The causal language model."""
        from dernkit_deepseek_moe.modeling import DeepseekForCausalLM

        return DeepseekForCausalLM

    def conversions(self) -> list[Any]:
        """Three tensors per expert on disk, two per layer in memory."""
        from dernkit_deepseek_moe.modeling import conversions

        return conversions()


@hookimpl
def dernkit_architectures() -> list[type]:
    """One architecture."""
    return [DeepseekMoE]
