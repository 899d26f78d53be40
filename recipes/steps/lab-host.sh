#!/usr/bin/env bash
# Has the lab's emulated host install our packages, and judges what came of it: see pipeline/labinstall.py, which
# documents the inputs, the environment and the outputs.
exec python3 -B /build/in/labinstall.py
