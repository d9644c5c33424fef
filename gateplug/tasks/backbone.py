"""Any network of ``transformers``, by the name of its architecture, from a config or from a checkpoint."""

import difflib
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from gateplug.core.local import folder_or_id

Head = Literal["image-classification", "sequence-classification", "causal-lm", "masked-lm", "seq2seq-lm", "backbone"]
AUTO_CLASS: dict[str, str] = {
    "image-classification": "AutoModelForImageClassification",
    "sequence-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "backbone": "AutoModel",
}
# Settings that every model reads and that no fresh config shows.
MORE_NAMES = ("attn_implementation", "decoder_start_token_id")


def hf_model(
    architecture: str | None = None,
    head: Head = "image-classification",
    pretrained: str | None = None,
    config: dict[str, Any] | None = None,
    num_labels: int | None = None,
) -> nn.Module:
    """Build a Hugging Face network in float32, with fresh weights or with those of a checkpoint.

    Fresh weights depend on nothing but the global seed (``seed_everything``).

    Args:
        architecture: Model type in transformers: ``vit``, ``bert``, ``gpt2``, ``t5``, ``resnet`` … Optional with
            ``pretrained``, where it is a check.
        head: What the network ends in. ``backbone`` has no head.
        pretrained: Folder of a checkpoint (``config.json`` and weights), or its id on the Hugging Face hub; a folder of that
            name, or of its last part, under the environment variable ``GATEPLUG_DATA`` is used instead of the hub.
        config: Values of the architecture's config that differ from its defaults (or from the checkpoint's).
        num_labels: Number of outputs of a classification head. A checkpoint with another number gets a fresh head.

    Returns:
        The network, in training mode.

    Raises:
        ValueError: If the architecture, the head, or a config value does not exist or does not fit.
        FileNotFoundError: If the checkpoint cannot be found.

    Example:
        >>> net = hf_model("vit", num_labels=10, config={"hidden_size": 64, "num_hidden_layers": 2,
        ...                "num_attention_heads": 4, "intermediate_size": 128, "image_size": 8, "patch_size": 2})
    """
    import transformers

    if head not in get_args(Head):
        raise ValueError(f"head={head!r} does not exist; allowed: {', '.join(get_args(Head))}.")
    overrides = dict(config or {})
    if num_labels is not None:
        if not head.endswith("-classification"):
            raise ValueError(f"num_labels={num_labels} only fits a classification head, not head={head!r}.")
        overrides["num_labels"] = num_labels
    auto: Any = getattr(transformers, AUTO_CLASS[head])
    if pretrained is None:
        settings = _fresh_config(architecture, overrides)
    else:
        pretrained = folder_or_id(pretrained)
        settings = _stored_config(pretrained, architecture, overrides)
    if type(settings) not in auto._model_mapping:
        heads = [h for h, name in AUTO_CLASS.items() if type(settings) in getattr(transformers, name)._model_mapping]
        raise ValueError(
            f"{settings.model_type!r} has no head {head!r} in transformers; its heads: {', '.join(heads) or 'none'}."
        )
    net: nn.Module = (
        auto.from_config(settings, dtype=torch.float32) if pretrained is None else _load(auto, pretrained, settings, num_labels)
    )
    return net.train()


def _fresh_config(architecture: str | None, overrides: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    if architecture is None:
        raise ValueError("hf_model needs `architecture` (vit, bert, gpt2, t5 …) or `pretrained` (folder or hub id).")
    if architecture not in CONFIG_MAPPING:
        raise ValueError(
            f"architecture={architecture!r} is not a model type of transformers."
            f"{_near(architecture, list(CONFIG_MAPPING.keys()))}"
        )
    config_class = CONFIG_MAPPING[architecture]
    _check_names(config_class(), overrides)
    try:
        settings = config_class(**overrides)
    except Exception as error:  # the validators of huggingface_hub have exceptions of their own
        raise _refusal(architecture, overrides, error) from error
    if settings.is_encoder_decoder and getattr(settings, "decoder_start_token_id", None) is None:
        # T5's config has no such attribute until a checkpoint brings it; its decoder starts with the padding token.
        settings.decoder_start_token_id = settings.pad_token_id
    return settings


def _stored_config(pretrained: str, architecture: str | None, overrides: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(pretrained)
    except (OSError, ValueError) as error:
        found = sorted(p.name for p in Path(pretrained).iterdir()) if Path(pretrained).is_dir() else None
        where = "no such folder here" if found is None else f"the folder holds {found}"
        raise FileNotFoundError(
            f"pretrained={pretrained!r}: {where}, and no such checkpoint could be read from the Hugging Face hub."
            " Give a folder with config.json and model.safetensors, or a hub id."
        ) from error
    if architecture is not None and settings.model_type != architecture:
        raise ValueError(f"The checkpoint {pretrained!r} is a {settings.model_type!r}, not architecture={architecture!r}.")
    _check_names(settings, overrides)
    try:
        settings.update(overrides)
    except Exception as error:
        raise _refusal(pretrained, overrides, error) from error
    return settings


def _refusal(name: str, overrides: dict[str, Any], error: Exception) -> ValueError:
    return ValueError(f"The config of {name!r} refuses {overrides}: {' '.join(str(error).split())}")


def _load(auto: Any, pretrained: str, settings: Any, num_labels: int | None) -> nn.Module:
    net, info = auto.from_pretrained(
        pretrained,
        config=settings,
        dtype=torch.float32,
        ignore_mismatched_sizes=num_labels is not None,
        output_loading_info=True,
    )
    # Only the head may differ from the checkpoint; transformers would as gladly re-draw any other layer.
    wrong = [key for key, _, new in info["mismatched_keys"] if not new or new[0] != num_labels]
    if wrong:
        raise ValueError(f"The weights of {pretrained!r} do not fit the config at {wrong}; remove the values of `config`.")
    loaded: nn.Module = net
    return loaded


def setting_names(settings: Any) -> list[str]:
    """Names of the values that a config has."""
    kind = type(settings)  # its properties are looked at in the class: reading deprecated ones of `settings` warns
    names = [name for name in vars(settings) if not name.startswith("_")]
    names += [name for name in dir(kind) if isinstance(getattr(kind, name, None), property)]
    return [*names, *settings.attribute_map, *MORE_NAMES]


def _check_names(settings: Any, given: dict[str, Any], prefix: str = "") -> None:
    """Refuse names that the config does not have: transformers takes any name without a word."""
    names = setting_names(settings)
    for name, value in given.items():
        if name not in names:
            raise ValueError(f"config has {prefix + name!r}, which {type(settings).__name__} does not know.{_near(name, names)}")
        inner = getattr(settings, name, None)
        if isinstance(value, dict) and hasattr(inner, "attribute_map"):
            _check_names(inner, value, f"{prefix}{name}.")


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    return f" Nearest: {', '.join(near)}." if near else f" Known: {', '.join(sorted(set(names)))}."
