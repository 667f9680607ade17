"""What translates a teacher's sentences: transformers' `generate`, or CTranslate2."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from hfcompress.errors import ConfigError
from hfcompress.schema import Sequences

_PATIENCE = 2.0
"""CTranslate2 looks on until so many times its beams have ended; at its own 1 it stops before `generate` does."""
NO_CTRANSLATE2 = "CTranslate2 is not installed: pip install 'hfcompress[export]', or write engine: transformers"


class Encoded(NamedTuple):
    """Sentences as the teacher's encoder gives them to its decoder: it reads them once, to translate and to score."""

    ids: torch.Tensor
    mask: torch.Tensor
    states: torch.Tensor

    def output(self) -> BaseModelOutput:
        """A new one each time: `generate` repeats it for its beams in place."""
        return BaseModelOutput(last_hidden_state=self.states)


@torch.inference_mode()
def encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> Encoded:
    """What the encoder of `model` makes of the sentences, on its device."""
    batch = tokenizer(sentences, return_tensors="pt", padding=True, truncation=True).to(model.device)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return Encoded(ids, mask, model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state)


class Backend(Protocol):
    """Translates sentences: for each its n best, best first. `encoded`: what the teacher's encoder made of them."""

    def __call__(self, sentences: list[str], encoded: Encoded, /) -> list[list[str]]: ...


class Generate:
    """The backend that is transformers' own `generate`."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Sequences) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings

    @torch.inference_mode()
    def __call__(self, sentences: list[str], encoded: Encoded) -> list[list[str]]:
        n = self.settings.n_best
        ids = self.model.generate(
            input_ids=encoded.ids,
            attention_mask=encoded.mask,
            encoder_outputs=encoded.output(),
            num_beams=self.settings.beams,
            num_return_sequences=n,
            do_sample=False,
            max_new_tokens=self.settings.max_new_tokens,
        )
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [texts[i : i + n] for i in range(0, len(texts), n)]


def ctranslate2_backend(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Sequences) -> Backend:
    """CTranslate2's translations by the same model in float32. Raises ConfigError: it is not installed."""
    convert = converter()
    with TemporaryDirectory() as folder:
        whole, converted = Path(folder) / "whole", Path(folder) / "converted"
        tokenizer.save_pretrained(whole)
        model.config.save_pretrained(whole)
        list(convert(model, whole, converted, None, None))
        translate = converted_backend(converted, model.generation_config, tokenizer, settings)
    return lambda sentences, _: translate(sentences)


def converter() -> Callable[..., Iterator[str]]:
    """`to_ctranslate2`. Raises ConfigError: CTranslate2 is not installed."""
    try:
        from hfcompress.export_ctranslate2 import to_ctranslate2
    except ImportError as error:
        raise ConfigError(NO_CTRANSLATE2) from error
    return to_ctranslate2


def converted_backend(
    folder: Path,
    generation: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequences,
    threads: int = 0,
) -> Callable[[list[str]], list[list[str]]]:
    """CTranslate2 with a model already converted; it reads sentences itself. threads: of the CPU; 0: as it sees fit."""
    import ctranslate2

    device = "cuda" if torch.cuda.is_available() and ctranslate2.get_cuda_device_count() and not threads else "cpu"
    translator = ctranslate2.Translator(str(folder), device=device, intra_threads=threads)
    first = generation.forced_bos_token_id
    longest = settings.max_new_tokens - (generation.forced_eos_token_id is not None)  # it is one of those
    start = None if first is None else [tokenizer.convert_ids_to_tokens(first)]

    def translate(sentences: list[str]) -> list[list[str]]:
        ids = tokenizer(sentences, truncation=True)["input_ids"]
        found = translator.translate_batch(
            [tokenizer.convert_ids_to_tokens(line) for line in ids],
            beam_size=settings.beams,
            patience=_PATIENCE if settings.beams > 1 else 1.0,
            num_hypotheses=settings.n_best,
            max_decoding_length=longest,
            target_prefix=start and [start] * len(sentences),
            max_input_length=0,
        )
        texts = ([tokenizer.convert_tokens_to_ids(tokens) for tokens in line.hypotheses] for line in found)
        return [tokenizer.batch_decode(hypotheses, skip_special_tokens=True) for hypotheses in texts]

    return translate
