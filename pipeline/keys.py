"""Action keys: sha256 over the canonical JSON of everything that can change the outputs.

What is left out is left out on purpose: job counts, paths of the checkout and of the cache, uid,
host name, ccache, log level. A result may then be shared by every machine that asks for the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipeline.action import Action

#: Raised when the meaning of a key changes; all older results become unreachable.
SCHEMA = 1

Spec = dict[str, Any]


def canonical(data: Any) -> bytes:
    """JSON with sorted keys, no white space and no ASCII escapes: one text for one value."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def spec(action: Action, keys: Mapping[str, str]) -> Spec:
    """Everything that can change the outputs of `action`, given the keys of its upstream actions."""
    return {
        "schema": SCHEMA,
        "kind": action.kind,
        "version": action.version,
        "arch": action.arch,
        "builder": keys[action.builder] if action.builder else None,
        "script": action.script.digest if action.script else None,
        "files": {
            path: {"digest": file.digest, "executable": file.executable}
            for path, file in action.files.items()
        },
        "inputs": {
            path: {"key": keys[used.action], "output": used.output, "unpack": used.unpack}
            for path, used in action.inputs.items()
        },
        "environment": dict(action.environment),
        "parameters": dict(action.parameters),
        "capabilities": sorted(action.capabilities),
        "outputs": [[output.name, output.kind, output.digest] for output in action.outputs],
    }


def key(specification: Spec) -> str:
    """The action key of a specification: 64 hex digits."""
    return hashlib.sha256(canonical(specification)).hexdigest()
