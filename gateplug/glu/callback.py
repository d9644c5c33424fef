"""ReplaceFFN: gated feed-forwards in place of the plain ones of a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

from lightning import LightningModule, Trainer
from torch import nn

from gateplug.core.edit import Edit
from gateplug.core.errors import PlugError, listed, nearest
from gateplug.core.feed_forward import FeedForward, find
from gateplug.core.optim import GroupOptions
from gateplug.core.plug import Plug
from gateplug.core.select import Layers
from gateplug.core.table import print_table
from gateplug.glu.functional import GATED, VARIANTS, matched_hidden
from gateplug.glu.surgery import cost_change, gated, plain

PLAIN = {"ffn": None, "ffn_relu": "relu", "ffn_gelu": "gelu", "ffn_silu": "silu"}
"""Plain blocks with fresh weights, for comparisons: with the block's own activation, or with the one named."""


class ReplaceFFN(Plug):
    """Replace the feed-forwards of a model by gated ones (GLU variants, arXiv 2002.05202), in their own places.

    A block first → activation → second keeps the name of its first layer, which becomes `act(x Gᵀ + g) ⊗ (x Uᵀ + u)` with the
    sub-modules `gate` and `up`; the activation becomes the identity; the second layer keeps its name and, at equal width,
    its weights. This holds for BERT, RoBERTa, DistilBERT, ViT, DeiT, CLIP, DINOv2, GPT-2, OPT, T5, ConvNeXt,
    `nn.TransformerEncoderLayer` and `nn.TransformerDecoderLayer`, and any block of that structure.

    Args:
        variant: `glu`, `bilinear`, `reglu`, `geglu` (exact erf), `geglu_tanh`, `swiglu`; `auto`: the gated form of each block's
            own activation; `ffn`, `ffn_relu`, `ffn_gelu`, `ffn_silu`: a plain block with fresh weights, for comparisons.
        layers: which blocks, see :func:`gateplug.core.select.select`; a name selects the blocks in and below it. "auto"
            takes all whose output is as wide as their input.
        match: `parameters`: the hidden width becomes 2/3, rounded to `multiple_of`, so that the block has as many
            parameters as before; all its weights are fresh. `width`: the hidden width stays, the block gets 1.5 times the
            parameters.
        warm_start: True computes exactly what the block computed (needs match="width" and a fitting activation, see
            :func:`gateplug.glu.functional.warm_start`); "nearest" takes the nearest start where none is exact and says
            how far off it is; False draws fresh weights, normal and as spread out as the weights they replace.
        bias: of the two branches; None: as the replaced layer, and wherever a warm start needs one.
        recompute: keep less for backward, see :class:`GLU`. At equal width the second layer's weights are then the same
            parameters, so `detach` gives them back as trained.
        multiple_of: of the hidden width under match="parameters".
        lr_scale: factor on the learning rate of what comes in, ≥ 0.

    Raises:
        ValueError: an unknown variant or match, warm_start with match="parameters" or a plain variant.
        PlugError: no block is found; lists what was looked at.
    """

    room: ClassVar[str] = "glu"
    summary: ClassVar[str] = "gated feed-forwards (GLU, ReGLU, GEGLU, SwiGLU …) in place of a model's own"
    paper: ClassVar[str] = "arXiv 2002.05202"

    def __init__(
        self,
        variant: str = "swiglu",
        layers: Layers = "auto",
        match: Literal["parameters", "width"] = "parameters",
        warm_start: bool | Literal["nearest"] = False,
        bias: bool | None = None,
        recompute: bool = False,
        multiple_of: int = 8,
        lr_scale: float = 1.0,
    ) -> None:
        allowed = [*VARIANTS, "auto", *PLAIN]
        if variant not in allowed:
            raise ValueError(f"variant={variant!r} is not known.{nearest(str(variant), allowed)} Allowed are {listed(allowed)}")
        for name, flag in (("bias", bias), ("recompute", recompute)):
            if not isinstance(flag, bool) and not (name == "bias" and flag is None):
                raise TypeError(f"{name}={flag!r} must be True or False" + (", or None" if name == "bias" else ""))
        if match not in ("parameters", "width"):
            raise ValueError(f"match={match!r} must be 'parameters' (equal parameters) or 'width' (equal hidden width)")
        if warm_start not in (True, False, "nearest"):
            raise ValueError(f"warm_start={warm_start!r} must be True, False or 'nearest'")
        if warm_start and variant in PLAIN:
            raise ValueError(f"variant={variant!r} is a plain block with fresh weights: it has no warm_start={warm_start!r}")
        if warm_start and match == "parameters":
            raise ValueError(
                f"warm_start={warm_start!r} needs all hidden units of the block, and match='parameters' makes it a third "
                "narrower: say match='width', or leave warm_start out"
            )
        if not isinstance(multiple_of, int) or multiple_of < 1:
            raise ValueError(f"multiple_of={multiple_of!r} must be a whole number ≥ 1")
        self.variant, self.layers, self.match, self.warm_start = variant, layers, match, warm_start
        self.bias, self.recompute, self.multiple_of, self.lr_scale = bias, recompute, multiple_of, lr_scale
        self._left: list[str] = []
        options = GroupOptions(lr_scale)
        self.group = options if lr_scale != 1 else None

    def candidates(self, module: nn.Module) -> dict[str, nn.Module]:
        """The first layers of all blocks whose output is as wide as their input."""
        return {b.first: module.get_submodule(b.first) for b in find(module)[0] if b.out == b.dim}

    def nothing(self, module: nn.Module) -> str:
        """Say which pairs of layers were seen, and why none was taken."""
        found, rejected = find(module)
        seen = list(rejected)
        seen += [f"{b.first} → {b.attribute} → {b.second} ({b.dim}→{b.hidden}→{b.out}: name it to take it)" for b in found]
        return (
            f"ReplaceFFN with layers={self.layers!r} finds no feed-forward (a dense layer d→h, an activation held as a module or "
            f"attribute, a dense layer h→d). Looked at: {listed(seen)}"
        )

    def plan(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterable[Edit]:
        """Edits for every block in the selected layers."""
        blocks, self._left = find(module)
        edits: list[Edit] = []
        used: set[str] = set()
        for block in blocks:
            mine = [n for n in layers if any(f"{part}.".startswith(f"{n}.") for part in (block.first, block.slot))]
            edits += self._block(module, block) if mine else []
            used.update(mine)
        empty = [name for name in layers if name not in used]
        if empty:
            raise PlugError(f"no feed-forward in {listed(empty)}. {self.nothing(module)}")
        parents = [module.get_submodule(edits[0].layer.rsplit(".", n)[0]) for n in range(1, edits[0].layer.count(".") + 1)]
        configs: list[object] = [getattr(m, "config", None) for m in [*parents, module]]
        if not self.warm_start and any(getattr(config, "_name_or_path", None) for config in configs):
            warnings.warn(
                "ReplaceFFN gives a pretrained model feed-forwards with fresh weights. To keep what it has learnt, use "
                "variant='auto', match='width', warm_start=True",
                stacklevel=2,
            )
        return edits

    def _block(self, module: nn.Module, block: FeedForward) -> list[Edit]:
        if self.variant in PLAIN:
            return plain(module, block, PLAIN[self.variant])
        gate = block.activation if self.variant == "auto" else VARIANTS[self.variant]
        if gate not in GATED:
            raise PlugError(
                f"{block.slot} computes {gate or 'no known activation'}, which has no gated form for variant='auto': "
                f"name one of {listed(VARIANTS)}"
            )
        hidden = matched_hidden(block.hidden, self.multiple_of) if self.match == "parameters" else block.hidden
        return gated(module, block, gate, hidden, self.warm_start, self.bias, self.recompute)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what the feed-forwards cost before and after, once."""
        found = self._found(pl_module)
        new = not self._announced
        super().on_fit_start(trainer, pl_module)
        if new and self._left:
            print_table("Left as they are", ("pair of layers",), [(text,) for text in self._left])
        if new and found is not None:
            rows = [(w, f"{b:,}", f"{a:,}", f"{a / b:.3f}") for w, (b, a) in cost_change(pl_module, found).items()]
            print_table("Feed-forwards", ("", "before", "after", "ratio"), rows)
