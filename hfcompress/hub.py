"""`hfcompress push`: a compressed folder to the Hub, in one commit or not at all.

    check file and card ─▶ repository and branch, made if need be ─▶ one commit on top of the branch as it was seen

huggingface_hub itself repeats uploads when the Hub is busy or the line breaks, and sends no file that is there already;
what it asks only once, the commit among it, is repeated here.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    set_client_factory,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import get_session
from yaml import YAMLError

from hfcompress.checkpoint import FILE_NAME, Sizes
from hfcompress.errors import ConfigError, HFCompressError
from hfcompress.files import write_atomically
from hfcompress.verify import file_at, verify

TRIES, FIRST_WAIT, LONGEST_WAIT = 5, 1.0, 60.0
TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as broken; huggingface_hub waits for ever."""
_Failure: type[Exception] = HfHubHTTPError.__bases__[0]  # of whichever HTTP package this huggingface_hub uses
_BUSY = {408, 429, 500, 502, 503, 504}
_LEFT_OUT = re.compile(
    r"[._].*|.*\.(pt|pth|bin|pkl|pickle|tmp|lock)|stage\.json|(?!model\.hfcompress\.).*\.safetensors"
)
_DENSE = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
_PLACEHOLDERS = (
    *(r"\[?(?i:more information (is )?needed)\]?", r"(?i:lorem ipsum)", r"\[(?i:insert) [^\]]*\]", r"<your[-_ ][^>]*>"),
    *(r"\b(TODO|FIXME|TBD|XXX+|PLACEHOLDER)\b", r"\byour[-_]?(user)?name/", r"\{\{.*?\}\}", r"\{%.*?%\}"),
)
"""Patterns of text that stands in for other."""
_T = TypeVar("_T")
Say = Callable[[str], None]


def push(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    revision: str = "main",
    message: str = "Upload a compressed model",
    token: str | None = None,
    replaces_dense: bool = False,
    say: Say = lambda line: None,
) -> str:
    """Upload `folder` and return the commit's address; again with the same files, nothing is sent.

    revision: a branch, made where there is none. replaces_dense: the same commit removes dense weights of the same
    model from the repository. Raises ConfigError: no compressed file, no card, placeholder text in it, the Hub says no
    (token, rights, name, a branch that has moved); FormatError: the file is damaged; HFCompressError: the Hub cannot
    be reached, or is busy, after several attempts.
    """
    file = file_at(folder)
    for _ in verify(file):
        pass
    check_card(file.parent / "README.md")
    names = list(_uploaded(file.parent))
    say(f"{FILE_NAME} and README.md are good; {len(names)} files go to {repository}")
    _limit_silence()
    api = HfApi(token=token)
    try:
        head = _prepared(api, repository, private, revision)
        return _commit(api, file.parent, names, repository, revision, head, message, replaces_dense)
    except HFValidationError as error:
        raise ConfigError(f"'{repository}' can be no repository's name: {error}") from error
    except (_Failure, OSError) as error:
        raise _explained(error, repository, revision) from error


def write_short_card(folder: Path | str, name: str, sizes: Sizes, log: Sequence[Mapping[str, float]]) -> Path:
    """README.md of a model that a trainer pushes: its size, the last evaluation of the log, how it is loaded."""
    evaluations = [entry for entry in log if any(key.startswith("eval_") for key in entry)]
    metrics = {k: v for k, v in evaluations[-1].items() if k.startswith("eval_")} if evaluations else {}
    data = ModelCardData(library_name="hfcompress", tags=["hfcompress", "compressed", "quantized"])
    rows = "".join(f"| {key} | {value:.6g} |\n" for key, value in sorted(metrics.items()))
    table = f"The last evaluation:\n\n| metric | value |\n| --- | ---: |\n{rows}\n" if rows else ""
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n"
        f"{sizes.total:,} bytes for {sizes.weights:,} values: {sizes.bits_per_weight:.2f} bits each, all counted. "
        f"The weights were compressed while they were trained.\n\n{table}"
        "After `import hfcompress`, transformers' `from_pretrained` loads it as an ordinary dense model.\n"
    )
    path = Path(folder) / "README.md"
    write_atomically(path, text.encode())
    return path


def check_card(card: Path) -> None:
    """Raises ConfigError: there is none, its metadata cannot be read, or it holds text that stands in for other."""
    if not card.is_file():
        raise ConfigError(f"{card.parent} has no README.md: 'hfcompress run' and 'compress' write one")
    for number, line in enumerate(card.read_text(encoding="utf-8").splitlines(), start=1):
        if found := _placeholder(line):
            raise ConfigError(f"{card}:{number}: '{found}' stands in for something: write it, or take the line out")
    try:
        ModelCard.load(card)
    except (ValueError, YAMLError) as error:
        raise ConfigError(f"{card}: its metadata cannot be read: {' '.join(str(error).split())[:200]}") from error


