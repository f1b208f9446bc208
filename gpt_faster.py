"""gpt-faster as a library. After `pip install -e .`, from any folder:

    from gpt_faster import Sampling, TextStream, generate, load

The files beside this one import each other by plain names, such as `model` and `text`, which may be other modules in
your environment. So they are loaded as submodules of this one, `gpt_faster.model`, and the plain names stay yours.
"""

import ast
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ROOMS = ("mixers", "kernels", "layers", "weights", "text", "engine", "serving", "measure", "compress")
NAMES = (*ROOMS, "cli", "model", "ranks", "tp", "stages")


class Loader(SourceFileLoader):
    """Reads a file as if it imported `gpt_faster.model` where it says `model`."""

    def source_to_code(self, data, path, *, _optimization=-1):
        tree = ast.parse(data, path)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not {each.name for each in node.names} & {*NAMES}, f"{path}: write from ... import ..."
            elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in NAMES:
                node.module = f"{__name__}.{node.module}"
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimization)

    def path_stats(self, path):
        raise OSError("no bytecode is cached: the commands have the same files under their plain names")


class Finder(MetaPathFinder):
    """Finds the submodules of `gpt_faster` beside this file."""

    def find_spec(self, fullname, path, target=None):
        parent, _, name = fullname.partition(".")
        place = ROOT.joinpath(*name.split("."))
        if parent != __name__ or name.partition(".")[0] not in NAMES:
            return None
        if place.is_dir() and not place.with_suffix(".py").exists():
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(place)]
            return spec
        file = str(place.with_suffix(".py"))
        return spec_from_file_location(fullname, file, loader=Loader(fullname, file))


__path__ = [str(ROOT)]
sys.meta_path.insert(0, Finder())

from gpt_faster.engine.engine import Engine, generate, load  # noqa: E402
from gpt_faster.engine.sampling import Sampling  # noqa: E402
from gpt_faster.text.stream import TextStream  # noqa: E402

__all__ = ["Engine", "Sampling", "TextStream", "generate", "load"]
