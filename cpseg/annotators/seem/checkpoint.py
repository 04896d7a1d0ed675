"""Loading the official checkpoints, with every name accounted for."""

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.annotators.pretrained import one_line
from cpseg.annotators.seem.model import SEEM, SEEMConfig
from cpseg.errors import FileError

__all__ = ["config_of", "load_checkpoint", "load_state"]

# Parts of the original that plain semantic and referring masks never use.
_PREDICTOR = "sem_seg_head.predictor."
_UNUSED = {
    "dilation_kernel",
    "criterion.empty_weight",
    _PREDICTOR + "spatial_embed.weight",
    _PREDICTOR + "spatial_featured.weight",
    _PREDICTOR + "pn_indicator.weight",
    *(f"{_PREDICTOR}mask_sptial_embed.{i}" for i in range(3)),  # sic
}


def load_checkpoint(path: str | Path, config: SEEMConfig | None = None) -> SEEM:
    """A SEEM with the weights of a file such as ``seem_focalt_v1.pt``.

    The file is read with ``weights_only=True``: it can hold tensors and nothing that runs.

    Args:
        path: The checkpoint: a mapping from names to tensors, or a mapping that holds one under
            ``"model"`` or ``"state_dict"``; names may begin with ``model.`` or ``module.``.
        config: Sizes; None reads them off the file's shapes.

    Returns:
        The model in eval mode, float32, on the CPU.

    Raises:
        FileError: A parameter is missing, unknown, of another shape, or not finite; the message
            names it.
    """
    path = Path(path)
    try:
        # A file in torch's zip format is mapped, not read: its pages are shared and come back.
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:  # torch's own text is a page of advice
        raise FileError(
            f"{path} must be a checkpoint of tensors; it is no file of torch's, is damaged, or "
            "holds a whole model, which is not opened since it could run anything"
        ) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise FileError(f"{path} must be a checkpoint of tensors; {one_line(error)}") from error
    if not isinstance(state, Mapping):
        raise FileError(f"{path} must map names to tensors; it holds {type(state).__name__}")
    for wrapper in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    return load_state(state, config, source=str(path))


def load_state(
    state: Mapping[str, Any], config: SEEMConfig | None = None, *, source: str = "the checkpoint"
) -> SEEM:
    """A SEEM that takes over the tensors of a mapping; see :func:`load_checkpoint`.

    Args:
        state: Names to tensors.
        config: Sizes; None reads them off the shapes.
        source: What errors call the mapping.

    Returns:
        The model in eval mode, float32.

    Raises:
        FileError: A parameter is missing, unknown, of another shape, or not finite.
    """
    tensors: dict[str, Tensor] = {}
    if not isinstance(cast("object", state), Mapping):
        raise FileError(f"{source} must map names to tensors; got {_checks.kind_of(state)}")
    for name, value in state.items():
        if not isinstance(value, Tensor) or not isinstance(cast("object", name), str):
            raise FileError(
                f"{source} must map names to tensors; {name!r} is {type(value).__name__}"
            )
        tensors[_strip(name)] = value
    if len(tensors) != len(state):
        raise FileError(f"{source} must name each parameter once, apart from a prefix")
    config = config or config_of(tensors, source=source)
    with torch.device("meta"):  # no memory for weights that are replaced at once
        model = SEEM(config)
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in tensors]
    unknown = [name for name in tensors if name not in wanted and name not in _UNUSED]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    for problem, names in (("lacks", missing), ("has unknown", unknown), ("has", shapes)):
        if names:
            raise FileError(f"{source} {problem} {_some(names)}; nothing was loaded")
    strange = [name for name in wanted if not _is_weight(tensors[name])]
    if strange:
        raise FileError(f"{source} has no finite floats in {_some(strange)}; nothing was loaded")
    model.load_state_dict({name: tensors[name].float() for name in wanted}, assign=True)
    return model.requires_grad_(requires_grad=False).eval()


def config_of(state: Mapping[str, Tensor], *, source: str = "the checkpoint") -> SEEMConfig:
    """The sizes, from names and shapes. Attention heads leave no trace: 64 channels each.

    Args:
        state: Names to tensors.
        source: What errors call the mapping.

    Returns:
        The configuration.

    Raises:
        FileError: A parameter that tells a size is missing.
    """

    def size(name: str, axis: int = 0) -> int:
        if name not in state or state[name].ndim <= axis:
            raise FileError(f"{source} lacks {name}: it is no SEEM Focal-T or Focal-L checkpoint")
        return int(state[name].shape[axis])

    def count(pattern: str) -> int:
        found = {m[1] for name in state if (m := re.match(pattern, name))}
        return len(found)

    dim = size(_PREDICTOR + "class_embed")
    language = _PREDICTOR + "lang_encoder.lang_encoder."
    block = "backbone.layers.0.blocks.0."
    return SEEMConfig(
        block="focal_dw" if block + "dw1.weight" in state else "focal",
        embed_dim=size("backbone.patch_embed.proj.weight"),
        depths=(
            count(r"backbone\.layers\.0\.blocks\.(\d+)\."),
            count(r"backbone\.layers\.1\.blocks\.(\d+)\."),
            count(r"backbone\.layers\.2\.blocks\.(\d+)\."),
            count(r"backbone\.layers\.3\.blocks\.(\d+)\."),
        ),
        focal_levels=count(r"backbone\.layers\.0\.blocks\.0\.modulation\.focal_layers\.(\d+)\."),
        dim=dim,
        heads=max(1, dim // 64),
        feedforward=size(_PREDICTOR + "transformer_ffn_layers.0.linear1.weight"),
        encoder_layers=count(r"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\."),
        decoder_layers=count(
            r"sem_seg_head\.predictor\.transformer_cross_attention_layers\.(\d+)\."
        ),
        queries=size(_PREDICTOR + "query_feat.weight"),
        text_vocabulary=size(language + "token_embedding.weight"),
        text_context=size(language + "positional_embedding"),
        text_layers=count(re.escape(language) + r"resblocks\.(\d+)\."),
        text_heads=max(1, dim // 64),
    )


def _is_weight(value: Tensor) -> bool:
    """Whether these are floats, all finite once in float32."""
    finite = value.is_meta or bool(value.float().isfinite().all())  # a shape alone has no values
    return value.is_floating_point() and finite


def _strip(name: str) -> str:
    """The name without what wrappers put before it."""
    while True:
        for prefix in ("model.", "module."):
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                break
        else:
            return name


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    rest = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(listed[:5]) + rest
