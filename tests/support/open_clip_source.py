"""open_clip's own losses, from its file: `import open_clip` needs torchvision, they do not."""

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType


@cache
def losses() -> ModuleType:
    """The module open_clip.loss."""
    package = importlib.util.find_spec("open_clip")
    path = Path(package.origin).parent / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
