"""`hfcompress compare`: bytes, scores and speeds of runs, each network by transformers and by CTranslate2."""

import shutil

import pytest
from commands import hfcompress
from recipe_texts import TINY

from hfcompress.comparison import CTRANSLATE2, TRANSFORMERS, Comparison
from hfcompress.evaluate import weight_bytes
from hfcompress.results import Results

pytest.importorskip("ctranslate2")

SPELLED = """\
name: spelled
translation: {embedded: cldr, source: de, target: en, train_rows: 400, validation_rows: 20, test_rows: 40}
vocabulary: {size: 300}
teacher:
  marian: {d_model: 32, encoder_layers: 2, decoder_layers: 2, encoder_ffn_dim: 64, decoder_ffn_dim: 64,
    encoder_attention_heads: 2, decoder_attention_heads: 2}
  training: {}
student: {from_teacher: {encoder_layers: 1, decoder_layers: 1}}
compression: {rules: [{method: {uniform: {bits: 4, bucket: 64}}}]}
training: {max_steps: 3, per_device_train_batch_size: 16}
evaluation: {beams: 2, batch_size: 16, max_new_tokens: 12, bootstrap: 50}
"""
OPTIONS = ("--beams", 2, "--batch", 1, "--batch", 8, "--sentences", 8, "--rounds", 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs with the same teacher and student, at 4 and 2 bits."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "spelled.yaml").write_text(SPELLED, encoding="utf-8")
    four, two = folder / "four", folder / "two"
    done = hfcompress(folder, "run", folder / "spelled.yaml", "--output", four)
    assert done.code == 0, done.err
    change = "compression.rules.0.method={uniform: {bits: 2, bucket: 64}}"
    done = hfcompress(folder, "run", folder / "spelled.yaml", change, "--output", two, "--reuse", four)
    assert done.code == 0, done.err
    return four, two


def test_every_network_by_both_engines(runs, said):
    done = hfcompress(said, "compare", *runs, "--output", said / "found", *OPTIONS)
    assert done.code == 0, done.err
    assert sum(line.startswith("│") and CTRANSLATE2 in line for line in done.out.splitlines()) == 4
    assert done.out.count("translated: ") == 16 and "BLEU, beam 2" in done.out
    found = Comparison.load(said / "found" / "comparison.json")
    names = [row.model for row in found.rows]
    assert names[::2] == names[1::2] and [row.engine for row in found.rows] == [TRANSFORMERS, CTRANSLATE2] * 4
    assert names[::2][:2] == ["teacher", "student, full precision"]
    assert [name.partition(" bits, ")[2] for name in names[4::2]] == ["four", "two"]

    for run, row in zip(runs, found.rows[4::2]):
        alone = Results.load(run / "results.json").row("compressed").scores
        assert {k: (score.value, score.signature) for k, score in row.scores[2].items()} == {
            k: (score.value, score.signature) for k, score in alone.items()
        }
        assert row.bytes == weight_bytes(run / "student") and row.gzipped > 0.9 * row.bytes
    student, int8 = found.rows[2:4]
    assert int8.bytes < student.bytes / 2 and int8.against is None and student.against is not None
    for row in found.rows:
        assert [(speed.beams, speed.batch) for speed in row.speeds] == [(1, 1), (1, 8), (2, 1), (2, 8)]
        assert all(speed.ms_per_sentence > 0 for speed in row.speeds) and list(row.scores) == [1, 2]
    table = (said / "found" / "table.md").read_text(encoding="utf-8")
    assert table.count("\n| ") == 9 + 1 and "BLEU, beam 2" in table
    assert (said / "found" / "plot.png").stat().st_size > 10_000

    before = (said / "found" / "translations.json").stat().st_mtime_ns
    assert hfcompress(said, "compare", *runs, "--output", said / "found", *OPTIONS).code == 0
    assert (said / "found" / "translations.json").stat().st_mtime_ns == before  # only timed again


def test_what_is_refused(runs, said):
    def refusal(*folders):
        return hfcompress(said, "compare", *folders, "--output", said / "found", *OPTIONS).refusal

    assert "is no finished run: expected results.json and recipe.yaml" in refusal(runs[0], said / "none")
    pictures = said / "pictures"
    pictures.mkdir()
    shutil.copy(runs[0] / "results.json", pictures)
    (pictures / "recipe.yaml").write_text(TINY, encoding="utf-8")
    assert "is a run of an image recipe; only translation is compared" in refusal(pictures)
    fewer = said / "fewer"
    shutil.copytree(runs[0], fewer)
    text = (fewer / "recipe.yaml").read_text(encoding="utf-8")
    (fewer / "recipe.yaml").write_text(text.replace("test_rows: 40", "test_rows: 30"), encoding="utf-8")
    assert "mean different rows by phrases spelled out" in (told := refusal(runs[0], fewer)) and "test_rows" in told
    shutil.rmtree(fewer / "stages")
    assert "has lost stages/student" in refusal(fewer)
    assert not (said / "found").exists()
