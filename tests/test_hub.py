"""`hfcompress push` with the real huggingface_hub client over HTTP: one commit or none, and clear errors."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import mini_hub
import pytest
import torch
from commands import hfcompress
from conftest import compress, make_inputs, make_model
from huggingface_hub import constants, hf_api
from mini_hub import TOKEN, Hub, reset, stall, status
from small import rules, translation_trainer

from hfcompress import hub as ours
from hfcompress.checkpoint import FILE_NAME, save
from hfcompress.errors import ConfigError, FormatError, HFCompressError
from hfcompress.hub import check_card, push

REPOSITORY = "tester/tiny"
CARD = "---\nlicense: mit\ntags: [hfcompress]\n---\n# tiny\n\nA small model.\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    model = make_model("marian")
    save(model, folder, compress(model))
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server that this process' client takes for the Hub; nobody waits between attempts."""
    with mini_hub.running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(hf_api.api, "endpoint", running.url)  # made on import, whenever that was
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made on first use, if it exists
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        monkeypatch.setattr(ours, "TIMEOUT", 10.0)
        yield running
    huggingface_hub.close_session()


def held(hub: Hub, branch: str = "main") -> set[str]:
    repository = hub.repositories[REPOSITORY]
    return set(repository.commits[repository.branches[branch]]) - {".gitattributes"}


# ------------------------------------------------------------------------------------------ what goes well


def test_one_commit_makes_the_repository_and_holds_the_folder(hub: Hub, folder: Path) -> None:
    for left_out in (".secret", "training_args.bin", "model.safetensors", "stage.json"):
        (folder / left_out).write_bytes(b"x")
    (folder / "link").symlink_to("/etc/passwd")
    address = push(folder, REPOSITORY, private=True)
    repository = hub.repositories[REPOSITORY]
    assert address == f"{hub.url}/{REPOSITORY}/commit/{repository.branches['main']}"
    assert repository.private and len(repository.commits) == 2
    assert held(hub) == {"README.md", "config.json", "generation_config.json", FILE_NAME}
    assert hub.objects.keys() == {repository.commits[repository.branches["main"]][FILE_NAME].sha256}


def test_the_same_again_changes_nothing(hub: Hub, folder: Path) -> None:
    first = push(folder, REPOSITORY)
    assert push(folder, REPOSITORY) == first
    assert len(hub.repositories[REPOSITORY].commits) == 2 and hub.asked("PUT") == 1


def test_a_branch_is_made(hub: Hub, folder: Path) -> None:
    push(folder, REPOSITORY, revision="v1")
    assert FILE_NAME in held(hub, "v1") and FILE_NAME not in held(hub)


def test_what_else_is_in_the_repository_stays(hub: Hub, folder: Path) -> None:
    repository = hub.make(REPOSITORY)
    files = {"notes.txt": mini_hub.File(b"mine", False), "model.safetensors": mini_hub.File(b"dense", True)}
    repository.commit("main", files)
    push(folder, REPOSITORY)
    assert {"notes.txt", "model.safetensors", FILE_NAME} < held(hub)
    push(folder, REPOSITORY, replaces_dense=True)
    assert "notes.txt" in held(hub) and "model.safetensors" not in held(hub)


def test_a_fresh_process_with_an_empty_cache_reads_it(hub: Hub, folder: Path, tmp_path: Path, run_python) -> None:
    push(folder, REPOSITORY)
    model = make_model("marian")
    compress(model)  # its weights are now those of the file
    with torch.inference_mode():
        torch.save((make_inputs(model), model(**make_inputs(model)).logits), tmp_path / "expected")
    code = """
import sys, torch, hfcompress
from transformers import AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1]).eval()
inputs, logits = torch.load(sys.argv[2])
with torch.inference_mode():
    print(torch.equal(model(**inputs).logits, logits))
"""
    surroundings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
    surroundings |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    assert run_python(code, REPOSITORY, tmp_path / "expected", **surroundings).split() == ["True"]
    assert any((tmp_path / "cache").rglob(FILE_NAME))


def test_the_trainers_push_sends_the_compressed_model(hub: Hub, tmp_path: Path) -> None:
    trainer = translation_trainer(tmp_path / "tiny", given={"compression": rules()})
    trainer.args.hub_model_id, trainer.args.hub_token = REPOSITORY, TOKEN
    trainer.train()
    trainer.push_to_hub(commit_message="done")
    assert FILE_NAME in held(hub) and {"config.json", "README.md"} < held(hub)
    assert not {"model.safetensors", "training_args.bin"} & held(hub)


# ------------------------------------------------------------------------------------------ what is refused at once


