"""The house has floors: a file imports only from floors below its own. And no room is too large."""

import ast
from pathlib import Path

import pytest

import hfcompress

ROOT = Path(hfcompress.__file__).parent
FLOORS = """
errors together fourier losses probe padding files plugin progress cifar density jobs signals
rounding paper_networks coding.bits coding.symbols sealed packing output
zoo
coding
coding.tables coding.contexts coding.trellis
coding.fast coding.pool coding.classes
coding.rans
coding.plan coding.decoder dependent
reparameterization target
controller claims
methods.dense methods.entropy methods.hashing methods.levels methods.threshold methods.uniform
methods.magnitude
methods index
parts
compressor container schema_data folder passes decoding
schema
optimizer checkpoint callbacks
redistribution teacher trimming students sources corpora yaml_lines stream_checks
networks data teacher_cache filters positions tokenizer results recipe_checks saving
pictures
crops
augmentation
evaluate recipe quantizer streams
loading inspection
verify originals
compress_rules
hub compress export_ctranslate2 export_onnx
trainer resume export backends
card_text report tasks translate
card stages scoring measure teaching comparison
plain_card run translate_command sides
compress_command
sweep_schema dry_run
sweep_results compare
sweep_report
sweep
cli_files
cli_translate
cli
__main__ __init__
"""
FLOOR = {name: floor for floor, line in enumerate(FLOORS.splitlines()) for name in line.split()}
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imports(path: Path) -> set[str]:
    """The package's own modules that a file names in import statements, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("hfcompress.") for name in found if name.startswith("hfcompress.")} & FILES.keys()


def test_every_file_has_its_floor() -> None:
    assert sorted(FLOOR) == sorted(FILES)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_imports_only_from_floors_below(name: str) -> None:
    assert {other for other in imports(FILES[name]) if FLOOR[other] >= FLOOR[name]} == set()


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_is_short(name: str) -> None:
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) < 300
