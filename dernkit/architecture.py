"""What an adapter plugin for a new architecture builds on: say how the experts lie, and the rest is found and checked.

    class MyLayout(Layout): ...

    @final
    @dataclass(frozen=True)
    class MyAdapter:
        name: ClassVar[str] = "my-family"

        def blocks(self, model):
            return blocks_by_layout(model, [MyLayout()])

A model whose experts transformers declares needs no adapter. One that cannot be described by a layout implements
`dernkit.api.Adapter` and `dernkit.api.Block` itself.
"""

from dernkit.models.layouts import Layout, halves, joined
from dernkit.models.universal import blocks_by_layout
from dernkit.types import ExpertWeights

__all__ = ["ExpertWeights", "Layout", "blocks_by_layout", "halves", "joined"]
