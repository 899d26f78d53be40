"""The doit task graph of virt-rt: `doit list` shows it, `doit help` tells the commands."""

from collections.abc import Iterator
from typing import Any

from pipeline.face import session
from pipeline.tasks import default_tasks, tasks

DOIT_CONFIG = {"default_tasks": default_tasks(), "backend": "memory", "dep_file": "artifacts/.doit"}


def task_virt_rt() -> Iterator[dict[str, Any]]:
    """Everything that can be built, from recipes and locks."""
    yield from tasks(session())
