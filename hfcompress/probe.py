"""Made-up inputs for any of the networks, and what they say to them: to compare two copies of one model."""

import torch
from torch import Tensor
from transformers import PreTrainedModel


def sample_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two made-up inputs of the model's kind, the same in every process."""
    generator, config = torch.Generator().manual_seed(0), model.config
    if config.is_encoder_decoder:
        source, target = (torch.randint(config.vocab_size, (2, n), generator=generator) for n in (9, 7))
        return {"input_ids": source, "attention_mask": torch.ones_like(source), "decoder_input_ids": target}
    shape = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
    if shape is None:
        sides = getattr(config, "image_size", 224)
        sides = sides if isinstance(sides, list | tuple) else (sides, sides)
        shape = (getattr(config, "num_channels", 3), *sides)
    return {"pixel_values": torch.randn(2, *shape, generator=generator)}


def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """What the network says to them."""
    with torch.inference_mode():
        logits: Tensor = model(**inputs).logits
    return logits.float()
