#!/usr/bin/env bash
# Boots an emulated host that runs a guest under KVM, and judges what they tell: see pipeline/stackproof.py, which
# documents the inputs, the environment and the outputs.
exec python3 -B /build/in/stackproof.py
