"""Publishing a checkpoint with its card to the Hugging Face hub: exactly what its manifest names.

The repository is made private. One that is public already is written to only where `public=True`
says so, and the hub is asked which it is.
"""

import re
from typing import TYPE_CHECKING

from helpers import WorkbookError, hub, workspace
from helpers.checkpoint import Checkpoint

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelCard

CARD = "README.md"


def files(checkpoint: Checkpoint) -> list[str]:
    """The names that publishing sends: the card, and what the checkpoint's manifest names.

    Anything else in the folder stays where it is. Raises `WorkbookError` when the checkpoint is
    not whole, or when a name leads out of its folder, through a link say.
    """
    folder = checkpoint.path
    workspace.verify(folder)  # once more: what was opened may have changed since
    names = sorted(workspace.read_manifest(folder) or {})
    for name in names:
        place = folder / name
        if not place.resolve().is_relative_to(folder.resolve()) or place.is_symlink():
            raise WorkbookError(
                f"{name} in {folder.name} is a link, or leads out of the folder.",
                "What it leads to may be private, and would be published. Nothing was sent.",
                "Make the checkpoint again; it is made of files of its own.")
    return [CARD, *(name for name in names if name != CARD)]


def publish(checkpoint: Checkpoint, card: "ModelCard", repo: str, really: bool = False,
            token: str | None = None, public: bool = False) -> list[str] | str:
    """Send a checkpoint and its card to the hub in one commit; without `really`, a dry run.

    `repo`: "owner/name"; made, and private, where it is not there. `public`: the repository may be
    one that everybody can read. A dry run contacts nobody and returns the list of files; otherwise
    the commit's address is returned. Raises `WorkbookError` for a checkpoint that is not whole, a
    missing token, a public repository, and whatever the hub refuses.
    """
    names = files(checkpoint)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*", repo):
        raise WorkbookError(f"{repo!r} does not name a repository.",
                            "The hub's names are an owner and a name: me/phi-4-fp8-dynamic.",
                            "Put your user name, or an organization's, in front of a slash.")
    if not really:
        return names
    if not token:
        raise WorkbookError(
            "There is no token to publish with.",
            "Publishing writes to the hub under somebody's name.",
            "Create a token with write permission on the hub, put it into HF_TOKEN and pass it on.")
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    api = HfApi(token=token)
    try:
        with hub.in_words():
            is_private = _make(api, repo)
            if not is_private and not public:
                raise _is_public(repo)
            contents = {CARD: str(card).encode()} | {
                name: checkpoint.path / name for name in names if name != CARD}
            commit = api.create_commit(
                repo, [CommitOperationAdd(name, content) for name, content in contents.items()],
                commit_message=f"{checkpoint.path.name}, with its card")
    except hub.HubError as error:
        raise _refused(repo, error.why, error.remedy) from error
    except (errors.HFValidationError, ValueError, KeyError, TypeError) as error:
        # The client takes any answer for the hub's; a login page's is no JSON.
        raise _refused(repo, *hub.NO_HUB) from error
    return commit.commit_url


def _make(api: "HfApi", repo: str) -> bool:
    """Make the repository, private, where it is not there; whether the hub calls it private."""
    from huggingface_hub import errors

    try:
        info = api.model_info(repo)
    except errors.RepositoryNotFoundError:
        api.create_repo(repo, private=True)
        info = api.model_info(repo)
    return info.private is True


def _is_public(repo: str) -> WorkbookError:
    return WorkbookError(
        f"The hub does not call {repo} private: everybody could read what is sent there.",
        "Nothing was sent.",
        "Choose a name that is not taken, make the repository private on its page, or pass "
        "public=True.")


def _refused(repo: str, why: str, remedy: str) -> WorkbookError:
    return WorkbookError(f"The checkpoint could not be published as {repo}: {why}.",
                         "Files arrive in one commit, so the repository holds all of it or none.",
                         f"{remedy[0].upper()}{remedy[1:]}, and run this again.")