@pytest.mark.parametrize(
    "line",
    [
        "[More Information Needed]",
        "more information needed",
        "TODO: scores",
        "{{ claim }}",
        "<your-name>/x",
        "TBD",
    ],
)
def test_placeholder_text_is_refused_with_its_line(line: str, folder: Path, hub: Hub) -> None:
    (folder / "README.md").write_text(CARD + f"\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"README\.md:9: "):
        push(folder, REPOSITORY)
    assert hub.log == []


@pytest.mark.parametrize("text", [CARD, "# Todo lo que sabemos\n\nmétodo, {a: 1}, x < y > z\n"])
def test_ordinary_text_is_not(text: str, folder: Path) -> None:
    (folder / "README.md").write_text(text, encoding="utf-8")
    check_card(folder / "README.md")


def test_what_else_is_refused_before_anything_is_sent(folder: Path, hub: Hub) -> None:
    (folder / "README.md").write_text("---\na: [\n---\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="metadata"):
        push(folder, REPOSITORY)
    (folder / "README.md").unlink()
    with pytest.raises(ConfigError, match=r"no README\.md"):
        push(folder, REPOSITORY)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    file = folder / FILE_NAME
    data = file.read_bytes()
    file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(FormatError, match=FILE_NAME):
        push(folder, REPOSITORY)
    file.unlink()
    with pytest.raises(ConfigError, match=FILE_NAME):
        push(folder, REPOSITORY)
    assert hub.log == [] and hub.repositories == {}


def test_the_command_refuses_too(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text(CARD + "TODO\n", encoding="utf-8")
    assert "README.md:8: 'TODO'" in hfcompress(tmp_path, "push", folder, REPOSITORY).refusal


# ------------------------------------------------------------------------------------------ faults

COMMIT, INFO, PREUPLOAD, UPLOAD, CREATE = (
    "/commit/",
    "^/api/models/[^/]+/[^/]+/revision",
    "/preupload/",
    "/objects/",
    "/create",
)
SAID = {
    401: "hf auth login",
    403: "may not write",
    404: "no tester/tiny to write to",
    409: "push once more",
    429: "answered 429 every time",
    500: "answered 500 every time",
}


@pytest.mark.parametrize("where", [COMMIT, PREUPLOAD, UPLOAD])
@pytest.mark.parametrize("code", SAID)
def test_a_lasting_fault_is_explained_and_commits_nothing(where: str, code: int, hub: Hub, folder: Path) -> None:
    hub.make(REPOSITORY)
    hub.faults.append(("*", where, status(code)))
    with pytest.raises(HFCompressError, match=SAID[code]) as found:
        push(folder, REPOSITORY)
    assert found.value.exit_code == (1 if code in (429, 500) else 2)
    assert held(hub) == set() and TOKEN not in str(found.value)


@pytest.mark.parametrize("code", [401, 403, 500])
@pytest.mark.parametrize("where", [INFO, CREATE])
def test_a_fault_before_there_is_a_repository(where: str, code: int, hub: Hub, folder: Path) -> None:
    hub.faults.append(("*", where, status(code)))
    with pytest.raises(HFCompressError, match=SAID[code]):
        push(folder, REPOSITORY)
    assert hub.repositories == {}


@pytest.mark.parametrize(
    "fault", [lambda: status(429, 2, Retry_After="1"), lambda: status(503, 2), lambda: reset(times=2)]
)
@pytest.mark.parametrize("where", [INFO, CREATE, PREUPLOAD, UPLOAD, COMMIT])
def test_a_passing_fault_passes(where: str, fault, hub: Hub, folder: Path) -> None:
    hub.faults.append(("*", where, fault()))
    push(folder, REPOSITORY)
    assert FILE_NAME in held(hub) and len(hub.repositories[REPOSITORY].commits) == 2


@pytest.mark.parametrize("fault", [reset, stall])
@pytest.mark.parametrize("where", [UPLOAD, COMMIT])
def test_a_line_that_stays_broken(where: str, fault, hub: Hub, folder: Path, monkeypatch) -> None:
    hub.make(REPOSITORY)
    if fault is stall:
        monkeypatch.setattr(ours, "TIMEOUT", 0.5)
    hub.faults.append(("*", where, fault()))
    with pytest.raises(HFCompressError, match="could not be reached") as found:
        push(folder, REPOSITORY)
    assert found.value.exit_code == 1 and held(hub) == set()
    hub.faults.clear()
    monkeypatch.setattr(ours, "TIMEOUT", 10.0)
    uploads = hub.asked("PUT")
    push(folder, REPOSITORY)
    assert FILE_NAME in held(hub)
    assert hub.asked("PUT") == uploads + (where == UPLOAD)  # what was uploaded is not sent again


def test_a_branch_that_moves_meanwhile_is_not_overwritten(hub: Hub, folder: Path) -> None:
    repository = hub.make(REPOSITORY)

    def someone_else(handler: mini_hub.Handler) -> bool:
        repository.commit("main", {"theirs.txt": mini_hub.File(b"x", False)})
        return False

    hub.faults.append(("POST", COMMIT, someone_else))
    with pytest.raises(ConfigError, match="has changed in the meantime"):
        push(folder, REPOSITORY)
    assert held(hub) == {"theirs.txt"}


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: Hub, folder: Path) -> None:
    lost = []

    def lose_the_answer(handler: mini_hub.Handler) -> bool:
        if not lost:
            lost.append(True)
            handler.reply = lambda *args, **kwargs: handler.hang_up()
        return False

    hub.faults.append(("POST", COMMIT, lose_the_answer))
    address = push(folder, REPOSITORY)
    repository = hub.repositories[REPOSITORY]
    assert address.endswith(repository.branches["main"]) and len(repository.commits) == 2
    assert hub.asked(COMMIT) == 2
