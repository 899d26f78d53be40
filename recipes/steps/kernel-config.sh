#!/usr/bin/env bash
# Edits a kernel's configuration: see pipeline/configedit.py, which documents the inputs, the environment and the outputs.
exec python3 -B /build/in/configedit.py
