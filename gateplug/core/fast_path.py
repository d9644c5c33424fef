"""The fused inference path of torch's transformer layers, which skips the modules inside them."""

from __future__ import annotations

from torch import nn

from gateplug.core.edit import Edit, SetAttribute


def without_fast_path(root: nn.Module, layer: str) -> list[Edit]:
    """Edits that send torch's transformer layers around `layer` down their ordinary path.

    `nn.TransformerEncoderLayer` has a fused path for inference that reads weights and skips the modules in it, and an
    `nn.TransformerEncoder` with a padding mask converts to nested tensors for it.
    """
    edits: list[Edit] = []
    for name, module in root.named_modules():
        if not f"{layer}.".startswith(f"{name}." if name else ""):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            edits.append(SetAttribute(name, "activation_relu_or_gelu", 0, shared=True))
        elif isinstance(module, nn.TransformerEncoder):
            edits.append(SetAttribute(name, "use_nested_tensor", False, shared=True))
    return edits
