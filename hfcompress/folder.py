"""config.json beside a compressed file: what makes of the two a folder that transformers and timm's users can load."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn

from hfcompress.files import write_atomically
from hfcompress.sealed import FORMAT, VERSION

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WITHOUT_US = "loads-only-after-import-hfcompress.safetensors"
"""The weights' file for a reader without this package: there is none, and its error names what is missing. Even where
an earlier save left dense weights in the folder, they are not taken for this model's."""


def save_config(model: nn.Module, folder: Path) -> None:
    """Write `folder`'s config.json, and the generation config of a model that generates.

    model: of transformers; or timm's own, whose config.json is the one that timm writes. Of other models nothing is
    known that could be written.
    """
    from transformers import PreTrainedModel  # the plug-in, which is imported with it, needs us whole

    if isinstance(model, PreTrainedModel):
        written = _of_transformers(model)
    elif "architecture" in (getattr(model, "pretrained_cfg", None) or {}):
        written = _of_timm(model)
    else:
        return
    config: dict[str, Any] = json.loads(written["config.json"])
    config["quantization_config"] = {"quant_method": FORMAT, "format_version": VERSION}
    config["transformers_weights"] = WITHOUT_US
    written["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    for name, data in written.items():
        write_atomically(folder / name, data)


def _of_transformers(model: "PreTrainedModel") -> dict[str, bytes]:
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    with TemporaryDirectory() as temporary:  # transformers writes in place
        model.config.save_pretrained(temporary)
        if model.can_generate():
            model.generation_config.save_pretrained(temporary)
        return {path.name: path.read_bytes() for path in Path(temporary).iterdir()}


def _of_timm(model: nn.Module) -> dict[str, bytes]:
    from timm.models._hub import save_config_for_hf  # of the public names, only save_for_hf calls it: with weights

    with TemporaryDirectory() as temporary:
        path = Path(temporary, "config.json")
        save_config_for_hf(model, str(path))
        config = json.loads(path.read_bytes())
    # transformers gives the number of classes itself, and would give it twice
    config["model_args"] = {k: v for k, v in (config.get("model_args") or {}).items() if k != "num_classes"}
    config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {"config.json": json.dumps(config).encode()}
