"""The commands about releases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.face import JSON_OPTION, Face, session


class VerifyRelease(Face):
    """`doit verify-release`."""

    name = "verify-release"
    doc_purpose = "check a release directory: signatures, sums, indexes, packages, SBOM, provenance"
    doc_usage = "DIR [--key FILE]"
    cmd_options = (
        {
            "name": "key",
            "short": "",
            "long": "key",
            "type": str,
            "default": None,
            "help": "file with the public key that you trust; without it only shows that the parts belong together",
        },
        {
            "name": "no_lock",
            "short": "",
            "long": "no-lock",
            "type": bool,
            "default": False,
            "help": "do not compare with this checkout's locks: the release was made from another one",
        },
        JSON_OPTION,
    )

    def parse_execute(self, in_args: list[str]) -> int:
        """Options may follow the directory, too."""
        if in_args and not in_args[0].startswith("-"):
            in_args = [*in_args[1:], in_args[0]]
        return super().parse_execute(in_args)

    def perform(self, params: dict[str, Any], args: list[str]) -> int:
        """Print a line per check; status 2 when one failed."""
        from pipeline import inputs, verifyrelease  # most commands do without

        directory = Path(self.one(args, "DIR"))
        if not directory.is_dir():
            raise UserError(f"there is no directory {directory}", "give the release directory")
        key = None
        # an empty name is a mistake, and no reason to trust the directory's key
        if params["key"] is not None:
            try:
                key = Path(params["key"]).read_bytes()
            except OSError as error:
                raise UserError(
                    f"--key {params['key']}: {(error.strerror or str(error)).lower()}",
                    "name the public key's file",
                ) from None
        project = session().project
        checkout = None
        if not params["no_lock"]:
            checkout = verifyrelease.Checkout(
                project.sources_lock,
                project.packages_lock,
                {
                    source.name: {
                        n: f.digest for n, f in inputs.patches_of(project.root, source.name).items()
                    }
                    for source in project.sources_lock.sources
                },
            )
        verdicts = []
        for verdict in verifyrelease.verify(directory, key, checkout):
            verdicts.append(verdict)
            if not params["as_json"]:
                print(verdict, flush=True)
        failed = [verdict for verdict in verdicts if verdict.verdict == "failed"]
        if params["as_json"]:
            print(json.dumps([verdict.to_json() for verdict in verdicts], indent=1))
        elif failed:
            print(f"{len(failed)} of {len(verdicts)} checks failed: {failed[0].remedy}")
        return 2 if failed else 0
