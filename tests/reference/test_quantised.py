"""What is read from quantised checkpoints, against loops that know nothing of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dernkit.models.checkpoint import Checkpoint, open_checkpoint
from dernkit.models.quantised import BlockFp8, Mxfp4, Scheme
from tests.reference import quantised as reference


def opened(folder: Path, scheme: Scheme, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder, scheme.coded)


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize(
    ("shape", "blocks"),
    [((16, 24), (8, 8)), ((20, 33), (8, 16)), ((24, 12), (16, 16)), ((3, 5), (128, 128)), ((9, 4), (1, 3))],
    ids=["whole", "cut off", "cut off, but divided evenly", "smaller than a block", "rows"],
)
def test_block_fp8_is_the_product_of_codes_and_scales(
    tmp_path: Path, scales: torch.dtype, shape: tuple[int, int], blocks: tuple[int, int]
) -> None:
    rng = torch.Generator().manual_seed(0)
    bytes_ = torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)
    bytes_[bytes_ & 127 == 127] = 8  # not a number
    codes = bytes_.view(torch.float8_e4m3fn)
    grid = (-(-shape[0] // blocks[0]), -(-shape[1] // blocks[1]))
    factors = torch.exp2(torch.randint(-12, 3, grid, generator=rng) + torch.rand(grid, generator=rng)).to(scales)
    checkpoint = opened(tmp_path, BlockFp8(*blocks), {"x.weight": codes, "x.weight_scale_inv": factors})
    expected = reference.block_fp8(codes, factors.float(), *blocks)
    assert checkpoint.tensors["x.weight"].shape == shape
    assert torch.equal(checkpoint.read("x.weight"), expected)


def test_every_fp8_code_is_read(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e4m3fn)
    scale = torch.tensor([[0.75]])
    found = opened(tmp_path, BlockFp8(16, 16), {"x": codes, "x_scale_inv": scale}).read("x")
    assert torch.equal(found.isnan(), codes.float().isnan()) and found.isnan().sum() == 2
    expected = reference.block_fp8(codes, scale, 16, 16)
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_fused_experts_in_fp8_have_blocks_of_their_own(tmp_path: Path) -> None:
    codes = torch.randint(0, 120, (3, 10, 6), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.rand(3, 3, 2)
    found = opened(tmp_path, BlockFp8(4, 4), {"gate_up_proj": codes, "gate_up_proj_scale_inv": scales})
    expected = [reference.block_fp8(a, b, 4, 4) for a, b in zip(codes, scales, strict=True)]
    assert torch.equal(found.read("gate_up_proj"), torch.stack(expected))


def test_mxfp4_is_values_of_four_bits_times_powers_of_two(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 5, 3, 16), generator=rng, dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 5, 3), generator=rng, dtype=torch.uint8)
    blocks[0, 0, 0] = torch.arange(16, dtype=torch.uint8) * 17  # every code, low and high
    scales[0, 0] = torch.tensor([0, 1, 250])
    found = opened(tmp_path, Mxfp4(), {"down_proj_blocks": blocks, "down_proj_scales": scales}).read("down_proj")
    assert found.shape == (2, 96, 5)
    assert torch.equal(found, reference.mxfp4(blocks, scales))
