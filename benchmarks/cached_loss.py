"""How near the distillation loss from a teacher's cache is to the loss from the teacher itself, on Multi30k de→en.

    python benchmarks/cached_loss.py --data-root FOLDER [--teacher FOLDER] [--k 16] [--steps 200] [--sentences 512]

Without --teacher, a small one is trained for as many steps first. A student is cut from it (half of its layers) and
distilled; before and after, both losses are summed over validation sentences. One line of JSON each.
"""

import argparse
import json
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, MarianConfig, MarianMTModel, PreTrainedModel, set_seed

from hfcompress import load, losses
from hfcompress.data import load_translation
from hfcompress.schema import Layers, TranslationData, Vocabulary
from hfcompress.students import from_teacher
from hfcompress.teacher_cache import TeacherCache, WithTeacher, take, write
from hfcompress.tokenizer import encode_pairs, train_tokenizer

BATCH = 32
HALVES = {
    f"{s}_{n}": v for s in ("encoder", "decoder") for n, v in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 256))
}


def main() -> None:
    options = _options()
    data = TranslationData(folder="multi30k", validation="val", test="val", source="de", target="en", max_length=64)
    splits = load_translation(data, options.data_root)
    with TemporaryDirectory() as folder:
        if options.teacher is None:
            tokenizer = train_tokenizer(splits.train, data, Vocabulary(size=4000), Path(folder) / "vocabulary")
            teacher = _new(tokenizer)
        else:
            tokenizer, teacher = AutoTokenizer.from_pretrained(options.teacher), load(options.teacher)
        train = encode_pairs(splits.train.select(range(BATCH * options.steps)), tokenizer, data, truncate=True)
        rows = encode_pairs(splits.validation.select(range(options.sentences)), tokenizer, data, truncate=True)
        collator = DataCollatorForSeq2Seq(tokenizer, model=teacher)
        batches = [collator([train[i] for i in range(j, j + BATCH)]) for j in range(0, len(train), BATCH)]
        if options.teacher is None:
            _train(teacher, None, batches)
        write(teacher, rows, collator, Path(folder) / "cache", k=options.k)
        cache = TeacherCache(Path(folder) / "cache")
        half = Layers(encoder_layers=-(-teacher.config.encoder_layers // 2), decoder_layers=1)
        student = from_teacher(teacher, half)
        _compare(0, student, teacher, rows, WithTeacher(collator, cache))
        _train(student, teacher, batches)
        _compare(options.steps, student, teacher, rows, WithTeacher(collator, cache))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--teacher", type=Path)
    for name, default in (("k", 16), ("steps", 200), ("sentences", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def _new(tokenizer: AutoTokenizer) -> MarianMTModel:
    set_seed(0)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids |= {"decoder_start_token_id": tokenizer.pad_token_id, "forced_eos_token_id": tokenizer.eos_token_id}
    config = MarianConfig(vocab_size=len(tokenizer), d_model=128, **HALVES, **ids, scale_embedding=True)
    return MarianMTModel(config)


def _train(student: PreTrainedModel, teacher: PreTrainedModel | None, batches: list[dict[str, torch.Tensor]]) -> None:
    """On labels, smoothed, or on them and the teacher."""
    student.train()
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    for batch in batches:
        labels, inputs = batch["labels"], {name: value for name, value in batch.items() if name != "labels"}
        logits = student(**inputs).logits
        loss = losses.cross_entropy(logits, labels, 0.1)
        if teacher is not None:
            with torch.no_grad():
                theirs = teacher(**inputs).logits
            loss = 0.3 * loss + 0.7 * losses.distillation(logits, theirs, labels, 1.0)
        optimizer.zero_grad()
        (loss / losses.count(labels)).backward()
        optimizer.step()
    student.eval()


@torch.no_grad()
def _compare(
    steps: int,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: list[dict[str, list[int]]],
    collator: WithTeacher,
) -> None:
    student.eval()
    whole, cached, tokens = 0.0, 0.0, 0
    remaining = iter(rows)
    while part := list(islice(remaining, BATCH)):
        batch = collator(part)
        columns, labels = take(batch), batch.pop("labels")
        ours, theirs = student(**batch).logits, teacher(**batch).logits
        whole += losses.distillation(ours, theirs, labels, 1.0).item()
        cached += losses.cached_distillation(ours, columns, labels, 1.0).item()
        tokens += int(losses.count(labels))
    found = {"student's steps": steps, "tokens": tokens, "k": collator.cache.k}
    found |= {"whole": whole / tokens, "cached": cached / tokens, "cached / whole": cached / whole}
    print(json.dumps({**found, "bytes per token": collator.cache.bytes_per_token}), flush=True)


if __name__ == "__main__":
    main()
