#!/usr/bin/env bash
# Boots a guest's disk both ways, under emulation, and judges what it tells: see pipeline/bootproof.py, which
# documents the inputs, the environment and the outputs.
exec python3 -B /build/in/bootproof.py
