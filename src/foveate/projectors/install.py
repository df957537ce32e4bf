"""A compressor in a stock model: put in place of its projector, saved beside the weights, and read back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

from safetensors.torch import load_file, save_file
from torch import nn

from foveate.core.compressor import Compressor, Installed, Sizes
from foveate.core.errors import InputError, UnsupportedModelError
from foveate.families import family_of
from foveate.families.compressed import installed_in
from foveate.families.tower import encoder_layers
from foveate.projectors.base import Projector, projector_from_dict

Start = Literal["pool", "paper"]
WEIGHTS: Final = "projector.safetensors"
ABOUT: Final = "projector.json"
PREFIX: Final = "model.multi_modal_projector."


def install_projector(model: Any, projector: Projector, start: Start = "pool", processor: Any = None) -> Compressor:
    """Put a trained compressor in the place of a LLaVA-like model's projector.

    From then on `save_pretrained` of the model writes the stock projector with the other weights, and the compressor
    beside them, for `from_pretrained`.

    Parameters
    ----------
    model
        LLaVA-1.5, VipLLaVA, and models that share their classes.
    projector
        Its configuration, such as ``TokenPacker(scale=4)``.
    start
        ``"pool"``: the module starts exactly at the average of the stock projector's tokens, where it can; ``"paper"``:
        as the paper initialises it.
    processor
        The model's, whose number of placeholders then follows; it is a stock one still, and can be saved as such.

    Returns
    -------
    Compressor
        The module, on the device and in the dtype of the stock projector, its parameters to be trained.

    Raises
    ------
    UnsupportedModelError
        If the model is no LLaVA, its projector reads ``[CLS]``, or a compressor stands there already.
    InputError
        If the projector cannot have the model's grid, or not start so.
    """
    family = _check_model(model)
    if start not in ("pool", "paper"):
        raise InputError(f"a projector starts at 'pool' or as in its 'paper', not at {start!r}")
    stock, own = model.model.multi_modal_projector, family.feature_layers(model, {})
    sizes, encoder = _sizes(model), encoder_layers(model.model.vision_tower)
    depth = len(encoder)
    theirs = [i % (depth + 1) for i in own]
    read = list(projector.layers(depth)) if start == "paper" or projector.adds_features else []
    if start == "pool":
        beside = list(dict.fromkeys([*theirs, *read]))
        places = [beside.index(i) for i in theirs], [beside.index(i) for i in read]
        module = projector.retrofit(sizes, copy.deepcopy(stock), *places)
    else:
        beside, module = read, projector.build_beside(sizes, encoder)
    tokens, cells = projector.num_output_tokens(sizes.grid), projector.cells(sizes.grid)
    option = _feature_option(model)
    module.installed = Installed(projector, start, tokens, cells, (stock, getattr(model.config, option)))
    example = next(stock.parameters())
    model.model.multi_modal_projector = module.to(example.device, example.dtype).train(model.training)
    setattr(
        model.config,
        option,
        beside if len(beside) > 1 or isinstance(getattr(model.config, option), list) else beside[0],
    )
    model.save_pretrained = _saving(model, model.save_pretrained)
    if processor is not None:
        follow(processor, module)
    return module


def _check_model(model: Any) -> Any:
    family: Any = family_of(model)
    if (installed := installed_in(model)) is not None:
        raise UnsupportedModelError(f"the model has a compressor already, {installed.projector!r}: load it anew")
    if not family.takes_compressor:
        raise UnsupportedModelError(
            f"compressors stand in for the projector of LLaVA-1.5 and VipLLaVA, which maps patches one by one; "
            f"{type(model).__name__} belongs to the family {family.name!r}"
        )
    if family.projects_cls(model, {}):
        raise UnsupportedModelError("this model's projector reads the [CLS] token, which lies on no grid of patches")
    return family


def _sizes(model: Any) -> Sizes:
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    return Sizes(vision.hidden_size, model.config.get_text_config().hidden_size, (side, side))


def _feature_option(model: Any) -> str:
    # VipLLaVA's option had an s at its end before transformers 5.23.
    return "vision_feature_layer" if hasattr(model.config, "vision_feature_layer") else "vision_feature_layers"


def follow(processor: Any, module: Compressor) -> None:
    """Let a stock LLaVA processor put as many placeholders as a compressor makes tokens.

    Raises
    ------
    InputError
        If the processor has no such settings.
    """
    assert module.installed is not None, "only a compressor in a model says how many tokens it makes"
    if not hasattr(processor, "patch_size") or not hasattr(processor, "num_additional_image_tokens"):
        raise InputError(f"{type(processor).__name__} has no patch_size to set: it is no processor of LLaVA")
    # The whole picture counts as one patch; "default" then takes one token off, for [CLS].
    off = processor.vision_feature_select_strategy == "default"
    processor.patch_size *= module.sizes.grid[0]
    processor.num_additional_image_tokens = module.installed.tokens - 1 + off


def _saving(model: Any, stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `save_pretrained` that writes the stock projector with the model, and the compressor beside it."""

    def save_pretrained(save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        module = model.model.multi_modal_projector
        installed = module.installed
        own, layers = installed.stock
        state = kwargs.pop("state_dict", None)
        state = dict(model.state_dict() if state is None else state)
        trained = {key.removeprefix(PREFIX): state.pop(key) for key in list(state) if key.startswith(PREFIX)}
        state |= {PREFIX + key: value for key, value in own.state_dict().items()}
        option = _feature_option(model)
        now = getattr(model.config, option)
        setattr(model.config, option, layers)
        model.model.multi_modal_projector = own
        try:
            result = stock(save_directory, *args, state_dict=state, **kwargs)
        finally:
            setattr(model.config, option, now)
            model.model.multi_modal_projector = module
        folder = Path(save_directory)
        save_file({key: value.detach().cpu().contiguous() for key, value in trained.items()}, folder / WEIGHTS)
        about = {
            **installed.projector.to_dict(), "start": installed.start, "paper": installed.projector.paper,
            "license": getattr(model.config, "license", None), "base_model": model.config._name_or_path or None,
        }  # fmt: skip
        (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        return result

    return save_pretrained


def from_pretrained(folder: str | Path, **kwargs: Any) -> Any:
    """Load a model with a compressor that `save_pretrained` wrote.

    Parameters
    ----------
    folder
        A local folder.
    kwargs
        For `transformers.AutoModelForImageTextToText.from_pretrained`.

    Raises
    ------
    InputError
        If the folder holds no compressor, or one whose weights do not fit.
    """
    from transformers import AutoModelForImageTextToText

    place = Path(folder)
    try:
        about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
        start = about.pop("start")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{str(folder)!r} holds no compressor, a {ABOUT} that `save_pretrained` wrote: {error}"
        ) from error
    for key in ("paper", "license", "base_model"):
        about.pop(key, None)
    projector = projector_from_dict(about)
    model = AutoModelForImageTextToText.from_pretrained(place, **kwargs)
    module = install_projector(model, projector, start)
    _read_weights(module, place / WEIGHTS)
    return model


def _read_weights(module: nn.Module, path: Path) -> None:
    try:
        weights = load_file(path)
    except Exception as error:  # safetensors has errors of its own, which are no OSError
        raise InputError(f"cannot read the compressor's weights from {str(path)!r}: {error}") from error
    own = module.state_dict()
    wrong = [
        key for key in {*own, *weights} if key not in own or key not in weights or own[key].shape != weights[key].shape
    ]
    if wrong:
        raise InputError(f"the weights in {str(path)!r} do not fit the compressor: {', '.join(sorted(wrong)[:5])}")
    module.load_state_dict(weights)
