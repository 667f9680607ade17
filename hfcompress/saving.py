"""What a loaded model remembers: the compressed file it came from, which `save_pretrained` writes again.

The model is an ordinary dense one, whose weights anyone may change in any way. So the file is not trusted to be the
model's because nobody was seen to change it: it is decoded and compared, and written only if every weight is equal.
"""

import re
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from hfcompress.checkpoint import FILE_NAME, read, wrapper_prefix
from hfcompress.claims import unsaved
from hfcompress.container import Reader
from hfcompress.errors import FormatError, HFCompressError
from hfcompress.files import write_atomically
from hfcompress.folder import save_config

if TYPE_CHECKING:  # the plug-in, which is imported with it, imports us
    from transformers import PreTrainedModel

_CHECKPOINT = re.compile(r"checkpoint-\d+")
_log = logging.get_logger(__name__)


def remember(model: "PreTrainedModel", file: Path) -> None:
    """From now on, `model.save_pretrained` writes `file` again while it holds the model's weights."""
    model.save_pretrained = _SavePretrained(model, file)


def dequantize(model: "PreTrainedModel") -> "PreTrainedModel":
    """The same model, having forgotten its compressed file: `save_pretrained` writes dense weights from now on."""
    if isinstance(vars(model).get("save_pretrained"), _SavePretrained):
        del model.save_pretrained
    return model


class _SavePretrained:
    """A loaded model's `save_pretrained`: the compressed file again, or transformers' own for what is not in it.

    Dense weights are written once weights have changed, into a trainer's checkpoints (it resumes from nothing else),
    and when asked for by `state_dict=`, `variant=`, `distributed_checkpoint=` or `hfcompress.dequantize(model)`.
    Written from here, they take the place of a compressed file that lies there; after `dequantize` the model saves as
    transformers would, which leaves it.
    """

    def __init__(self, model: "PreTrainedModel", file: Path) -> None:
        self._model = weakref.ref(model)  # no cycle: a model's memory is free once its last user lets go
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model(), self._file)  # a copy of the model has its own

    def __call__(
        self,
        save_directory: Path | str,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **given: Any,
    ) -> None:
        model = self._model()
        if model is None:
            raise HFCompressError(
                "save_pretrained() was asked of a loaded model that is gone by now: keep the model in a variable, "
                "model = …from_pretrained(…), then model.save_pretrained(…)"
            )
        folder = Path(save_directory)
        wants_dense = state_dict is not None or given.get("variant") or given.get("distributed_checkpoint")
        if wants_dense or _CHECKPOINT.fullmatch(folder.name) or not self._still_holds(model):
            given |= {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub}
            type(model).save_pretrained(model, save_directory, **given)
            if is_main_process:  # config.json no longer names it
                (folder / FILE_NAME).unlink(missing_ok=True)
            return
        if is_main_process:
            _write(model, self._file, folder)
        if push_to_hub and is_main_process:
            model.push_to_hub(given.pop("repo_id", folder.name), **given)

    def _still_holds(self, model: "PreTrainedModel") -> bool:
        """Whether the file is there and is the model's; if not, it is forgotten."""
        try:
            if holds(read(self._file), model):
                return True
            _log.info(f"the weights are no longer those of {self._file}: dense ones are saved")
        except (FormatError, OSError) as error:
            _log.warning(f"dense weights are saved, for the compressed file cannot be written again: {error}")
        dequantize(model)
        return False


def holds(reader: Reader, model: "PreTrainedModel") -> bool:
    """Whether the file's tensors are the model's, in the model's dtypes, and no weight of the model is in no file."""
    prefix, persistent = wrapper_prefix(model), model.state_dict().keys()
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= {n: b for n, b in model.named_buffers(remove_duplicate=False) if n in persistent}
    found = set()
    for name in reader.shapes():
        if prefix + name not in tensors:
            return False
        found.add(id(tensors[prefix + name]))
    if any(id(tensor) not in found for name, tensor in tensors.items() if name not in unsaved(model)):
        return False
    return all(_equal(tensor, tensors[prefix + name]) for name, tensor in reader.tensors())


def _equal(stored: torch.Tensor, present: torch.Tensor) -> bool:
    """Bit for bit, but for the sign of zeros. A weight that is elsewhere (offloaded) is not known to be equal."""
    if present.is_meta or stored.shape != present.shape:
        return False
    wanted = stored.to(present.dtype) if stored.is_floating_point() else stored
    return wanted.dtype == present.dtype and torch.equal(wanted, present.detach().to("cpu"))


def _write(model: "PreTrainedModel", file: Path, folder: Path) -> None:
    """The compressed file first: until config.json names it, the folder is what it was before."""
    write_atomically(folder / FILE_NAME, file.read_bytes())
    save_config(model, folder)
