"""A home folder for libraries that need one, in processes that have none.

Containers often run under a user id that the system does not know, without HOME. bokeh, which AIMET imports, then
fails, and torch would create a folder named `~` in the working directory.
"""

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)


def ensure_home() -> None:
    """Set HOME to the user's home folder, or to a temporary one, removed at exit, if the system knows none.

    Call it before AIMET is imported. A HOME that is an absolute path stays as it is.

    Raises:
        OSError: if no temporary folder can be created.
    """
    if Path(os.environ.get("HOME", "")).is_absolute():
        return
    os.environ.pop("HOME", None)  # empty or relative
    try:
        home = str(Path.home())
    except RuntimeError:
        home = tempfile.mkdtemp(prefix="ffnet-home-")
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        logger.warning(
            "HOME is not set, and the system knows no home folder of this user. A temporary folder is used, so that "
            "downloads and rendered scenes are not kept. Set HOME or TORCH_HOME, or name a --cache-dir."
        )
    os.environ["HOME"] = home
