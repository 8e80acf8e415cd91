"""Put a model folder on the Hub: private unless somebody says otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.model import Source


def push_folder(source: Source, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """Upload a local model folder, with its model card, as a repository on the Hub.

    Args:
        source: A local model.
        repo_id: ``"org/name"``, or ``"name"`` for the owner of the token.
        private: Make the repository private. One that exists keeps its own setting, and a public one is not written to
            unless this is False.
        token: A token with write access; None is the one of ``huggingface_hub.login()``. It is used once and kept
            nowhere.

    Returns:
        The repository's address.

    Raises:
        ValueError: If the model is not a local folder, or the Hub does not take it; the sentence says what to do.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    if not source.is_local:
        raise ValueError(f"{source.title} is on the Hub already: quantize it into a folder and push that.")
    if source.notes:
        raise ValueError(
            f"{source.title} is read through links because its files have names of their own: quantize its original "
            "into a new folder and push that."
        )
    api = HfApi(token=token.strip() if token else None)  # with a line's end it would be quoted in an error
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise ValueError(f"{url.repo_id} exists and is public: name another repository, or say private=False.")  # noqa: TRY301 - as it is about what was just asked
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=Path(source.location),
            commit_message=f"{source.title}, written by Workbench",
            ignore_patterns=[".*"],
        )
    except HFValidationError:
        raise ValueError(f"{repo_id!r} is no name for a repository: write it as 'org/name' or 'name'.") from None
    except (LocalTokenNotFoundError, OfflineModeIsEnabled):
        raise ValueError(
            "The Hub needs to know who you are: run huggingface_hub.login() in a cell with a token that may write, and "
            "leave the offline mode."
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ValueError(
                f"The Hub does not let this token write to {repo_id}: log in with huggingface_hub.login() and a token "
                "with write access."
            ) from None
        raise ValueError(f"The Hub did not take {repo_id} (status {status}): try again.") from None
    except UnicodeError:
        raise ValueError("A token is plain letters, digits and _: copy it again.") from None
    except ValueError:
        raise
    except Exception as error:  # noqa: BLE001 - a refused connection is whatever the HTTP library of the day raises
        if isinstance(error, OSError) and error.filename:
            raise ValueError(f"{error.filename} cannot be read ({error.strerror}), so it was not uploaded.") from None
        raise ValueError(f"The Hub cannot be reached ({type(error).__name__}): check the connection.") from None
    return str(url)
