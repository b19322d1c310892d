"""The root of the repository, from which all of ci/ is run."""

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
