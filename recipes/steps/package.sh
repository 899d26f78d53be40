#!/usr/bin/env bash
# Makes one package in both formats: see pipeline/packager.py, which documents the inputs, the environment and the outputs.
exec python3 -B /build/in/packager.py
