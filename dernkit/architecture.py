"""What an adapter plugin for a new architecture builds on: say how the experts lie, and the rest is found and checked.

    class MyLayout(Layout): ...

    @final
    @dataclass(frozen=True)
    class MyAdapter:
        name: ClassVar[str] = "my-family"

        def blocks(self, model):
            return blocks_by_layout(model, [MyLayout()])

`ModuleExperts` is the layout of experts that are modules of their own, one `nn.Linear` for each of their matrices.
A model whose experts transformers declares needs no adapter. One that cannot be described by a layout implements
`dernkit.api.Adapter` and `dernkit.api.Block` itself.
"""

from dernkit.models.layout import Layout, halves, joined
from dernkit.models.module_experts import ModuleExperts
from dernkit.models.universal import blocks_by_layout
from dernkit.types import ExpertWeights

__all__ = ["ExpertWeights", "Layout", "ModuleExperts", "blocks_by_layout", "halves", "joined"]
