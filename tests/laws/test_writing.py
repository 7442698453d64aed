"""A model that writes its own text: streamed = in memory = without a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dernkit.errors import CheckpointError
from dernkit.models.stack import find_blocks
from dernkit.models.universal import Universal
from dernkit.stages.calibrate import eager_experts, live_writer, writer_on_disk
from tests import families
from tests.laws.every_model import load, saved
from tests.laws.pipeline import source
from tests.laws.test_every_family import every_family

PROMPTS = torch.randint(3, families.VOCABULARY, (3, 2), generator=torch.Generator().manual_seed(4))


HEADLESS = {
    "deepseek_ocr2_text",
    "diffusion_gemma_text",
    "glm4v_moe_text",
    "glm5_next_text",
    "mistral_large4_text",
    "muse_spark_text",
    "openai_privacy_filter",
    "qwen3_omni_moe_text",
    "qwen3_vl_moe_text",
    "step3p7_text",
    "unlimited_ocr_text",
}
"""Text towers of models that see or hear, here without what writes."""


class Draws:
    """Draws tokens, and remembers the logits."""

    def __init__(self) -> None:
        self.rng = torch.Generator().manual_seed(1)
        self.logits: list[Tensor] = []

    def __call__(self, logits: Tensor) -> Tensor:
        self.logits.append(logits)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=self.rng)[:, 0]


@every_family
def test_what_is_written_layer_by_layer_is_what_the_model_writes(tmp_path: Path, family: str) -> None:
    saved(tmp_path, family)
    streamed, live = Draws(), Draws()
    writer = writer_on_disk(source(tmp_path))
    if family in HEADLESS:
        with pytest.raises(CheckpointError, match="must have a language-model head"):
            writer.continued(PROMPTS, 9, streamed)
        return
    found = writer.continued(PROMPTS, 9, streamed)
    assert all(tensor.is_meta for layer in writer.stack.layers for tensor in layer.parameters())
    model = load(family, tmp_path)
    with eager_experts(model):
        again = live_writer(model, find_blocks(model, [Universal()])).continued(PROMPTS, 9, live)
        with torch.no_grad():
            whole = model(input_ids=found, use_cache=False).logits
    assert torch.equal(found, again) and torch.equal(found[:, :2], PROMPTS)
    assert all(torch.equal(one, other) for one, other in zip(streamed.logits, live.logits, strict=True))
    for place, logits in enumerate(live.logits, start=1):
        torch.testing.assert_close(logits, whole[:, place].float(), rtol=1e-3, atol=1e-4)


def test_a_model_that_overflows_is_refused(tmp_path: Path) -> None:
    model = saved(tmp_path, "mixtral")
    blocks = find_blocks(model, [Universal()])
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.inf)
    with pytest.raises(CheckpointError, match="logits must be finite"):
        live_writer(model, blocks).continued(PROMPTS, 4, Draws())