def _placeholder(line: str) -> str | None:
    return next((match.group() for pattern in _PLACEHOLDERS if (match := re.search(pattern, line))), None)


def _uploaded(folder: Path) -> Iterator[str]:
    """Files that belong to the model: no hidden ones, pickles, dense weights, links or folders."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.is_symlink() and not _LEFT_OUT.fullmatch(path.name):
            yield path.name


def _prepared(api: HfApi, repository: str, private: bool, revision: str) -> str:
    """The commit that the branch is at; repository and branch are made where there is none."""
    try:
        return _head(api, repository, revision)
    except RevisionNotFoundError:
        _patiently(lambda: api.create_branch(repository, branch=revision, exist_ok=True))
    except RepositoryNotFoundError:
        _patiently(lambda: api.create_repo(repository, private=private, exist_ok=True))
        if revision != constants.DEFAULT_REVISION:
            _patiently(lambda: api.create_branch(repository, branch=revision, exist_ok=True))
    return _head(api, repository, revision)


def _head(api: HfApi, repository: str, revision: str) -> str:
    sha = _info(api, repository, revision).sha
    assert sha is not None
    return sha


def _info(api: HfApi, repository: str, revision: str) -> ModelInfo:
    return _patiently(lambda: api.model_info(repository, revision=revision, files_metadata=True))


def _commit(
    api: HfApi,
    folder: Path,
    names: list[str],
    repository: str,
    revision: str,
    head: str,
    message: str,
    replaces_dense: bool,
) -> str:
    there = {file.rfilename for file in _info(api, repository, revision).siblings or ()}
    gone = sorted(name for name in there if _DENSE.fullmatch(name)) if replaces_dense else []
    adds = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
    deletes = [CommitOperationDelete(path_in_repo=name) for name in gone]
    api.preupload_lfs_files(repository, adds, revision=revision)
    try:
        made = _patiently(
            lambda: api.create_commit(
                repository, [*adds, *deletes], commit_message=message, revision=revision, parent_commit=head
            )
        )
        return str(made.commit_url)
    except HfHubHTTPError as error:
        # the answer to a commit may have been lost, and the commit repeated: then the branch has moved to our files
        if error.response.status_code in (409, 412) and (moved := _holds(api, adds, repository, revision)):
            return f"{api.endpoint}/{repository}/commit/{moved}"
        raise


def _holds(api: HfApi, adds: list[CommitOperationAdd], repository: str, revision: str) -> str | None:
    """The commit that the branch is at, if it has our files."""
    info = _info(api, repository, revision)
    there = {file.rfilename: file for file in info.siblings or ()}
    for add in adds:
        file = there.get(add.path_in_repo)
        if file is None or file.size != add.upload_info.size:
            return None
        if file.lfs is not None and file.lfs.sha256 != add.upload_info.sha256.hex():
            return None
    return info.sha


def _patiently(call: Callable[[], _T]) -> _T:
    """What `call` gives; repeated with growing waits where the Hub is busy or the line breaks."""
    wait = FIRST_WAIT
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except (_Failure, OSError) as error:
            response = getattr(error, "response", None)
            if attempt == TRIES or (response is not None and response.status_code not in _BUSY):
                raise
            asked = "" if response is None else response.headers.get("Retry-After", "")
            time.sleep(min(float(asked) if asked.isdigit() else wait, LONGEST_WAIT))
            wait *= 2
    raise AssertionError("unreachable")


def _explained(error: Exception, repository: str, revision: str) -> HFCompressError:
    """Our error for one of theirs: which of the two sides can mend it, and how."""
    response = getattr(error, "response", None)
    code = None if response is None else response.status_code
    reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
    if code == 401:
        return ConfigError(f"the Hub does not know who you are ({reason}): run 'hf auth login', or set HF_TOKEN")
    if code == 403:
        return ConfigError(f"you may not write to {repository} ({reason}): use a token with write access to it")
    if code == 404:
        return ConfigError(f"there is no {repository} to write to ({reason}): check its name and your token's rights")
    if code in (409, 412):
        return ConfigError(f"{repository}, branch {revision}, has changed in the meantime ({reason}): push once more")
    if code is not None and code < 500 and code not in _BUSY:
        return ConfigError(f"the Hub refuses {repository} ({reason})")
    what = f"answered {code} every time" if code is not None else "could not be reached"
    return HFCompressError(
        f"the Hub {what} ({reason}): {repository} is as it was, nothing was committed; what was uploaded is kept, so "
        "that the same command goes on from it"
    )


def _limit_silence() -> None:
    """A connection on which nothing comes for a minute is broken, and is tried anew."""
    usual = get_session()
    hooks = usual.event_hooks
    set_client_factory(lambda: type(usual)(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT))
