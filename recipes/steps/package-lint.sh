#!/usr/bin/env bash
# Examines all packages of a platform: see pipeline/packagelint.py, which documents the inputs and the outputs.
exec python3 -B /build/in/packagelint.py
